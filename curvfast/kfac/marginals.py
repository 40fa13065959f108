"""Marginals of the EK-FAC correction: its row and column sums, from weighted second moments.

The correction Λ_ij = E[(uᵢᵀg)² (vⱼᵀa)²] (George et al., arXiv 1806.03884, its scaling per position)
takes a second pass. Its sums over j and over i do not: Σⱼ (vⱼᵀa)² = ‖a‖², so they are the diagonals
of E[‖a‖² g gᵀ] and E[‖g‖² a aᵀ] in the eigenbasis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from curvfast.errors import BasisMismatch, InputError
from curvfast.kfac.layer_basis import LayerBasis, diagonal
from curvfast.kfac.layer_factors import LayerFactors

_TINY = 1e-300


@dataclass(frozen=True, eq=False)
class Marginals:
    """Row and column sums of one layer's EK-FAC correction."""

    rows: Tensor
    """r_i = Σⱼ Λ_ij = uᵢᵀ E[‖a‖² g gᵀ] uᵢ, [d_out] float64, g of the summed loss."""
    columns: Tensor
    """c_j = Σᵢ Λ_ij = vⱼᵀ E[‖g‖² a aᵀ] vⱼ, [d_in] float64."""


def marginals_of(name: str, basis: LayerBasis, factors: LayerFactors) -> Marginals:
    """Return the marginals of one layer, in the order of its basis.

    Args:
        name: The layer's name, for messages.
        basis: Its eigenbasis, with every eigenvector.
        factors: Its factors, with their weighted moments.

    Raises:
        InputError: If the weighted moments were not collected, or eigenvectors are missing.
        BasisMismatch: If the basis is of another shape.
    """
    if factors.a_weighted is None or factors.g_weighted is None:
        raise InputError(
            f"layer {name!r} has no weighted moments; collect with marginals=True, or measure the "
            "whole correction with curvfast.correct()"
        )
    if basis.shape != factors.shape:
        raise BasisMismatch(
            f"the basis of layer {name!r} is for a weight {basis.shape}, its factors are of "
            f"{factors.shape}: one of them was measured on another model"
        )
    if not basis.complete:
        raise InputError(
            f"the basis of layer {name!r} holds the leading {basis.ranks} eigenvectors of "
            f"{basis.shape}, and may lack those of large marginals: call eigh() without mass="
        )
    return Marginals(
        diagonal(factors.g_weighted / factors.rows_g, basis.vectors_g),
        diagonal(factors.a_weighted / factors.rows_g, basis.vectors_a),
    )


def reordered(
    name: str, basis: LayerBasis, factors: LayerFactors
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a basis with marginals instead of eigenvalues, its vectors reordered by them.

    Args:
        name: The layer's name, for messages.
        basis: Its eigenbasis, with every eigenvector.
        factors: Its factors, with their weighted moments.

    Returns:
        Values and vectors of A, then of G, as :class:`LayerBasis` takes them.

    Raises:
        InputError: If the weighted moments were not collected, or eigenvectors are missing.
        BasisMismatch: If the basis is of another shape.
    """
    found = marginals_of(name, basis, factors)
    # Both sums are ΣΛ up to rounding; split so that λ and μ result if g and a are independent.
    total = float(found.rows.sum() + found.columns.sum()) / 2
    share = float(factors.G.trace()) / max(float(factors.A.trace()), _TINY)
    scale_g, scale_a = (
        (math.sqrt(share / total), 1 / math.sqrt(share * total))
        if share * total > 0
        else (0.0, 0.0)
    )
    return (
        *_descending(found.columns * scale_a, basis.vectors_a),
        *_descending(found.rows * scale_g, basis.vectors_g),
    )


def _descending(values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    # Rounding in float32 sums may make small values negative.
    values, order = values.clamp_min(0).sort(descending=True, stable=True)
    return values.to(vectors.device), vectors[:, order.to(vectors.device)]
