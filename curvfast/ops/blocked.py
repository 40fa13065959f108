"""Second moments by torch's own GEMMs: only one triangle of blocks is multiplied.

A Gram matrix is symmetric, so a panel of columns needs the rows up to its diagonal alone: one large
GEMM above its diagonal tile, a few small ones within. Of the products of a dense update that leaves
(1 + s/d) / 2 for steps of s columns. All are torch's own GEMMs, added straight into the running
sum. Rows that need a cast, a weight or a choice pass through one small buffer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from curvfast.ops.request import MomentRequest
from curvfast.ops.triangular import TriangularSum

_WIDEST = 512
# Cast or gathered at a time: large enough for GEMM's full speed, small beside an activation.
CHUNK_ROWS, CHUNK_VALUES = 1024, 1 << 19


def panel_width(d: int) -> int:
    """Width of a panel of a sum of d features: at most 512, and equal panels.

    Wide panels feed GEMM; what they would waste on and below the diagonal is cut by
    :func:`diagonal_step`. Both are the best medians of interleaved runs against ``addmm_`` on two
    AVX-512 cores (``benchmarks/bench_second_moment.py``).
    """
    return -(-d // -(-d // _WIDEST))


def diagonal_step(d: int) -> int:
    """Columns of a panel's diagonal tile that are multiplied together."""
    if d < 96:
        return d
    if d <= 128:
        return 32
    return 64 if d < 512 else 128


def chunk_rows(d: int) -> int:
    """Return how many rows of d features are cast or gathered at a time."""
    return max(CHUNK_ROWS, CHUNK_VALUES // d)


def refusal(call: MomentRequest) -> str | None:
    """Return why this call cannot run here, or None."""
    if call.precision not in (None, "ieee"):
        return f"precision={call.precision!r} is the kernels'; torch's products here are 'ieee'"
    return None


def second_moment_(call: MomentRequest) -> None:
    """Add the products of the rows that count to the sums of ``call``."""
    x, out = call.x, call.out
    whole = call.rows is None and call.lengths is None and call.weights is None
    if whole and call.also is None and x.dim() == 2 and x.dtype == out.tiles.dtype:
        # The usual call of a small layer, spared what the others need.
        _add(out, x, call.scale)
        return
    for out, weights in call.sums():
        for chunk in _chunks(call, weights, out.tiles.dtype):
            _add(out, chunk, call.scale)


def _add(out: TriangularSum, chunk: Tensor, scale: float) -> None:
    step = diagonal_step(out.d)
    if step >= out.d == out.width:
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
