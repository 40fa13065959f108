"""Bindings of the extension ``curvfast._cuda``, which takes addresses and a stream.

Everything runs asynchronously on torch's current stream of the tensors' device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvfast.ops.native import extension

try:
    from curvfast import _cuda
except ImportError as _error:
    _reason: str | None = f"the CUDA extension is not built ({_error}); reinstall where nvcc is"
else:
    _reason = None


def unavailable() -> str | None:
    """Return the reason why the CUDA extension cannot be used, or None."""
    return extension.switched_off() or _reason


def pack(matrix: Tensor, tiles: Tensor) -> None:
    """As :func:`curvfast.ops.native.extension.pack`, on the GPU."""
    _launch(
        _cuda.pack, tiles, matrix.data_ptr(), len(matrix), tiles.data_ptr(), tiles.numel(),
        tiles.shape[1],
    )  # fmt: skip


def unpack(tiles: Tensor, matrix: Tensor) -> None:
    """As :func:`curvfast.ops.native.extension.unpack`, on the GPU."""
    _launch(
        _cuda.unpack, tiles, tiles.data_ptr(), tiles.numel(), tiles.shape[1], matrix.data_ptr(),
        len(matrix),
    )  # fmt: skip


def mirror_(matrix: Tensor) -> None:
    """As :func:`curvfast.ops.native.extension.mirror_`, on the GPU."""
    _launch(_cuda.mirror, matrix, matrix.data_ptr(), matrix.numel(), len(matrix))


def scale_(tiles: Tensor, factor: float) -> None:
    """As :func:`curvfast.ops.native.extension.scale_`, on the GPU."""
    _launch(_cuda.scale, tiles, tiles.data_ptr(), tiles.numel(), factor)


def _launch(function: Callable[..., None], tensor: Tensor, *arguments: float) -> None:
    with torch.cuda.device(tensor.device):
        stream = torch.cuda.current_stream(tensor.device).cuda_stream
        function(*arguments, torch.finfo(tensor.dtype).bits, stream)
