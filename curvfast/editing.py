"""edit(): keep the high-curvature part of weights, in place; edited(): for a while only."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.adapters import ExpertLayer, LinearLayer
from curvfast.core.eigenbasis import Eigenbasis
from curvfast.core.projection import project, work
from curvfast.core.selection import Mask, Selection, Staircase
from curvfast.distributed import refuse_layout
from curvfast.errors import BasisMismatch, InputError, LayerNotFound
from curvfast.layers import LayerSpec
from curvfast.matching import basis_layers

DEFAULT_MASS = 0.6


@dataclass(frozen=True)
class LayerEdit:
    """What the edit did to one layer."""

    name: str
    pairs: int
    """Eigenpairs kept."""
    fraction: float
    """Kept share of the layer's eigenpairs."""
    mass: float
    """Kept share of the layer's curvature mass."""
    relative_change: float
    """‖W' − W‖ / ‖W‖ in Frobenius norm."""
    work: float
    """Executed share of a dense projection's FLOPs."""
    seconds: float


@dataclass(frozen=True)
class EditReport:
    """What :func:`edit` did, layer by layer; prints as a table."""

    layers: tuple[LayerEdit, ...]
    total_pairs: int
    """All eigenpairs of the edited layers: their number of weights."""

    @property
    def kept_fraction(self) -> float:
        """Kept share of all eigenpairs of the edited layers."""
        return sum(layer.pairs for layer in self.layers) / max(1, self.total_pairs)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        return {
            "kept_fraction": self.kept_fraction,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        """Return the report as an aligned table."""
        width = max([5, *(len(layer.name) for layer in self.layers)])
        lines = [f"{'layer':<{width}}  {'pairs':>10}  kept %  mass %  change %  work %  seconds"]
        lines += [
            f"{e.name:<{width}}  {e.pairs:>10}  {100 * e.fraction:6.2f}  {100 * e.mass:6.2f}  "
            f"{100 * e.relative_change:8.2f}  {100 * e.work:6.2f}  {e.seconds:7.3f}"
            for e in self.layers
        ]
        return "\n".join(lines)


def edit(
    model: nn.Module,
    basis: Eigenbasis,
    mass: float | None = None,
    layers: LayerSpec | None = None,
    *,
    fraction: float | None = None,
    pairs: int | None = None,
    selection: Selection | Mapping[str, Staircase | Mask] | None = None,
) -> EditReport:
    """Keep the part of each weight in its high-curvature eigenpairs: W' = U_G (M ∘ C) U_Aᵀ.

    What is removed is the *low* population curvature, where verbatim memorization lives. Biases
    stay. Everything is checked before the first weight is written. Weights sharded by FSDP2 are
    gathered layer by layer, which every rank must then do. Source: arXiv 2510.24256.

    Args:
        model: The model the basis was measured on; changed in place, dtypes kept.
        basis: Eigenbases by layer name.
        mass: Share ρ in (0, 1] of each layer's curvature mass to keep; 0.6, the paper's choice for
            a 7B model, if no other rule is given.
        layers: Which layers of the basis to edit, as in :func:`curvfast.collect`; None means all.
        fraction: Instead of ``mass``: share of each layer's eigenpairs to keep.
        pairs: Instead of ``mass``: number of each layer's eigenpairs to keep.
        selection: Instead of ``mass``: what to keep, by layer name.

    Returns:
        Pairs, mass, relative change and seconds of each layer.

    Raises:
        InputError: If a rule is out of range or more than one is given, or a weight is stored
            quantised.
        BasisMismatch: If the basis is of another model.
        LayerNotFound: If ``layers`` matches nothing in the basis.
    """
    return _apply(_plan(model, basis, mass, layers, fraction, pairs, selection))


@contextmanager
def edited(
    model: nn.Module,
    basis: Eigenbasis,
    mass: float | None = None,
    layers: LayerSpec | None = None,
    *,
    fraction: float | None = None,
    pairs: int | None = None,
    selection: Selection | Mapping[str, Staircase | Mask] | None = None,
) -> Iterator[EditReport]:
    """Edit a model inside a ``with`` block; afterwards its weights are the same, bit for bit.

    Args:
        model: As in :func:`edit`.
        basis: As in :func:`edit`.
        mass: As in :func:`edit`.
        layers: As in :func:`edit`.
        fraction: As in :func:`edit`.
        pairs: As in :func:`edit`.
        selection: As in :func:`edit`.

    Yields:
        The report of the edit.

    Raises:
        InputError: As in :func:`edit`.
        BasisMismatch: As in :func:`edit`.
        LayerNotFound: As in :func:`edit`.
    """
    plan = _plan(model, basis, mass, layers, fraction, pairs, selection)
    saved = [(layer, layer.stored().clone()) for layer, _, _ in plan]
    try:
        yield _apply(plan)
    finally:
        with torch.no_grad():
            for layer, original in saved:
                layer.stored().copy_(original)


_Plan = list[tuple[LinearLayer, Eigenbasis, Staircase | Mask]]


def _plan(
    model: nn.Module,
    basis: Eigenbasis,
    mass: float | None,
    layers: LayerSpec | None,
    fraction: float | None,
    pairs: int | None,
    selection: Selection | Mapping[str, Staircase | Mask] | None,
) -> _Plan:
    rules = (mass, fraction, pairs, selection)
    if sum(rule is not None for rule in rules) > 1:
        raise InputError("pass only one of mass=, fraction=, pairs= and selection=")
    chosen = basis_layers(model, basis, layers)
    part = Eigenbasis({name: basis[name] for name in chosen})
    if selection is None:
        if fraction is None and pairs is None and mass is None:
            mass = DEFAULT_MASS
        selection = part.keep(mass=mass, fraction=fraction, pairs=pairs)
    for name, layer in chosen.items():
        layer.require_writable()
        if name not in selection:
            raise LayerNotFound(
                f"selection= says nothing about layer {name!r}; add it, or pass layers="
            )
        if selection[name].shape != (layer.d_out, layer.d_in):
            raise BasisMismatch(
                f"selection of layer {name!r} is {selection[name].shape}, its weight "
                f"{(layer.d_out, layer.d_in)}"
            )
        part[name].require(name, selection[name])
        sliced = isinstance(layer, ExpertLayer)
        refuse_layout(f"the weight of layer {name!r}", layer.parameter, sliced=sliced)
    return [(layer, part, selection[name]) for name, layer in chosen.items()]


def _apply(plan: _Plan) -> EditReport:
    reports = []
    total = 0
    for layer, basis, kept in plan:
        started = time.perf_counter()
        weight = layer.matrix()
        new = project(weight, basis[layer.name], kept)
        change = relative_change(weight, new)
        layer.write(new)
        total += weight.numel()
        seconds = time.perf_counter() - started
        reports.append(
            LayerEdit(
                layer.name, kept.pairs, kept.fraction, kept.mass, change,
                work(basis[layer.name], kept), seconds,
            )
        )  # fmt: skip
    return EditReport(tuple(reports), total)


def relative_change(weight: Tensor, new: Tensor) -> float:
    """Return ‖W' − W‖ / ‖W‖ in Frobenius norm, in the dtype of ``new``."""
    before = weight.to(new.dtype)
    scale = before.norm().clamp_min(torch.finfo(new.dtype).tiny)
    return float((new - before).norm() / scale)
