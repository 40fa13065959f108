"""Lazy reading of text files, compressed or not, and facts that identify a file."""

from __future__ import annotations

import hashlib
import lzma
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from curvfast.errors import InputError

_COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "compression.zstd"}
# Some editors write a byte order mark, which is not text.
_ENCODING = "utf-8-sig"
_HASHED_BYTES = 1 << 24


def plain_suffix(path: Path) -> str:
    """Return the suffix under a compression: ``.jsonl`` of ``shard.jsonl.gz``."""
    compressed = path.suffix.lower() in _COMPRESSED
    return (path.with_suffix("") if compressed else path).suffix.lower()


def decompressor(path: Path) -> ModuleType | None:
    """Return the standard library's module that opens ``path``, or None if it is plain.

    Raises:
        InputError: If this Python has none.
    """
    module = _COMPRESSED.get(path.suffix.lower())
    try:
        return None if module is None else import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{str(path)!r} cannot be decompressed: this Python has no {module} (.zst needs 3.14). "
            "Decompress it, or pass a datasets.Dataset of it"
        ) from error


def lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file with their ends, decompressed as they are read.

    Raises:
        InputError: If it cannot be read, is cut short, or is not UTF-8.
    """
    module = decompressor(path)
    try:
        if module is None:
            opened = path.open(encoding=_ENCODING)
        else:
            opened = module.open(path, "rt", encoding=_ENCODING)
        with opened as file:
            yield from file
    except UnicodeDecodeError as error:
        raise InputError(
            f"{str(path)!r} is not UTF-8 text ({error}): convert it, or leave it out"
        ) from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{str(path)!r} cannot be read to its end: {error}") from error


def file_facts(path: Path) -> dict[str, Any]:
    """Return path, bytes, and a version: SHA-256 of small files, else the modification time.

    A file that was deleted after it was read is reported as such, without an error.
    """
    facts: dict[str, Any] = {"path": path.as_posix()}
    try:
        status = path.stat()
        facts["bytes"] = status.st_size
        if status.st_size > _HASHED_BYTES:
            return {**facts, "modified": datetime.fromtimestamp(status.st_mtime, UTC).isoformat()}
        with path.open("rb") as file:
            return {**facts, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError as error:
        return {**facts, "unreadable": str(error)}
