"""Packing and unpacking of symmetric sums by the native core: C++, or CUDA if named."""

from __future__ import annotations

import torch
from torch import Tensor

from curvfast.ops import registry
from curvfast.ops.native import extension, extension_cuda

# Number of entries below which a second thread does not pay.
_ALONE = 1 << 22
_by_name_on_cuda = registry.unless_named("native", "no GPU has measured its copies on CUDA")
_by_name = registry.unless_named("native", "torch is as fast")


def refusal(*tensors: Tensor) -> str | None:
    """Return the reason why this backend cannot take these tensors, or None."""
    first = tensors[0]
    for tensor in tensors:
        if type(tensor) is not Tensor or tensor.requires_grad:
            return "only plain tensors that need no gradient are copied by address"
        if not tensor.is_contiguous():
            return "only matrices whose rows lie one after the other are copied"
        if tensor.dtype not in (torch.float32, torch.float64):
            return f"only float32 and float64 are copied, not {tensor.dtype}"
        if (tensor.dtype, tensor.device) != (first.dtype, first.device):
            return "the tensors differ in dtype or device"
    if first.device.type == "cuda":
        return _by_name_on_cuda() or extension_cuda.unavailable()
    if first.device.type != "cpu":
        return f"only tensors on a CPU or CUDA device are copied, not on {first.device.type}"
    return extension.unavailable()


def refusal_unless_named(*arguments: Tensor | float) -> str | None:
    """Return the reason why this backend cannot run the call, or runs it only if named; or None."""
    return _by_name() or refusal(*(a for a in arguments if isinstance(a, Tensor)))


def pack(matrix: Tensor, tiles: Tensor) -> None:
    """As :func:`curvfast.ops.reference.pack`."""
    if matrix.is_cuda:
        extension_cuda.pack(matrix, tiles)
    else:
        extension.pack(matrix, tiles, _workers(matrix))


def unpack(tiles: Tensor, matrix: Tensor) -> None:
    """As :func:`curvfast.ops.reference.unpack`."""
    if tiles.is_cuda:
        extension_cuda.unpack(tiles, matrix)
    else:
        extension.unpack(tiles, matrix, _workers(matrix))


def mirror_(matrix: Tensor) -> None:
    """As :func:`curvfast.ops.reference.mirror_`."""
    if matrix.is_cuda:
        extension_cuda.mirror_(matrix)
    else:
        extension.mirror_(matrix, _workers(matrix))


def scale_(tiles: Tensor, factor: float) -> None:
    """As :func:`curvfast.ops.reference.scale_`."""
    if tiles.is_cuda:
        extension_cuda.scale_(tiles, factor)
    else:
        extension.scale_(tiles, factor, _workers(tiles))


def _workers(tensor: Tensor) -> int:
    return 1 if tensor.numel() < _ALONE else torch.get_num_threads()
