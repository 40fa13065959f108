"""edit(): keep the high-curvature part of weights, in place; edited(): for a while only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Unpack

import torch
from torch import Tensor, nn

from curvfast.adapters import LinearLayer
from curvfast.core.eigenbasis import Eigenbasis
from curvfast.core.importance import Importance
from curvfast.core.mask import Mask
from curvfast.core.selection import Selection
from curvfast.core.staircase import Staircase
from curvfast.edit_plan import EditOptions, EditPlan, plan_edit
from curvfast.edit_report import EditReport
from curvfast.layers import LayerSpec


def edit(
    model: nn.Module,
    basis: Eigenbasis,
    mass: float | None = None,
    layers: LayerSpec | None = None,
    *,
    fraction: float | None = None,
    pairs: int | None = None,
    selection: Selection | Mapping[str, Staircase | Mask] | None = None,
    importance: Importance | None = None,
    corrections: Mapping[str, Tensor] | None = None,
    strength: float = 1.0,
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
        selection: Instead of ``mass``: what to keep, by layer name. It knows whether its pairs are
            of these eigenvectors, of singular vectors (found anew for each weight, unless ``basis``
            holds them), or of the weight's own rows and columns.
        importance: What pairs are ranked by, as in :func:`curvfast.select`; None is ``"kfac"``.
        corrections: As in :func:`curvfast.select`.
        strength: α, of W + α (W' − W): 1 is the edit, 0 leaves every bit, between them part of it
            is made, and below 0 what it would remove is amplified.

    Returns:
        Pairs, mass, relative change and seconds of each layer.

    Raises:
        InputError: If a rule or the strength is out of range, more than one rule is given, the
            importance or its scores do not go with the basis or ``corrections``, or a weight is
            stored quantised.
        BasisMismatch: If the basis is of another model, or the selection of another basis.
        LayerNotFound: If ``layers`` matches nothing in the basis, ``selection`` or ``corrections``
            lack a layer, or a layer shares its weight with another module.
        ShapeError: If corrections are of another shape.
    """
    return _apply(
        plan_edit(
            model, basis, mass, layers, fraction=fraction, pairs=pairs, selection=selection,
            importance=importance, corrections=corrections, strength=strength,
        )
    )  # fmt: skip


@contextmanager
def edited(
    model: nn.Module,
    basis: Eigenbasis,
    mass: float | None = None,
    layers: LayerSpec | None = None,
    **options: Unpack[EditOptions],
) -> Iterator[EditReport]:
    """Edit a model inside a ``with`` block; afterwards its weights are the same, bit for bit.

    It takes the arguments of :func:`edit`, and raises what that raises.

    Yields:
        The report of the edit.
    """
    plan = plan_edit(model, basis, mass, layers, **options)
    saved = [(step.layer, step.layer.stored().clone()) for step in plan.steps]
    try:
        yield _apply(plan)
    finally:
        restore(saved)


@torch.no_grad()
def restore(saved: Iterable[tuple[LinearLayer, Tensor]]) -> None:
    """Copy weights back as they were stored, bit for bit."""
    for layer, original in saved:
        layer.stored().copy_(original)


def _apply(plan: EditPlan) -> EditReport:
    entries = []
    for layer, new, entry in plan.evaluated():
        layer.write(new)
        entries.append(entry)
    return plan.report(entries)
