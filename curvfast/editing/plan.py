"""EditPlan: a checked edit, not yet made, with the kept pairs and new weight of each layer."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from curvfast.editing.report import EditReport, LayerEdit
from curvfast.errors import InputError
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.kfac.importance import Importance, ranked, singular_vectors
from curvfast.kfac.layer_basis import LayerBasis
from curvfast.kfac.projection import Projected, project
from curvfast.kfac.select import Kept, require_fit
from curvfast.kfac.selection.kept_pairs import Frame, Selection
from curvfast.kfac.selection.mask import Mask
from curvfast.kfac.selection.rule import Rule
from curvfast.kfac.selection.staircase import Staircase
from curvfast.model.families import LinearLayer
from curvfast.model.identity import model_facts
from curvfast.model.layers import LayerSpec, basis_layers, refuse_tied

DEFAULT_MASS = 0.6


class EditOptions(TypedDict, total=False):
    """Keyword-only arguments of :func:`curvfast.edit`, which documents them."""

    fraction: float | None
    pairs: int | None
    selection: Kept | None
    importance: Importance | None
    corrections: Mapping[str, Tensor] | None
    strength: float


class EditArguments(EditOptions, total=False):
    """All arguments of :func:`curvfast.edit` but the model and the basis."""

    mass: float | None
    layers: LayerSpec | None


@dataclass(frozen=True, eq=False)
class EditStep:
    """The edit of one layer, still to be made."""

    layer: LinearLayer
    basis: LayerBasis
    kept: Staircase | Mask
    foreign: Frame | None = None
    """What the kept pairs are of, if not of the basis."""

    def vectors(self, weight: Tensor) -> LayerBasis | None:
        """Return the vectors that pairs of W [d_out, d_in] are of; None: its rows and columns."""
        if self.foreign is None:
            return self.basis
        return singular_vectors(weight) if self.foreign == "singular" else None

    def edited(
        self, weight: Tensor, vectors: LayerBasis | None, strength: float = 1.0
    ) -> Projected:
        """Return W + α (W' − W) of W [d_out, d_in], in the working dtype; W itself for α = 0.

        Args:
            weight: W.
            vectors: What :meth:`vectors` returned.
            strength: α.
        """
        if strength == 0:
            return Projected(weight, 0.0)
        new, work = project(weight, vectors, self.kept)
        if strength != 1:
            new = torch.lerp(weight.to(new.dtype), new, strength)
        return Projected(new, work)


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
            new, work = step.edited(weight, step.vectors(weight), self.strength)
            change, seconds = relative_change(weight, new), time.perf_counter() - started
            entry = LayerEdit(
                step.layer.name, kept.pairs, kept.fraction, kept.mass, change, work, seconds
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
    selection: Kept | None = None,
    importance: Importance | None = None,
    corrections: Mapping[str, Tensor] | None = None,
    strength: float = 1.0,
) -> EditPlan:
    """Return the edit that :func:`curvfast.edit` would make, checked, and write nothing.

    It takes the same arguments, and raises what that raises.
    """
    if not math.isfinite(strength):
        raise InputError(
            f"strength={strength}: pass the α of W + α (W' − W), such as 1 for the edit, 0.5 for "
            "half of it, or a negative number to amplify what it would remove"
        )
    rules = (mass, fraction, pairs, selection)
    if sum(rule is not None for rule in rules) > 1:
        raise InputError("pass only one of mass=, fraction=, pairs= and selection=")
    chosen = editable_layers(model, basis, layers)
    part = basis.restricted(chosen)
    if selection is None:
        if fraction is None and pairs is None and mass is None:
            mass = DEFAULT_MASS
        selection = ranked(
            importance or "kfac", part, lambda name: chosen[name].matrix(),
            Rule(mass, fraction, pairs), corrections=corrections,
        )  # fmt: skip
        rule: dict[str, Any] = {
            "mass": mass, "fraction": fraction, "pairs": pairs, "importance": importance,
            "corrections": None if corrections is None else "given",
        }  # fmt: skip
    elif importance is not None or corrections is not None:
        raise InputError("selection= has made the choice: leave out importance= and corrections=")
    else:
        require_fit(chosen, part, selection)
        rule = {"selection": "given"}
    frame = selection.frame if isinstance(selection, Selection) else part.frame
    foreign = None if frame == part.frame else frame
    provenance = {
        "model": model_facts(model),
        "rule": {key: value for key, value in rule.items() if value is not None},
        "factors": dict(basis.provenance),
    }
    steps = [EditStep(chosen[n], part[n], selection[n], foreign) for n in chosen]
    return EditPlan(tuple(steps), strength, provenance)


def editable_layers(
    model: nn.Module, basis: Eigenbasis, layers: LayerSpec | None
) -> dict[str, LinearLayer]:
    """Return the layers of a model that a basis describes, as :func:`basis_layers`, to be edited.

    Raises:
        InputError: If a weight is stored quantised, or sharded in a way that is not supported.
        BasisMismatch: If the model lacks a layer, or it has other widths.
        LayerNotFound: If ``layers`` matches nothing in the basis, or a layer shares its weight with
            another module.
    """
    chosen = basis_layers(model, basis, layers)
    refuse_tied(model, chosen)
    for layer in chosen.values():
        layer.require_editable()
    return chosen


def relative_change(weight: Tensor, new: Tensor) -> float:
    """Return ‖W' − W‖ / ‖W‖ in Frobenius norm, in the dtype of ``new``."""
    before = weight.to(new.dtype)
    scale = before.norm().clamp_min(torch.finfo(new.dtype).tiny)
    return float((new - before).norm() / scale)
