"""Band energies: squared norms of activations projected onto bands of components."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from curvfast.errors import ShapeError
from curvfast.ops import registry

# Columns of x V held at a time.
_COLUMNS = 512


def band_energies(x: Tensor, vectors: Tensor, edges: Sequence[int]) -> Tensor:
    """Return ‖x_t V_b‖² for every row and band, in one pass; x V is never held whole.

    Args:
        x: Activations, [rows, d] or [..., d], any float dtype and strides.
        vectors: V, [d, components], orthonormal columns; components in the order of the bands.
        edges: Where bands begin and end: band b is columns edges[b] to edges[b + 1] of V.

    Returns:
        Energies, float32 [..., bands].

    Raises:
        ShapeError: If shapes do not fit, or the edges do not rise within V's columns.
        BackendUnavailable: If a backend was named that cannot do this.
    """
    if torch.compiler.is_compiling():
        out = x.new_empty(*x.shape[:-1], len(edges) - 1, dtype=torch.float32)
        torch.ops.curvfast.band_energies_(out, x, vectors, list(edges))
        return out
    if vectors.dim() != 2 or x.shape[-1] != vectors.shape[0]:
        raise ShapeError(
            f"x {list(x.shape)} needs vectors [{x.shape[-1]}, components], got "
            f"{list(vectors.shape)}"
        )
    steps = list(edges)
    rising = all(a <= b for a, b in pairwise(steps))
    if len(steps) < 2 or not rising or steps[0] < 0 or steps[-1] > vectors.shape[1]:
        raise ShapeError(f"edges={steps} must rise from at least 0 to at most {vectors.shape[1]}")
    flat = x.reshape(-1, x.shape[-1])
    found: Tensor = registry.resolve("band_energies", flat, vectors)(flat, vectors, steps)
    return found.view(*x.shape[:-1], len(steps) - 1)


def by_columns(x: Tensor, vectors: Tensor, edges: Sequence[int]) -> Tensor:
    """Project onto a few hundred components at a time."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows, basis = x.to(dtype), vectors.to(dtype)
    out = torch.zeros(x.shape[0], len(edges) - 1, dtype=dtype, device=x.device)
    for band, (start, stop) in enumerate(pairwise(edges)):
        for first in range(start, stop, _COLUMNS):
            part = rows @ basis[:, first : min(first + _COLUMNS, stop)]
            out[:, band] += part.square_().sum(1)
    return out.float()
