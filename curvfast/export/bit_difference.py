"""Exact, invertible differences of the bits of floating-point tensors.

Read as integers in the order of the numbers they represent, bits of close floats differ little.
These integers are subtracted modulo 2ⁿ, so either tensor and the difference give the other exactly,
NaN, infinities and both zeros included. A small difference of either sign becomes a small natural
number, and bytes are kept apart by significance: those that are mostly zero deflate to little.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from curvfast.errors import StorageError

Bits = npt.NDArray[Any]
"""Unsigned integers of 16, 32 or 64 bits."""
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(tensor: Tensor) -> Bits:
    """Return the bits of a float tensor as unsigned integers of its width, flat, on the CPU."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    width = flat.element_size()
    return flat.view(_INTEGERS[width]).numpy().view(f"u{width}")


def with_bits(like: Tensor, bits: Bits) -> Tensor:
    """Return a tensor of the shape, dtype and device of ``like`` that has these bits."""
    signed = torch.from_numpy(bits.view(f"i{bits.itemsize}"))
    return signed.view(like.dtype).view(like.shape).to(like.device)


def difference(before: Bits, after: Bits) -> Bits:
    """Return the difference that leads from ``before`` to ``after``: small where they are close.

    Args:
        before: Bits of floats, [n].
        after: Likewise, of the same width.

    Returns:
        Naturals of that width, [n]: 2k for k units up, 2k - 1 for k units down.
    """
    steps = _ordered(after) - _ordered(before)
    folded: Bits = (steps << 1) ^ -(steps >> _top(steps))
    return folded


def forward(before: Bits, change: Bits) -> Bits:
    """Add a :func:`difference` to ``before``; returns ``after``."""
    return _ordered(_ordered(before) + _steps(change))


def backward(after: Bits, change: Bits) -> Bits:
    """Subtract a :func:`difference` from ``after``; returns ``before``."""
    return _ordered(_ordered(after) - _steps(change))


def compress(change: Bits) -> list[bytes]:
    """Return planes of bytes of equal significance, the lowest first, deflated if shorter."""
    planes = change.astype(change.dtype.newbyteorder("<"), copy=False).view(np.uint8)
    return [_deflated(planes[i :: change.itemsize].tobytes()) for i in range(change.itemsize)]


def decompress(planes: Sequence[bytes], count: int) -> Bits:
    """Return the ``count`` naturals that :func:`compress` was given.

    Raises:
        StorageError: If the bytes are damaged.
    """
    width = len(planes)
    whole = np.empty((count, width), np.uint8)
    for i, plane in enumerate(planes):
        raw = _inflated(plane, count)
        if len(raw) != count:
            raise StorageError(f"a difference is damaged: {len(raw)} bytes for {count} numbers")
        whole[:, i] = np.frombuffer(raw, np.uint8)
    return whole.reshape(-1).view(f"<u{width}").astype(f"u{width}", copy=False)


def _ordered(bits: Bits) -> Bits:
    """Return bits as integers, modulo 2ⁿ, in the order of the floats; its own inverse."""
    magnitude = -(bits >> _top(bits)) >> 1
    ordered: Bits = bits ^ magnitude
    return ordered


def _steps(change: Bits) -> Bits:
    steps: Bits = (change >> 1) ^ -(change & 1)
    return steps


def _top(bits: Bits) -> int:
    return 8 * bits.itemsize - 1


def _deflated(plane: bytes) -> bytes:
    # Bytes of floats do not repeat as text does: run lengths and Huffman codes suffice.
    squeeze = zlib.compressobj(strategy=zlib.Z_RLE)
    packed = squeeze.compress(plane) + squeeze.flush()
    return packed if len(packed) < len(plane) else plane


def _inflated(plane: bytes, count: int) -> bytes:
    # A plane of full length was stored uncompressed.
    if len(plane) == count:
        return plane
    stream = zlib.decompressobj()
    try:
        # One byte too many is enough to detect a damaged stream of excessive length.
        raw = stream.decompress(plane, count + 1)
    except zlib.error as error:
        raise StorageError(f"a difference is damaged: {error}") from error
    if len(raw) == count and not stream.eof:
        raise StorageError("a difference is damaged: it is cut short")
    return raw
