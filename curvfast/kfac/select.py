"""select(): selection by an importance; and checks that a selection fits a basis."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from curvfast.errors import BasisMismatch, LayerNotFound
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.kfac.importance import Importance, ranked
from curvfast.kfac.selection.kept_pairs import Selection
from curvfast.kfac.selection.mask import Mask
from curvfast.kfac.selection.rule import Rule
from curvfast.kfac.selection.staircase import Staircase
from curvfast.model.families import LinearLayer
from curvfast.model.layers import LayerSpec, basis_layers

Kept = Mapping[str, Staircase | Mask]
# How far masses of one basis may lie apart: decompositions in float32 and float64 do by 1e-5.
_SAME = 1e-4


def select(
    model: nn.Module,
    basis: Eigenbasis,
    importance: Importance = "kfac",
    *,
    mass: float | None = None,
    fraction: float | Mapping[str, float] | None = None,
    pairs: int | Mapping[str, int] | None = None,
    layers: LayerSpec | None = None,
    globally: bool = False,
    corrections: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Selection:
    """Choose what to keep of each layer's weight by an importance; pass exactly one rule.

    ``"kfac"`` ranks pairs by curvature λᵢμⱼ alone, as ``basis.keep`` does without a model.
    ``"ekfac"`` puts the measured Λᵢⱼ in its place; ``"kfac_saliency"`` and ``"ekfac_saliency"``
    multiply either by Cᵢⱼ², C = U_Gᵀ W U_A. ``"g_only"`` and ``"a_only"`` take λᵢ or μⱼ alone.
    ``"identity"`` ranks the weights themselves by W², ``"identity_saliency"`` by Gᵢᵢ Aⱼⱼ Wᵢⱼ²;
    ``"svd"`` singular directions by s²; ``"random"`` keeps as many pairs as ``"kfac"``, drawn
    uniformly. Formulas and sources: :mod:`curvfast.kfac.importance`.

    ``mass`` is the share of whatever is summed, so the same ρ means different sizes: compare
    importances at the same ``pairs``, or at the perplexity they cost.

    Args:
        model: The model the basis was measured on, unedited; nothing of it is written. Sharded
            weights are gathered where W counts, which every rank must then do.
        basis: Eigenbases by layer name; with tasks (:meth:`Eigenbasis.with_task`) for ``"kfac"``,
            ``"kfac_saliency"`` and ``"random"``.
        importance: How pairs are ranked.
        mass: Share in (0, 1] of each layer's summed score to reach, ties included.
        fraction: Share in [0, 1] of each layer's pairs, exact, or by layer name; for ``"svd"`` of
            its min(d_out, d_in) singular directions.
        pairs: Number of pairs, exact, or by layer name, such as ``other.pairs``; for ``"svd"`` of
            singular directions. Ties go in row order.
        layers: Which layers of the basis, as in :func:`curvfast.collect`; None means all.
        globally: With ``mass``: one threshold for all layers, whose scores are then held together,
            4 bytes a weight, unless what is kept is a staircase.
        corrections: Λ [d_out, d_in] by layer name, float, non-negative, in this basis; for
            ``"ekfac"`` and ``"ekfac_saliency"``.
        seed: For ``"random"``.

    Returns:
        The selection; it knows its importance, and what its rows and columns refer to.

    Raises:
        InputError: If the rule, the importance or its scores are out of range, do not go with the
            basis or ``corrections``, or a weight that counts is stored quantised.
        BasisMismatch: If the basis is of another model.
        LayerNotFound: If ``layers`` matches nothing in the basis, or ``corrections`` or a rule by
            layer name lack a layer.
        ShapeError: If corrections are of another shape.
    """
    rule = Rule(mass, fraction, pairs, globally)
    chosen = basis_layers(model, basis, layers)
    return ranked(
        importance, basis.restricted(chosen), lambda name: chosen[name].matrix(), rule,
        corrections=corrections, seed=seed,
    )  # fmt: skip


def require_fit(chosen: Mapping[str, LinearLayer], basis: Eigenbasis, selection: Kept) -> None:
    """Check that a selection has the ``chosen`` layers, in their shapes, and is of this basis.

    Raises:
        BasisMismatch: If it is of another model or basis.
        InputError: If it needs more than the leading eigenpairs the basis holds.
        LayerNotFound: If it lacks a layer.
    """
    frame = selection.frame if isinstance(selection, Selection) else basis.frame
    if basis.frame == "singular" and frame == "curvature":
        raise BasisMismatch(
            "the selection is of eigenvectors of curvature, and this basis holds singular vectors: "
            "pass the basis it was made with"
        )
    for name, layer in chosen.items():
        if name not in selection:
            raise LayerNotFound(
                f"selection= says nothing about layer {name!r}; add it, or pass layers="
            )
        if selection[name].shape != (layer.d_out, layer.d_in):
            raise BasisMismatch(
                f"selection of layer {name!r} is {selection[name].shape}, its weight "
                f"{(layer.d_out, layer.d_in)}"
            )
        if frame == basis.frame:
            basis[name].require(name, selection[name])
    if isinstance(selection, Selection) and frame == basis.frame:
        _require_same(selection, basis)


def _require_same(selection: Selection, basis: Eigenbasis) -> None:
    given = basis.totals()
    for name in differing(selection.totals, given):
        raise BasisMismatch(
            f"the selection was made in a basis whose curvature mass in layer {name!r} is "
            f"{selection.totals[name]:.6g}, and in this one it is {given[name]:.6g}: pass the "
            "basis it was made with"
        )


def differing(one: Mapping[str, float], two: Mapping[str, float]) -> list[str]:
    """Return the names that both have, with masses that two bases of one measurement cannot."""
    return [n for n in one if n in two and not math.isclose(one[n], two[n], rel_tol=_SAME)]
