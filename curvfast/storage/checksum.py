"""The bytes of tensors, and their checksums."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch
from torch import Tensor


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, in row-major order."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


def checksum(tensors: Iterable[Tensor]) -> int:
    """Return the CRC-32 of the bytes of tensors, one after another."""
    found = 0
    for tensor in tensors:
        found = zlib.crc32(raw_bytes(tensor), found)
    return found
