"""Importance scores: which pairs, of which vectors, are ranked by which score.

With u and v eigenvectors of G and A, λ and μ their values, C = U_Gᵀ W U_A and Λᵢⱼ the curvature
measured along uᵢ vⱼᵀ, E[(uᵢᵀg)² (vⱼᵀa)²], which K-FAC approximates by λᵢμⱼ:

==================== ========= ==============================================================
importance           frame     score of pair (i, j)
==================== ========= ==============================================================
``kfac``             curvature λᵢ μⱼ: a staircase (arXiv 2510.24256)
``ekfac``            curvature Λᵢⱼ (George et al., arXiv 1806.03884)
``kfac_saliency``    curvature λᵢ μⱼ Cᵢⱼ²: twice what the loss rises if only this pair is removed
``ekfac_saliency``   curvature Λᵢⱼ Cᵢⱼ²
``g_only``           curvature λᵢ: whole rows
``a_only``           curvature μⱼ: whole columns
``identity``         standard  Wᵢⱼ²: magnitude
``identity_saliency``standard  Gᵢᵢ Aⱼⱼ Wᵢⱼ²: optimal brain damage (LeCun et al., 1989)
``svd``              singular  sᵢ²: truncated singular value decomposition
``random``           curvature none: as many pairs as ``kfac`` keeps, uniformly at random
==================== ========= ==============================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from curvfast.errors import InputError, LayerNotFound, ShapeError
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.kfac.layer_basis import LayerBasis
from curvfast.kfac.projection import rotate
from curvfast.kfac.selection.kept_pairs import Frame, Selection
from curvfast.kfac.selection.mask import random_mask
from curvfast.kfac.selection.rule import Rule
from curvfast.kfac.selection.scores import CurvatureRows, Scores, Term, masks, sum_of
from curvfast.kfac.selection.staircase import Staircase, staircases


def singular_values(weight: Tensor) -> Tensor:
    """Return the singular values of W [d_out, d_in], descending, float64, on the CPU."""
    values: Tensor = torch.linalg.svdvals(weight.double())
    return values.cpu()


def singular_vectors(weight: Tensor) -> LayerBasis:
    """Return all singular vectors of W [d_out, d_in], computed in float64, as a basis.

    Its values are the singular values on both sides, 0 beyond min(d_out, d_in).
    """
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=True)
    values_g, values_a = (torch.zeros(len(m), dtype=torch.float64, device="cpu") for m in (u, vh))
    values_g[: len(s)] = values_a[: len(s)] = s.cpu()
    return LayerBasis(values_a, vh.T.float().contiguous(), values_g, u.float())


def leading_directions(energies: Tensor, rank: int, shape: tuple[int, int]) -> Staircase:
    """Return the staircase of all pairs of the leading singular vectors; C is 0 off its diagonal.

    Args:
        energies: s², [min(d_out, d_in)], descending.
        rank: How many directions are kept.
        shape: (d_out, d_in).
    """
    widths = torch.zeros(shape[0], dtype=torch.int32, device="cpu")
    widths[:rank] = rank
    share = float(energies[:rank].sum() / energies.sum())
    return Staircase(widths, shape[1], float(energies[rank - 1]) if rank else math.inf, share)


Importance = Literal[
    "kfac", "ekfac", "kfac_saliency", "ekfac_saliency", "g_only", "a_only", "identity",
    "identity_saliency", "svd", "random",
]  # fmt: skip
# Rows of eigenvectors converted to float64 at a time.
_BAND = 1024
_CORRECTED = ("ekfac", "ekfac_saliency")
# Importances that support tasks; that need no curvature; and that need C or G in full.
_OF_TASKS = ("kfac", "kfac_saliency", "random")
_WITHOUT_CURVATURE = ("identity", "svd")
_IN_FULL = ("kfac_saliency", "ekfac_saliency", "identity_saliency")


def ranked(
    importance: Importance,
    basis: Eigenbasis,
    weights: Callable[[str], Tensor],
    rule: Rule,
    *,
    corrections: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    rotated: Callable[[str], Tensor] | None = None,
) -> Selection:
    """Select the pairs of highest importance, by the same rule in each layer of a basis.

    Args:
        importance: How pairs are ranked, see above.
        basis: The eigenbasis of the layers to select in.
        weights: Layer name -> W [d_out, d_in]; called for one layer at a time, if scores need W.
        rule: How much to keep. ``mass`` is a share of the summed score, for ``kfac``, ``ekfac`` and
            unions the curvature mass; for ``svd`` pairs are singular directions, min(d_out, d_in).
        corrections: Λ [d_out, d_in] by layer name, in this basis, for ``ekfac`` and its saliency.
        seed: Seed of ``random``.
        rotated: Layer name -> C [d_out, d_in], where it is known.

    Returns:
        The kept pairs of each layer and their frame: staircases for ``kfac``, ``g_only``,
        ``a_only`` and ``svd``, otherwise masks.

    Raises:
        InputError: If the importance is unknown, does not go with the basis or ``corrections``, the
            rule is out of range, or scores are not finite, negative, or all zero.
        LayerNotFound: If ``corrections`` or a rule by layer name lack a layer.
        ShapeError: If corrections are of another shape.
    """
    check(importance, basis, corrections)
    if importance == "kfac":
        return basis.keep_by(rule)
    if importance == "random":
        return _random(basis, rule, seed)
    if importance == "svd":
        return _singular(basis, weights, rule)
    if importance in ("g_only", "a_only"):
        spectra = {name: _one_side(own, importance) for name, own in basis.items()}
        return basis._with_frame(staircases(spectra, rule), importance)
    if rotated is None:
        rotated = partial(_rotated, basis, weights)
    found = masks(_scores(importance, basis, weights, rotated, corrections or {}), rule)
    if importance_frame(importance) == "standard":
        return Selection(found, importance, "standard")
    return basis._with_frame(found, importance)


def _scores(
    importance: Importance,
    basis: Eigenbasis,
    weights: Callable[[str], Tensor],
    rotated: Callable[[str], Tensor],
    corrections: Mapping[str, Tensor],
) -> Scores:
    def corrected(name: str) -> CurvatureRows:
        matrix, shape = corrections[name], basis[name].shape
        if matrix.shape != shape:
            raise ShapeError(
                f"corrections of layer {name!r} are {[*matrix.shape]}, its pairs {[*shape]}: "
                "measure them in this basis, decomposed without mass= to hold every eigenvector"
            )
        return lambda band: matrix[band].detach().to("cpu", torch.float64)

    def diagonal(name: str) -> CurvatureRows:
        own = basis[name]
        g, a = _square(own.vectors_g, own.values_g), _square(own.vectors_a, own.values_a)
        return sum_of([(g, a)])

    def one(name: str) -> CurvatureRows:
        ones = [torch.ones(d, dtype=torch.float64, device="cpu") for d in basis[name].shape]
        return sum_of([(ones[0], ones[1])])

    scores = basis.scores()
    match importance:
        case "ekfac":
            return replace(scores, curvature=corrected)
        case "kfac_saliency":
            return replace(scores, coefficients=rotated)
        case "ekfac_saliency":
            return replace(scores, curvature=corrected, coefficients=rotated)
        case "identity":
            return replace(scores, curvature=one, coefficients=weights, unit=0)
        case _:
            return replace(scores, curvature=diagonal, coefficients=weights)


def _rotated(basis: Eigenbasis, weights: Callable[[str], Tensor], name: str) -> Tensor:
    return rotate(weights(name), basis[name])


def _one_side(basis: LayerBasis, importance: Importance) -> Term:
    """Return λ or μ, and ones for the other side, along which pairs then tie."""
    g, a = basis.values_g, basis.values_a
    return (g, torch.ones_like(a)) if importance == "g_only" else (torch.ones_like(g), a)


def _square(vectors: Tensor, values: Tensor) -> Tensor:
    """Return the diagonal of U diag(values) Uᵀ, float64, on the CPU."""
    weights = values.to(vectors.device)
    return torch.cat([band.double().square() @ weights for band in vectors.split(_BAND)]).cpu()


def _random(basis: Eigenbasis, rule: Rule, seed: int) -> Selection:
    pairs = basis.keep_by(rule).pairs
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: random_mask(*own.shape, pairs[name], generator) for name, own in basis.items()}
    return basis._with_frame(drawn, "random")


def _singular(basis: Eigenbasis, weights: Callable[[str], Tensor], rule: Rule) -> Selection:
    known = basis.frame == "singular"
    spectra = {}
    for name, own in basis.items():
        s = own.values_g[: min(own.shape)] if known else singular_values(weights(name))
        if not s.any():
            raise InputError(f"the weight of layer {name!r} is zero: it has no singular directions")
        spectra[name] = s.square(), s.new_ones(1)
    found = staircases(spectra, rule)
    blocks = {
        name: leading_directions(energies, found[name].pairs, basis[name].shape)
        for name, (energies, _) in spectra.items()
    }
    if known:
        return basis._with_frame(blocks, "svd")
    # Vectors found anew for the edit are of the weight as it is then: there is nothing to compare.
    return Selection(blocks, "svd", "singular")


def importance_frame(importance: Importance) -> Frame:
    """Return the frame of the pairs that an importance ranks."""
    if importance == "svd":
        return "singular"
    return "standard" if importance.startswith("identity") else "curvature"


def takes_corrections(importance: Importance) -> bool:
    """Return whether an importance needs the measured Λ."""
    return importance in _CORRECTED


def check(
    importance: Importance, basis: Eigenbasis, corrections: Mapping[str, Tensor] | None
) -> None:
    """Check that an importance is known, and fits the basis and the corrections.

    Raises:
        InputError: If it does not.
        LayerNotFound: If ``corrections`` lack a layer.
    """
    if importance not in get_args(Importance):
        raise InputError(
            f"importance={importance!r}: pass one of {', '.join(get_args(Importance))}"
        )
    if importance not in _WITHOUT_CURVATURE:
        basis.require_curvature()
    if basis.tasks and importance not in _OF_TASKS:
        raise InputError(
            f"importance={importance!r} does not know what to make of with_task(); pass one of "
            f"{', '.join(_OF_TASKS)}, or for a union of corrections their sum and the basis without"
        )
    for name, own in basis.items():
        if importance in _IN_FULL and not own.complete:
            raise InputError(
                f"importance={importance!r} needs all eigenvectors of layer {name!r}, and the "
                "basis holds the leading ones: decompose without mass="
            )
    if (corrections is not None) != (importance in _CORRECTED):
        raise InputError(
            f"importance={importance!r} "
            + (
                "needs corrections=: the curvature Λ [d_out, d_in] of each layer, by name"
                if corrections is None
                else f"takes no corrections=; {' and '.join(_CORRECTED)} do"
            )
        )
    missing = [name for name in basis if corrections is not None and name not in corrections]
    if missing:
        raise LayerNotFound(
            f"corrections= has nothing for {', '.join(map(repr, missing))}: collect them for the "
            "same layers, or pass layers="
        )
