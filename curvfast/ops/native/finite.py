"""Whether rows are finite, by the native core: each is read once, and never cast."""

from __future__ import annotations

import torch
from torch import Tensor

from curvfast.ops.native import extension
from curvfast.ops.native.second_moment import counted, offsets_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def refusal(x: Tensor, rows: Tensor | None) -> str | None:
    """Return why these rows cannot be read here, or None."""
    if x.dtype not in DTYPES or x.device.type != "cpu" or x.stride(-1) != 1:
        return "only float rows on a CPU, each row's features side by side"
    return None


def all_finite(x: Tensor, rows: Tensor | None) -> bool:
    """As :func:`curvfast.ops.all_finite`, in C++."""
    index = counted(x, rows)
    if not index.numel():
        return True
    workers = torch.get_num_threads()
    return extension.finite_rows(x, x.shape[-1], offsets_of(x, index), workers)
