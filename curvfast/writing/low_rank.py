"""The edited weight as a product of two factors, exactly: W' = L R of the least rank.

Take the first s rows of what a staircase keeps whole, and of the rows below only the k columns they
still use: W' = U_G[:, :s] (M ∘ C)[:s] U_Aᵀ + U_G[:, s:] (M ∘ C)[s:, :k] U_A[:, :k]ᵀ has rank s + k,
and s may be chosen. By König's theorem the least s + k is the largest number of kept pairs of which
no two share a row or a column, which is the rank of M ∘ C unless C is exceptional: no product of
two is smaller for them all. s = 0 and s = r_g are the bounding rectangle folded to either side.

The rectangle left as three factors U_G C U_Aᵀ, of r_g d_out + r_g r_a + r_a d_in numbers, never has
fewer than the min(r_g, r_a) (d_out + d_in) of the better of those two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from curvfast.core.eigenbasis import LayerBasis
from curvfast.core.mask import Mask
from curvfast.core.projection import working_dtype
from curvfast.core.staircase import Staircase


def cover(kept: Staircase | Mask) -> tuple[Tensor, Tensor]:
    """Return rows and columns that hold every kept pair between them, few in all.

    Args:
        kept: What is kept of a layer.

    Returns:
        Indices of rows and of columns, int64: the fewest there can be for a staircase; the rows
        used, or the columns if those are fewer, for any other mask.
    """
    if isinstance(kept, Staircase):
        widths = torch.cat([kept.widths.cpu().long(), torch.zeros(1, dtype=torch.int64)])
        rows = int((torch.arange(len(widths)) + widths).argmin())
        return torch.arange(rows), torch.arange(int(widths[rows]))
    used = [kept.dense().any(dim).nonzero()[:, 0].cpu() for dim in (1, 0)]
    none = torch.arange(0)
    return (used[0], none) if len(used[0]) <= len(used[1]) else (none, used[1])


def low_rank_factors(
    weight: Tensor, basis: LayerBasis, kept: Staircase | Mask
) -> tuple[Tensor, Tensor]:
    """Return L and R with W' = L R.

    Args:
        weight: W, [d_out, d_in], any float dtype; computed in float32, or float64 if it is.
        basis: The layer's eigenbasis.
        kept: What is kept.

    Returns:
        L [d_out, r] and R [r, d_in] in the working dtype, r being the size of :func:`cover`.
    """
    dtype, device = working_dtype(weight), weight.device
    weight = weight.to(dtype)
    u_g, u_a = (v.to(device, dtype) for v in (basis.vectors_g, basis.vectors_a))
    mask = kept.dense()[: u_g.shape[1], : u_a.shape[1]].to(device)
    rows, columns = (index.to(device) for index in cover(kept))
    others = torch.ones(u_g.shape[1], dtype=torch.bool, device=device)
    others[rows] = False
    above = (u_g[:, rows].T @ weight @ u_a) * mask[rows]
    below = (u_g[:, others].T @ (weight @ u_a[:, columns])) * mask[others][:, columns]
    left = torch.cat([u_g[:, rows], u_g[:, others] @ below], 1)
    right = torch.cat([above @ u_a.T, u_a[:, columns].T])
    return left, right
