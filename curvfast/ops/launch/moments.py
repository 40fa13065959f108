"""Host side of the second-moment kernels: supported calls, and launches."""

from __future__ import annotations

import torch
from torch import Tensor

from curvfast.ops.launch.availability import arch, interpreting, launching, refuses_device
from curvfast.ops.packed_symmetric import TriangularSum
from curvfast.ops.requests import MomentRequest, MomentTraits

_HALF = (torch.bfloat16, torch.float16)
_TILES = (16, 32, 64, 128)
# Rows in one launch: a longer float32 sum in registers would lose accuracy.
_LAUNCH_ROWS = 1 << 15
DEFAULT_PRECISION = "bf16x4"


def refusal(call: MomentTraits) -> str | None:
    """Return the reason why the kernels cannot take this second moment, or None."""
    elsewhere = refuses_device(call.device)
    if elsewhere:
        return elsewhere
    if call.dtype not in (*_HALF, torch.float32):
        return f"the kernels take bfloat16, float16 and float32 rows, not {call.dtype}"
    for dtype, width in call.sums:
        if dtype != torch.float32 or width not in _TILES:
            return (
                f"the kernels add to float32 sums of tiles 16 to 128 wide, this one is {dtype} and "
                f"{width} wide; make it with ops.new_sum(device=...)"
            )
    if call.precision and call.dtype != torch.float32:
        return f"precision={call.precision!r} is of float32 rows, these are {call.dtype}"
    if not call.rows_fit_32_bits:
        return "the kernels number rows in 32 bits; add fewer than 2^31 of them at a time"
    return None


def second_moment_(call: MomentRequest) -> None:
    """Add the products of the counted rows, by the kernel for whole or for chosen rows."""
    if call.x.shape[:-1].numel() == 0:
        return
    if _describable(call):
        _whole_rows(call)
    else:
        _chosen_rows(call)


def _describable(call: MomentRequest) -> bool:
    """Return whether all rows count and the tensor memory accelerator can load x in place."""
    plain = call.rows is None and call.lengths is None and call.weights is None
    if not plain or call.also is not None or arch(call.x) < 90:
        return False
    if call.x.dtype == torch.float32:
        # The parts are copied and aligned; only a width of no whole 16 bytes prevents it.
        return (call.precision or DEFAULT_PRECISION) == "bf16x4" and call.d % 8 == 0
    strides = call.x.stride()
    aligned = all(s > 0 and s * call.x.element_size() % 16 == 0 for s in strides[:-1])
    return strides[-1] == 1 and aligned and call.x.data_ptr() % 16 == 0


def _whole_rows(call: MomentRequest) -> None:
    if call.x.dtype == torch.float32:
        for rows in call.x.flatten(0, -2).split(_LAUNCH_ROWS):
            high = rows.to(torch.bfloat16)
            parts = torch.stack([high, (rows - high.float()).to(torch.bfloat16)])
            _launch_tiles(call.out, parts, call.scale, "parts")
    elif call.x.dim() == 2:
        for rows in call.x.split(_LAUNCH_ROWS):
            _launch_tiles(call.out, rows, call.scale, "rows")
    else:
        length = max(1, call.x.shape[1])
        for sequences in call.x.split(max(1, _LAUNCH_ROWS // length)):
            _launch_tiles(call.out, sequences, call.scale, "sequences")


def _launch_tiles(out: TriangularSum, x: Tensor, scale: float, layout: str) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    from curvfast.kernels import tiling
    from curvfast.kernels.second_moment import second_moment_tiles
    from curvfast.kernels.triangle import tiles_to_compute

    length = x.shape[-2]
    steps = {"rows": length, "parts": 4 * length, "sequences": x.shape[:-1].numel()}[layout]
    chosen = (
        tiling.interpreted(steps, paired=_panels(out) % 3 > 0)
        if interpreting()
        else tiling.whole_rows(out.d, steps, arch(x))
    )
    lead = [] if layout == "rows" else [1]
    columns = out.width * (2 if chosen.paired else 1)
    left, right = (
        TensorDescriptor.from_tensor(x, [*lead, chosen.block_k, width])
        for width in (out.width, columns)
    )
    target = out.tiles
    if chosen.splits > 1:
        target = _workspace(out, chosen.splits)
    programs = tiles_to_compute(_panels(out), chosen.paired)
    with launching(x):
        second_moment_tiles[programs, chosen.splits](
            left, right, TensorDescriptor.from_tensor(target, [out.width, out.width]), scale,
            x.shape[0], length, _panels(out), chosen.splits,
            TILE=out.width, BLOCK_K=chosen.block_k, PAIRED=chosen.paired, LAYOUT=layout,
            SPLIT=chosen.splits > 1, UPCAST=interpreting(),
            num_warps=chosen.warps, num_stages=chosen.stages,
        )  # fmt: skip
    if chosen.splits > 1:
        _add_partial_sums(out, target, scale, chosen.splits)


def _chosen_rows(call: MomentRequest) -> None:
    from curvfast.kernels import tiling
    from curvfast.kernels.second_moment_rows import second_moment_rows
    from curvfast.kernels.triangle import tiles_to_compute

    x, out = call.x, call.out
    precision = "native"
    if x.dtype == torch.float32:
        precision = call.precision or DEFAULT_PRECISION
    total = x.shape[:-1].numel() if call.rows is None else call.rows.numel()
    two = call.also is not None
    chosen = (
        tiling.interpreted(total, parts=2 if two else 1)
        if interpreting()
        else tiling.chosen_rows(out.d, total, arch(x), precision, two)
    )
    split = chosen.splits > 1
    target, also = out.tiles, None if call.also is None else call.also.tiles
    if split:
        target = _workspace(out, chosen.splits)
        also = None if call.also is None else _workspace(out, chosen.splits)
    strides = x.stride() if x.dim() == 3 else (0, *x.stride())
    programs = tiles_to_compute(_panels(out), False) * chosen.parts
    with launching(x):
        second_moment_rows[programs, chosen.splits](
            x, call.rows, call.lengths, _flat(call.weights), _flat(call.also_weights), target, also,
            call.scale, total, x.shape[1] if x.dim() == 3 else 1, out.d, *strides, chosen.splits,
            _panels(out),
            TILE=out.width, PARTS=chosen.parts, BLOCK_K=chosen.block_k, SEQUENCES=x.dim() == 3,
            INDEX=call.rows is not None, LENGTHS=call.lengths is not None,
            WEIGHTS=call.weights is not None, ALSO=two, PRECISION=precision, SPLIT=split,
            UPCAST=interpreting(), num_warps=chosen.warps, num_stages=chosen.stages,
        )  # fmt: skip
    if split:
        _add_partial_sums(out, target, call.scale, chosen.splits)
        if call.also is not None and also is not None:
            _add_partial_sums(call.also, also, call.scale, chosen.splits)


def _workspace(out: TriangularSum, splits: int) -> Tensor:
    return torch.empty(
        splits * out.tiles.shape[0], out.width, dtype=torch.float32, device=out.tiles.device
    )


def _add_partial_sums(out: TriangularSum, partial: Tensor, scale: float, splits: int) -> None:
    from curvfast.kernels.partial_sums import add_partial_sums

    values, block = out.tiles.numel(), 1024
    with launching(partial):
        add_partial_sums[(-(-values // block),)](
            partial, out.tiles, scale, values, splits, BLOCK=block
        )  # fmt: skip


def _panels(out: TriangularSum) -> int:
    return -(-out.d // out.width)


def _flat(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.flatten().float().contiguous()
