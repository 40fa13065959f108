"""The edit of one weight: W' = U_G (M ∘ (U_Gᵀ W U_A)) U_Aᵀ (arXiv 2510.24256, eq. for W')."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from curvfast import ops
from curvfast.kfac.layer_basis import LayerBasis
from curvfast.kfac.selection.mask import Mask
from curvfast.kfac.selection.staircase import Staircase, used_ranks


def rotate(weight: Tensor, basis: LayerBasis) -> Tensor:
    """Return C = U_Gᵀ W U_A, the weight in the eigenbasis.

    Args:
        weight: W, [d_out, d_in], any float dtype; computed in float32, or float64 if it is.
        basis: The layer's eigenbasis.

    Returns:
        C, [d_out, d_in]; the leading block of it if only leading eigenvectors are known.
    """
    dtype = working_dtype(weight)
    u_g, u_a = (v.to(weight.device, dtype) for v in (basis.vectors_g, basis.vectors_a))
    return u_g.T @ weight.to(dtype) @ u_a  # [k_g, d_out] [d_out, d_in] [d_in, k_a]


def rotate_back(coefficients: Tensor, basis: LayerBasis) -> Tensor:
    """Return U_G C U_Aᵀ for C [d_out, d_in]."""
    device, dtype = coefficients.device, coefficients.dtype
    return basis.vectors_g.to(device, dtype) @ coefficients @ basis.vectors_a.to(device, dtype).T


def drop_(coefficients: Tensor, selection: Staircase | Mask) -> Tensor:
    """Set to zero, in place, every entry of C, or its leading block, not selected; return it."""
    rows, width = coefficients.shape
    if isinstance(selection, Mask):
        for band, kept in selection.bands(rows, width, coefficients.device):
            coefficients[band].masked_fill_(kept.logical_not_(), 0)
        return coefficients
    widths = selection.widths[:rows].to(coefficients.device)  # [rows]
    columns = torch.arange(width, device=coefficients.device)  # [width]
    return coefficients.masked_fill_(columns >= widths[:, None], 0)


def kept_part(coefficients: Tensor, basis: LayerBasis, selection: Staircase | Mask) -> Tensor:
    """Return U_G (M ∘ C) U_Aᵀ, C [d_out, d_in] or its leading block left as it is.

    Only the leading rows and columns that hold all that is kept are multiplied.
    """
    rows, columns = used_ranks(selection)
    leading = drop_(coefficients[:rows, :columns].clone(), selection)  # M ∘ C: [rows, columns]
    rows, columns = leading.shape
    device, dtype = coefficients.device, coefficients.dtype
    # U_G [d_out, rows] and U_A [d_in, columns]: the vectors that are used.
    u_g, u_a = basis.vectors_g[:, :rows], basis.vectors_a[:, :columns]
    return u_g.to(device, dtype) @ leading @ u_a.to(device, dtype).T


class Projected(NamedTuple):
    """A projected weight, and what that took."""

    weight: Tensor
    """W', [d_out, d_in], in the working dtype."""
    work: float
    """Executed share of a dense projection's FLOPs."""


def project(weight: Tensor, basis: LayerBasis | None, selection: Staircase | Mask) -> Projected:
    """Return W', the part of W [d_out, d_in] in the selected pairs, in the working dtype.

    A staircase is evaluated by the cheapest exact plan; a mask of any other form densely, and so is
    the leading block where only leading eigenvectors are known. Without a basis the pairs are rows
    and columns of W itself.
    """
    dtype = working_dtype(weight)
    if basis is None:
        return Projected(drop_(weight.to(dtype, copy=True), selection), 0.0)
    if isinstance(selection, Mask) or not basis.complete:
        (rows, columns), (g, a) = basis.shape, basis.ranks
        there, back = g * columns * (rows + a), rows * a * (g + columns)
        share = (there + back) / (2 * rows * columns * (rows + columns))
        return Projected(rotate_back(drop_(rotate(weight, basis), selection), basis), share)
    plan = ops.plan(selection.widths.cpu().numpy(), selection.columns)
    u_g, u_a = (v.to(weight.device, dtype) for v in (basis.vectors_g, basis.vectors_a))
    new = ops.project(weight.to(dtype), u_g, u_a, selection.widths, using=plan)
    return Projected(new, plan.share)


def sweep(
    weight: Tensor, basis: LayerBasis, selections: Iterable[Staircase | Mask]
) -> Iterator[Tensor]:
    """Yield W' for each of many selections; the weight is rotated once.

    Args:
        weight: W, [d_out, d_in], any float dtype.
        basis: The layer's eigenbasis.
        selections: What to keep, one after the other.

    Yields:
        W' in the working dtype.
    """
    coefficients = rotate(weight, basis)
    for selection in selections:
        yield kept_part(coefficients, basis, selection)


def working_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype in which a weight is edited: float64 if it is, else float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
