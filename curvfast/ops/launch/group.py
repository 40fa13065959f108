"""Host side of the grouped second moment: many small sums, one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvfast.ops.launch.availability import arch, interpreting, launching
from curvfast.ops.launch.moments import second_moment_
from curvfast.ops.requests import MomentRequest

_ELEMENTS = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


def second_moments_(calls: Sequence[MomentRequest]) -> None:
    """Run each call; those that can share a launch do, and the sums of one launch are distinct."""
    pending: dict[tuple[torch.dtype, int, bool, torch.device], list[MomentRequest]] = {}
    for call in calls:
        if not _groupable(call):
            second_moment_(call)
            continue
        key = (call.x.dtype, call.out.width, call.rows is not None, call.x.device)
        batch = pending.setdefault(key, [])
        if any(other.out is call.out for other in batch):
            # Two programs must never add to one tile.
            _launch(batch)
            batch.clear()
        batch.append(call)
    for batch in pending.values():
        if len(batch) == 1:
            second_moment_(batch[0])
        elif batch:
            _launch(batch)


def _groupable(call: MomentRequest) -> bool:
    plain = call.lengths is None and call.weights is None and call.also is None
    if not plain or call.x.dim() != 2 or call.x.dtype not in _ELEMENTS:
        return False
    # The kernel is told so, and copies 16 bytes at a time.
    aligned = call.d % 8 == 0 and call.x.stride(0) % 8 == 0 and call.x.data_ptr() % 16 == 0
    return aligned and call.x.stride(1) == 1 and call.x.shape[0] > 0


def _launch(calls: Sequence[MomentRequest]) -> None:
    import triton.language as tl

    from curvfast.kernels import tiling
    from curvfast.kernels.second_moment_group import second_moment_group
    from curvfast.kernels.triangle import tiles_to_compute

    first = calls[0]
    device, width = first.x.device, first.out.width
    chosen = tiling.group(arch(first.x)) if not interpreting() else tiling.interpreted(0)
    counts = [tiles_to_compute(-(-call.d // width), False) for call in calls]
    starts = [sum(counts[:i]) for i in range(len(calls) + 1)]
    indexed = first.rows is not None
    rows = [call.x.shape[0] if call.rows is None else call.rows.numel() for call in calls]
    indices = [0 if call.rows is None else call.rows.data_ptr() for call in calls]
    with launching(first.x):
        second_moment_group[(starts[-1],)](
            _table([call.x.data_ptr() for call in calls], torch.int64, device),
            _table(indices, torch.int64, device),
            _table([call.out.tiles.data_ptr() for call in calls], torch.int64, device),
            _table([call.d for call in calls], torch.int32, device),
            _table(rows, torch.int32, device),
            _table([call.x.stride(0) for call in calls], torch.int64, device),
            _table([call.scale for call in calls], torch.float32, device),
            _table(starts, torch.int32, device),
            len(calls),
            ELEMENT=getattr(tl, _ELEMENTS[first.x.dtype]), TILE=width, BLOCK_K=chosen.block_k,
            INDEX=indexed, UPCAST=interpreting(), num_warps=chosen.warps, num_stages=chosen.stages,
        )  # fmt: skip


def _table(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    table = torch.tensor(values, dtype=dtype, device="cpu")
    # Pinned memory lets the copy run behind the launch instead of before it.
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
