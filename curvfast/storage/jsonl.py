"""Append-only JSON-lines files, whose unfinished last line is dropped, and their versions."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

from curvfast.errors import FormatError, StorageError


def append_line(path: str | PathLike[str], line: str) -> None:
    """Append a line to a file; it is on the disk when this returns.

    The end of a line that a killed writer left unfinished is removed first.

    Args:
        path: Made, with its folder, if missing.
        line: Without its end.

    Raises:
        StorageError: If it cannot be written; what was there is untouched.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("a+b") as file:
            _drop_unfinished(file)
            file.write(f"{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(
            f"could not append to {str(target)!r}: {error}; check the disk's free space and "
            "permissions"
        ) from error


def finished_lines(path: str | PathLike[str]) -> list[bytes]:
    """Return the finished lines of a file, without their ends; none if there is no file.

    Raises:
        StorageError: If it cannot be read.
    """
    target = Path(path)
    if not target.exists():
        return []
    try:
        written = target.read_bytes()
    except OSError as error:
        raise StorageError(f"{str(target)!r} cannot be read: {error}") from error
    return written[: _length_of_finished(written)].splitlines()


def record_of(line: bytes, where: str, kind: str, version: int) -> dict[str, Any]:
    """Return the JSON object of a line, after checking its kind and version.

    Args:
        line: A line of a file whose records, or the first of them, have a kind and a version.
        where: Name of the line in messages.
        kind: The kind it must have.
        version: The newest version that can be read.

    Raises:
        FormatError: If it is no JSON object, of another kind, or of a newer version.
    """
    try:
        found: dict[str, Any] = json.loads(line)
        there, number = found["kind"], int(found["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{where} is no record of {kind!r}: {error}") from error
    if there != kind or number > version:
        raise FormatError(
            f"{where} is {there!r} of version {number}; this curvfast reads {kind!r} up to version "
            f"{version}: update it, or pass the file that was meant"
        )
    return found


def _drop_unfinished(file: BinaryIO) -> None:
    if file.seek(0, os.SEEK_END) == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(_length_of_finished(file.read()))


def _length_of_finished(written: bytes) -> int:
    return written.rfind(b"\n") + 1


def require_version(content: Mapping[str, Any], kind: str, version: int) -> None:
    """Raise if a file's JSON is of another version.

    Raises:
        FormatError: If it is not of ``version``.
    """
    found = content.get("version")
    if found != version:
        raise FormatError(f"version {found} of {kind}; this curvfast reads {version}: upgrade it")
