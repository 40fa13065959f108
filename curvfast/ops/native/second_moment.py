"""Second moments by the native core: rows of any strides are packed once, and never cast."""

from __future__ import annotations

import torch
from torch import Tensor

from curvfast.ops import registry
from curvfast.ops.native import extension, instructions
from curvfast.ops.requests import MomentRequest, MomentTraits

DTYPES = (torch.float32, torch.bfloat16)

# Of fewer float32 features torch's one GEMM costs less than the call alone.
_NARROW = 96
_too_narrow = registry.unless_named("native", f"fewer than {_NARROW} float32 features are torch's")


def packs(dtype: torch.dtype, d: int) -> bool:
    """Return whether rows of d features are multiplied here by default."""
    if dtype not in DTYPES or extension.unavailable() or instructions.refusal():
        return False
    return dtype != torch.float32 or d >= _NARROW


def refusal(call: MomentTraits) -> str | None:
    """Return why this call cannot run here, or None."""
    if call.dtype not in DTYPES or call.device.type != "cpu" or not call.adjacent:
        return "only float32 and bfloat16 rows on a CPU, each row's features side by side"
    if call.dtype == torch.bfloat16 and call.weighted:
        return "weighted bfloat16 rows are not packed"
    if call.sums[0][0] != torch.float32:
        return f"the sum is {call.sums[0][0]}; packed rows are added to float32"
    if call.precision not in (None, "ieee"):
        return f"precision={call.precision!r} is the kernels'; products here are 'ieee'"
    too_narrow = call.dtype == torch.float32 and call.d < _NARROW and _too_narrow()
    return too_narrow or instructions.refusal()


def second_moment_(call: MomentRequest) -> None:
    """Add the products of the rows that count, in float32.

    Subnormal bfloat16 numbers count as zero by the instructions of ``avx512_bf16``.
    """
    _add(call, finite_only=False)


def second_moment_if_finite_(call: MomentRequest) -> bool:
    """As :func:`second_moment_`, of finite rows alone: they are looked at while they are packed."""
    return _add(call, finite_only=True)


def _add(call: MomentRequest, *, finite_only: bool) -> bool:
    rows = counted(call.x, call.index())
    if not rows.numel():
        return True
    offsets = offsets_of(call.x, rows)
    words = room_words(call.x.dtype, rows.numel(), call.d)
    room = torch.empty(words, dtype=torch.int32, device="cpu")
    isa, workers = instructions.chosen(), torch.get_num_threads()
    for out, weights in call.sums():
        # √w on both sides keeps the product symmetric.
        roots = None if weights is None else weights.flatten()[rows].float().sqrt()
        if not extension.add_rows(
            out.tiles,
            call.d,
            call.x,
            offsets,
            roots,
            room,
            call.scale,
            finite_only,
            isa,
            workers,
        ):
            return False
    return True


def room_words(dtype: torch.dtype, rows: int, d: int) -> int:
    """Return how many 32-bit words rows of d features are packed into at a time."""
    return extension.packed_words(d, rows, dtype)


def products(d: int) -> int:
    """Return how many of the d · d products of a row are computed."""
    return extension.packed_products(d)


def counted(x: Tensor, index: Tensor | None) -> Tensor:
    """Return the indices of the counted rows of x [rows, d] or [sequences, length, d]."""
    return torch.arange(x.shape[:-1].numel(), device="cpu") if index is None else index


def offsets_of(x: Tensor, rows: Tensor) -> Tensor:
    """Return where each row begins, in elements."""
    if x.dim() == 2:
        return rows * x.stride(0)
    return rows // x.shape[1] * x.stride(0) + rows % x.shape[1] * x.stride(1)
