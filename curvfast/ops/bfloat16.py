"""Second moments of bfloat16 rows on CPUs that multiply bfloat16: packed once, never cast."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from curvfast.ops import _native
from curvfast.ops.request import MomentRequest

# Products under which a second thread costs more than it gives.
_ALONE = 1 << 30


@cache
def unavailable() -> str | None:
    """Return why this cannot run on this machine, or None."""
    reason = _native.unavailable()
    if reason:
        return reason
    return None if _native.multiplies_bfloat16() else "this processor has no AVX512_BF16"


def refusal(call: MomentRequest) -> str | None:
    """Return why this call cannot run here, or None."""
    if unavailable():
        return unavailable()
    x = call.x
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.stride(-1) != 1:
        return "only bfloat16 rows on a CPU are packed, each row's features side by side"
    if call.weights is not None or call.also is not None:
        return "weighted rows are not packed"
    if call.out.tiles.dtype != torch.float32:
        return f"the sum is {call.out.tiles.dtype}; packed rows are added to float32"
    return f"precision={call.precision!r} is of float32 rows" if call.precision else None


def second_moment_(call: MomentRequest) -> None:
    """Add the products of the rows that count, in float32; subnormal numbers count as zero."""
    offsets = _offsets(call)
    if offsets.numel():
        few = offsets.numel() * call.d**2 < _ALONE
        workers = 1 if few else torch.get_num_threads()
        _native.add_bfloat16_rows(call.out.tiles, call.d, call.x, offsets, call.scale, workers)


def _offsets(call: MomentRequest) -> Tensor:
    """Return where each row that counts begins, in elements."""
    x, rows = call.x, call.index()
    if rows is None:
        rows = torch.arange(x.shape[:-1].numel())
    if x.dim() == 2:
        return rows * x.stride(0)
    return rows // x.shape[1] * x.stride(0) + rows % x.shape[1] * x.stride(1)
