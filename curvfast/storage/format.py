"""The format of stored folders: version, reserved names, and checksums of tensors."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT_VERSION = 1
CONFIG = "config.json"
RESERVED = ("kind", "format_version", "curvfast_version", "files", "meta_sha256")


def meta_sha256(meta: Mapping[str, Any], records: list[dict[str, Any]]) -> str:
    """Return the checksum of a folder's metadata and its list of files."""
    whole = json.dumps([dict(meta), records], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


def sha256(path: Path) -> str:
    """Return the checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
