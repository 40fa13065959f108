"""Second moments on the CPU: only one triangle of blocks is multiplied.

A Gram matrix is symmetric, so block row i needs its columns up to i alone: with p block rows that
is (1 + 1/p) / 2 of the products of a dense update. Each block is one of torch's own GEMMs, written
straight into the running sum. Rows that need a cast or a choice pass through one small buffer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Rows cast or gathered at a time: large enough for GEMM's full speed, small beside an activation.
CHUNK_ROWS = 1024


def panel_width(d: int) -> int:
    """Width of a block row for a [d, d] sum.

    The widths with the best median over interleaved runs against ``addmm_`` on two AVX-512 cores
    (``benchmarks/bench_second_moment.py``): narrow panels save more products, wide ones feed GEMM
    better.
    """
    if d < 256:
        return d
    return 128 if d < 1024 else 256


def panels(d: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of each block row of a [d, d] sum."""
    width = panel_width(d)
    for start in range(0, d, width):
        yield start, min(start + width, d)


def second_moment_(out: Tensor, x: Tensor, *, rows: Tensor | None, scale: float) -> None:
    """Add ``scale`` · xᵀx over the chosen rows to the lower block triangle of ``out``.

    Args:
        out: Running sum, shape [d, d], float32 or float64. Written on and below its diagonal
            blocks.
        x: Rows to add, shape [rows, d], any float dtype and strides.
        rows: Indices of the rows that count, int64, or None for all.
        scale: Factor of the products (not of the rows).
    """
    for chunk in _chunks(x, rows, out.dtype):
        for start, stop in panels(x.shape[1]):
            out[start:stop, :stop].addmm_(chunk[:, start:stop].T, chunk[:, :stop], alpha=scale)


def mirror_(out: Tensor) -> None:
    """Copy the lower triangle of a [d, d] sum onto the upper one, block by block."""
    for start, stop in panels(out.shape[0]):
        out[:start, start:stop] = out[start:stop, :start].T
        block = out[start:stop, start:stop]
        block.copy_(block.tril() + block.tril(-1).T)


def _chunks(x: Tensor, rows: Tensor | None, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield [≤ CHUNK_ROWS, d] pieces in ``dtype``; the input itself where nothing is to be done."""
    if rows is None and x.dtype == dtype:
        yield x
        return
    total = x.shape[0] if rows is None else rows.shape[0]
    buffer = torch.empty(min(total, CHUNK_ROWS), x.shape[1], dtype=dtype, device=x.device)
    for start in range(0, total, CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, total)
        piece = buffer[: stop - start]
        if rows is None:
            piece.copy_(x[start:stop])
        elif x.dtype == dtype:
            torch.index_select(x, 0, rows[start:stop], out=piece)
        else:
            piece.copy_(x.index_select(0, rows[start:stop]))
        yield piece
