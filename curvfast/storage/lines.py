"""Files of lines that are only appended to; what a killed writer left unfinished is dropped."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from curvfast.errors import StorageError


def append_line(path: str | PathLike[str], line: str) -> None:
    """Add a line to a file, on the disk when this returns.

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


def _drop_unfinished(file: BinaryIO) -> None:
    if file.seek(0, os.SEEK_END) == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(_length_of_finished(file.read()))


def _length_of_finished(written: bytes) -> int:
    return written.rfind(b"\n") + 1
