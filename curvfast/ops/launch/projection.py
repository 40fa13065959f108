"""Host side of the staircase kernels: the banded part of a projection in two launches."""

from __future__ import annotations

import torch
from torch import Tensor

from curvfast.ops.launch.availability import arch, interpreting, launching, refuses_device
from curvfast.ops.projection import ProjectionRequest, banded, staircase_split

DEFAULT_PRECISION = "tf32x3"


def refusal(call: ProjectionRequest) -> str | None:
    """Return why the kernels cannot take this projection, or None."""
    if call.weight.dtype != torch.float32:
        return f"the kernels project float32 weights, not {call.weight.dtype}"
    return refuses_device(call.weight.device)


def project(call: ProjectionRequest) -> Tensor:
    """Evaluate the plan: whole products by torch, those with the staircase by the kernels."""
    if call.plan.dense:
        return banded(call)
    precision = call.precision or DEFAULT_PRECISION

    def expand_contract(t: Tensor, v: Tensor, widths: Tensor) -> Tensor:
        return _expand_contract(t, v, widths, precision)

    return staircase_split(call, expand_contract)


def _expand_contract(t: Tensor, v: Tensor, widths: Tensor, precision: str) -> Tensor:
    from curvfast.kernels import tiling
    from curvfast.kernels.staircase import contract, expand

    tiles = tiling.INTERPRETED_STAIRCASE if interpreting() else tiling.staircase(arch(t), precision)
    (rows, n), columns = t.shape, v.shape[1]
    kept = widths.clamp_max(columns)
    counts = -(-kept[:: tiles.block_m] // tiles.block_n)
    first = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    y = torch.zeros(rows, n, dtype=t.dtype, device=t.device)
    if int(first[-1]) == 0:
        return y
    c = torch.empty(rows, columns, dtype=t.dtype, device=t.device)
    device_widths = kept.int().to(t.device)
    options = {
        "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k,
        "PRECISION": precision, "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip
    with launching(t):
        expand[(int(first[-1]),)](
            t, v, c, device_widths, first.int().to(t.device), rows, n, columns, *t.stride(),
            *v.stride(), len(counts), **options,
        )  # fmt: skip
        contract[len(counts), -(-n // tiles.block_n)](
            c, v, y, device_widths, rows, n, columns, *v.stride(), **options
        )
    return y
