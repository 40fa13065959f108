"""Checkpoints of safetensors files: the place of each tensor's bytes, and edited copies.

A safetensors file is eight bytes that tell the length of a header, the header, which gives every
tensor's dtype, shape and place, and the tensors' bytes, little-endian.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from curvfast.errors import StorageError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class TensorPlace:
    """File, offset, dtype and shape of a tensor in a checkpoint."""

    file: str
    dtype: str
    """Torch's name for a float of 16 to 64 bits; otherwise that of safetensors."""
    shape: tuple[int, ...]
    start: int
    stop: int

    def row(self, index: int) -> TensorPlace:
        """Return the place of one slice along the first axis."""
        size = (self.stop - self.start) // self.shape[0]
        start = self.start + index * size
        return replace(self, shape=self.shape[1:], start=start, stop=start + size)

    def read(self, folder: Path) -> bytes:
        """Return the bytes.

        Raises:
            StorageError: If they cannot be read.
        """
        try:
            with (folder / self.file).open("rb") as file:
                file.seek(self.start)
                return file.read(self.stop - self.start)
        except OSError as error:
            raise StorageError(f"{str(folder / self.file)!r} cannot be read: {error}") from error

    def overwrite(self, folder: Path, content: bytes) -> None:
        """Replace the bytes by as many others, in place: in a copy that :func:`copied` made."""
        with (folder / self.file).open("r+b") as file:
            file.seek(self.start)
            file.write(content)


def tensor_places(directory: str | PathLike[str]) -> dict[str, TensorPlace]:
    """Return where each tensor of a checkpoint is, by its name there.

    Raises:
        StorageError: If it is no checkpoint of safetensors, or damaged.
    """
    folder = Path(directory)
    try:
        if (folder / _INDEX).is_file():
            index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            files = sorted({Path(file).name for file in index["weight_map"].values()})
        elif (folder / _SINGLE).is_file():
            files = [_SINGLE]
        else:
            raise StorageError(
                f"{str(folder)!r} holds neither {_SINGLE} nor {_INDEX}: pass a folder that "
                "save_pretrained wrote; a checkpoint of .bin files is to be loaded and saved anew"
            )
        return {name: place for file in files for name, place in _places(folder, file)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"the checkpoint in {str(folder)!r} cannot be read: {error}") from error


@contextmanager
def copied(source: str | PathLike[str], target: str | PathLike[str]) -> Iterator[Path]:
    """Copy a folder to ``target`` when the block, which may change the copy, ends without error.

    Args:
        source: The folder; links in it are copied as what they point to.
        target: A folder that is not there yet; or ``source``, which is then replaced.

    Yields:
        The copy, beside its place.

    Raises:
        StorageError: If ``target`` is there, or cannot be written; ``source`` is then as it was.
    """
    old, new = Path(source).resolve(), Path(target).resolve()
    if new != old and (new.exists() or new.is_relative_to(old)):
        raise StorageError(f"{str(target)!r} is there, or in {str(source)!r}: pass a new folder")
    mark = f"{os.getpid()}-{secrets.token_hex(4)}"
    partial = new.with_name(f".partial-{mark}-{new.name}")
    try:
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(old, partial)
        yield partial
        _settle(partial, new, new.with_name(f".old-{mark}-{new.name}"))
    except OSError as error:
        raise StorageError(
            f"could not write {str(target)!r}: {error}. {str(source)!r} is whole; check the "
            "disk's free space and permissions"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _settle(partial: Path, final: Path, aside: Path) -> None:
    """Rename a folder; an existing one of that name is moved aside first, and removed last."""
    there = final.exists()
    if there:
        final.rename(aside)
    try:
        partial.rename(final)
    except OSError:
        if there:
            aside.rename(final)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _places(folder: Path, file: str) -> Iterator[tuple[str, TensorPlace]]:
    with (folder / file).open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        size = os.fstat(opened.fileno()).st_size
        if length > size:
            raise ValueError(f"{file} is no safetensors file, or cut short")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        if stop > size:
            raise ValueError(f"{file} is cut short")
        dtype = _DTYPES.get(entry["dtype"], entry["dtype"])
        yield name, TensorPlace(file, dtype, tuple(entry["shape"]), start, stop)
