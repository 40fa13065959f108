"""Singular vectors of a weight, in the place of eigenvectors: W = U diag(s) Vᵀ."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from curvfast.core.layer_basis import LayerBasis
from curvfast.core.staircase import Staircase


def singular_values(weight: Tensor) -> Tensor:
    """Return the singular values of W [d_out, d_in], descending, float64, on the CPU."""
    values: Tensor = torch.linalg.svdvals(weight.double())
    return values.cpu()


def singular_vectors(weight: Tensor) -> LayerBasis:
    """Return all singular vectors of W [d_out, d_in], found in float64, as a basis.

    Its values are the singular values on both sides, 0 beyond the rank there can be.
    """
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=True)
    values_g, values_a = (torch.zeros(len(m), dtype=torch.float64) for m in (u, vh))
    values_g[: len(s)] = values_a[: len(s)] = s.cpu()
    return LayerBasis(values_a, vh.T.float().contiguous(), values_g, u.float())


def leading_directions(energies: Tensor, rank: int, shape: tuple[int, int]) -> Staircase:
    """Return the block of all pairs of the leading singular vectors; off its diagonal C is 0.

    Args:
        energies: s², [min(d_out, d_in)], descending.
        rank: How many directions are kept.
        shape: (d_out, d_in).
    """
    widths = torch.zeros(shape[0], dtype=torch.int32)
    widths[:rank] = rank
    share = float(energies[:rank].sum() / energies.sum())
    return Staircase(widths, shape[1], float(energies[rank - 1]) if rank else math.inf, share)
