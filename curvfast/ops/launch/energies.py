"""Host side of the band-energy kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvfast.ops.launch.availability import arch, interpreting, launching, refuses_device

_HALF = (torch.bfloat16, torch.float16)


def refusal(x: Tensor, vectors: Tensor) -> str | None:
    """Return the reason why the kernel cannot take these tensors, or None."""
    if x.dtype not in (*_HALF, torch.float32):
        return f"the kernel takes bfloat16, float16 and float32 activations, not {x.dtype}"
    return refuses_device(x.device)


def band_energies(x: Tensor, vectors: Tensor, edges: Sequence[int]) -> Tensor:
    """Project and square in registers; vectors are cast to the dtype of 16-bit rows."""
    from curvfast.kernels import band_energies as kernel
    from curvfast.kernels import tiling

    precision = "tf32x3" if x.dtype == torch.float32 else "ieee"
    tiles = tiling.INTERPRETED_STAIRCASE if interpreting() else tiling.energies(arch(x), precision)
    (rows, d), bands = x.shape, len(edges) - 1
    basis = vectors.to(x.dtype)
    out = torch.empty(rows, bands, dtype=torch.float32, device=x.device)
    limits = torch.tensor(edges, dtype=torch.int32, device=x.device)
    if rows and bands:
        with launching(x):
            kernel.band_energies[-(-rows // tiles.block_m), bands](
                x, basis, limits, out, rows, d, bands,
                *x.stride(), *basis.stride(),
                BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
                PRECISION=precision, UPCAST=interpreting(),
                num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip
    return out
