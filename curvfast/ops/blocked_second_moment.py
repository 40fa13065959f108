"""Blocked second moments by torch's GEMMs, which compute one triangle of blocks only.

A Gram matrix is symmetric, so a panel of columns needs only the rows up to its diagonal: one large
GEMM above its diagonal tile, a few small ones within. That is (1 + s/d) / 2 of the products of a
dense update, for steps of s columns. All are torch's GEMMs, accumulated in the running sum. Rows
that need a cast, a weight or a selection are copied through one small buffer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from curvfast.ops.packed_symmetric import TriangularSum
from curvfast.ops.requests import MomentRequest, MomentTraits

_WIDEST = 512
# Values cast or gathered at a time: enough for GEMM's full speed, few beside an activation.
CHUNK_ROWS, CHUNK_VALUES = 1024, 1 << 19


def panel_width(d: int) -> int:
    """Return the width of the panels of a sum of d features: at most 512, and equal.

    Wide panels feed GEMM; what they would waste on and below the diagonal is cut by
    :func:`diagonal_step`. Both are the best medians of interleaved runs against ``addmm_`` on two
    AVX-512 cores (``benchmarks/bench_second_moment.py``).
    """
    return -(-d // -(-d // _WIDEST))


def diagonal_step(d: int) -> int:
    """Return the number of columns of a panel's diagonal tile multiplied together."""
    if d < 96:
        return d
    if d <= 128:
        return 32
    return 64 if d < 512 else 128


def chunk_rows(d: int) -> int:
    """Return the number of rows of d features cast or gathered at a time."""
    return max(CHUNK_ROWS, CHUNK_VALUES // d)


def refusal(call: MomentTraits) -> str | None:
    """Return the reason why this backend cannot run the call, or None."""
    if call.precision not in (None, "ieee"):
        return f"precision={call.precision!r} is the kernels'; torch's products here are 'ieee'"
    return None


def second_moment_(call: MomentRequest) -> None:
    """Add the products of the rows that count to the sums of ``call``."""
    x, out = call.x, call.out
    whole = call.rows is None and call.lengths is None and call.weights is None
    if whole and call.also is None and x.dim() == 2 and x.dtype == out.tiles.dtype:
        # Fast path for the usual call of a small layer.
        _add(out, x, call.scale)
        return
    for out, weights in call.sums():
        for chunk in _chunks(call, weights, out.tiles.dtype):
            _add(out, chunk, call.scale)


def _add(out: TriangularSum, chunk: Tensor, scale: float) -> None:
    step = diagonal_step(out.d)
    if step >= out.d == len(out.tiles):
        # One tile, all of it within a step.
        out.tiles.addmm_(chunk.T, chunk, alpha=scale)
        return
    for start, stop, panel in out.panels():
        if start:
            panel[:start].addmm_(chunk[:, :start].T, chunk[:, start:stop], alpha=scale)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            block = panel[start:last, first - start : last - start]
            block.addmm_(chunk[:, start:last].T, chunk[:, first:last], alpha=scale)


def _chunks(call: MomentRequest, weights: Tensor | None, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield [≤ CHUNK_ROWS, d] pieces in ``dtype``; the input itself where nothing is to be done."""
    x, rows = call.x, call.index()
    if x.dim() == 3 and x.stride(0) == x.shape[1] * x.stride(1):
        x = x.flatten(0, 1)
    if x.dim() == 2 and rows is None and weights is None and x.dtype == dtype:
        yield x
        return
    total = x.shape[:-1].numel() if rows is None else rows.shape[0]
    step = min(total, chunk_rows(call.d))
    buffer = torch.empty(step, call.d, dtype=dtype, device=x.device)
    for start in range(0, total, max(1, step)):
        stop = min(start + step, total)
        piece = buffer[: stop - start]
        chosen: Tensor | slice = slice(start, stop) if rows is None else rows[start:stop]
        _read(x, chosen, piece)
        if weights is not None:
            # √w on both sides keeps the product symmetric.
            piece.mul_(weights.flatten()[chosen].to(dtype).sqrt()[:, None])
        yield piece


def _read(x: Tensor, chosen: Tensor | slice, out: Tensor) -> None:
    """Copy the chosen rows of x, its leading dimensions flattened, into ``out``."""
    if x.dim() == 3:
        if isinstance(chosen, slice):
            chosen = torch.arange(chosen.start, chosen.stop, device=x.device)
        out.copy_(x[chosen // x.shape[1], chosen % x.shape[1]])
    elif isinstance(chosen, slice):
        out.copy_(x[chosen])
    elif x.dtype == out.dtype:
        torch.index_select(x, 0, chosen, out=out)
    else:
        out.copy_(x.index_select(0, chosen))
