"""A checked edit, still to be made: what is kept of which layers, and their new weights."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from curvfast.adapters import ExpertLayer, LinearLayer
from curvfast.core.eigenbasis import Eigenbasis, LayerBasis
from curvfast.core.projection import project, work
from curvfast.core.selection import Mask, Selection, Staircase
from curvfast.distributed import refuse_layout
from curvfast.edit_report import EditReport, LayerEdit
from curvfast.errors import BasisMismatch, InputError, LayerNotFound
from curvfast.layers import LayerSpec, refuse_tied
from curvfast.matching import basis_layers
from curvfast.provenance import model_facts

DEFAULT_MASS = 0.6


class Rule(TypedDict, total=False):
    """What of which layers is kept: keywords of :func:`curvfast.edit`."""

    mass: float | None
    layers: LayerSpec | None
    fraction: float | None
    pairs: int | None
    selection: Selection | Mapping[str, Staircase | Mask] | None


class EditOptions(Rule, total=False):
    """Keywords of :func:`curvfast.edit`."""

    strength: float


@dataclass(frozen=True, eq=False)
class EditStep:
    """The edit of one layer, still to be made."""

    layer: LinearLayer
    basis: LayerBasis
    kept: Staircase | Mask

    def new_weight(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """Return W + α (W' − W) of W [d_out, d_in], in the working dtype; W itself for α = 0."""
        if strength == 0:
            return weight
        new = project(weight, self.basis, self.kept)
        return new if strength == 1 else torch.lerp(weight.to(new.dtype), new, strength)


@dataclass(frozen=True, eq=False)
class EditPlan:
    """An edit that was checked and not yet made."""

    steps: tuple[EditStep, ...]
    strength: float
    provenance: Mapping[str, Any]
    """Model, rule and factors, JSON-able."""

    def evaluated(self) -> Iterator[tuple[LinearLayer, Tensor, LayerEdit]]:
        """Yield each layer, its new weight [d_out, d_in], and its report; nothing is written."""
        for step in self.steps:
            started = time.perf_counter()
            weight, kept = step.layer.matrix(), step.kept
            new = step.new_weight(weight, self.strength)
            change = relative_change(weight, new)
            share, seconds = work(step.basis, kept), time.perf_counter() - started
            entry = LayerEdit(
                step.layer.name, kept.pairs, kept.fraction, kept.mass, change, share, seconds
            )
            yield step.layer, new, entry

    def report(self, layers: Iterable[LayerEdit]) -> EditReport:
        """Return what was done, layer by layer, as a report."""
        total = sum(step.layer.d_out * step.layer.d_in for step in self.steps)
        return EditReport(tuple(layers), total, self.strength, self.provenance)


def plan_edit(
    model: nn.Module,
    basis: Eigenbasis,
    mass: float | None = None,
    layers: LayerSpec | None = None,
    *,
    fraction: float | None = None,
    pairs: int | None = None,
    selection: Selection | Mapping[str, Staircase | Mask] | None = None,
    strength: float = 1.0,
) -> EditPlan:
    """Check an edit as :func:`curvfast.edit` takes it, and write nothing.

    Args:
        model: As in :func:`curvfast.edit`.
        basis: As in :func:`curvfast.edit`.
        mass: As in :func:`curvfast.edit`.
        layers: As in :func:`curvfast.edit`.
        fraction: As in :func:`curvfast.edit`.
        pairs: As in :func:`curvfast.edit`.
        selection: As in :func:`curvfast.edit`.
        strength: As in :func:`curvfast.edit`.

    Returns:
        The edit, to be evaluated layer by layer.

    Raises:
        InputError: As in :func:`curvfast.edit`.
        BasisMismatch: As in :func:`curvfast.edit`.
        LayerNotFound: As in :func:`curvfast.edit`.
    """
    if not math.isfinite(strength):
        raise InputError(
            f"strength={strength}: pass the α of W + α (W' − W), such as 1 for the edit, 0.5 for "
            "half of it, or a negative number to amplify what it would remove"
        )
    rules = (mass, fraction, pairs, selection)
    if sum(rule is not None for rule in rules) > 1:
        raise InputError("pass only one of mass=, fraction=, pairs= and selection=")
    chosen = basis_layers(model, basis, layers)
    refuse_tied(model, chosen)
    part = Eigenbasis({name: basis[name] for name in chosen})
    if selection is None:
        if fraction is None and pairs is None and mass is None:
            mass = DEFAULT_MASS
        selection = part.keep(mass=mass, fraction=fraction, pairs=pairs)
        rule: dict[str, Any] = {"mass": mass, "fraction": fraction, "pairs": pairs}
    else:
        rule = {"selection": "given"}
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
    provenance = {
        "model": model_facts(model),
        "rule": {key: value for key, value in rule.items() if value is not None},
        "factors": dict(basis.provenance),
    }
    steps = [EditStep(layer, part[name], selection[name]) for name, layer in chosen.items()]
    return EditPlan(tuple(steps), strength, provenance)


def relative_change(weight: Tensor, new: Tensor) -> float:
    """Return ‖W' − W‖ / ‖W‖ in Frobenius norm, in the dtype of ``new``."""
    before = weight.to(new.dtype)
    scale = before.norm().clamp_min(torch.finfo(new.dtype).tiny)
    return float((new - before).norm() / scale)
