"""Atomic writing of folders: each file is written aside, then renamed; ``config.json`` last."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from curvfast._version import __version__
from curvfast.errors import StorageError
from curvfast.storage.format import CONFIG, FORMAT_VERSION, meta_sha256, sha256


class FolderWriter:
    """Writes a folder part by part; it becomes valid with :meth:`finish`."""

    def __init__(self, directory: str | PathLike[str], kind: str, *, index: str = CONFIG) -> None:
        """Make the folder if it is missing.

        Args:
            directory: The folder.
            kind: Kind of the content; checked on reading.
            index: The file that is replaced last, where ``config.json`` has another use.

        Raises:
            StorageError: If it cannot be made.
        """
        self._folder, self._kind, self._index = Path(directory), kind, index
        self._records: list[dict[str, Any]] = []
        self._finished = False
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._failure(error) from error

    def __enter__(self) -> FolderWriter:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove what was written if it was not finished."""
        if not self._finished:
            kept = {name for name in _named_files(self._folder / self._index)}
            self._remove({record["file"] for record in self._records} - kept)

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write one part.

        Args:
            tensors: By key, unique in the folder; stored on CPU, contiguous.

        Raises:
            StorageError: If it cannot be written; nothing saved before is lost.
        """
        partial = _scratch(self._folder)
        try:
            _save(tensors, partial)
            digest = sha256(partial)
            final = self._folder / f"tensors-{digest[:16]}.safetensors"
            size = partial.stat().st_size
            os.replace(partial, final)
        except OSError as error:
            raise self._failure(error) from error
        finally:
            partial.unlink(missing_ok=True)
        record = {"file": final.name, "bytes": size, "sha256": digest, "keys": list(tensors)}
        self._records.append(record)

    def finish(self, meta: Mapping[str, Any]) -> None:
        """Write the index and remove the files of an earlier state.

        Args:
            meta: JSON-able; must not use the reserved keys.

        Raises:
            StorageError: If it cannot be written; nothing saved before is lost.
        """
        head: dict[str, Any] = {
            "kind": self._kind, "format_version": FORMAT_VERSION, "curvfast_version": __version__,
            "files": self._records, "meta_sha256": meta_sha256(meta, self._records),
        }  # fmt: skip
        try:
            write_json(self._folder / self._index, {**head, **meta})
        except OSError as error:
            raise self._failure(error) from error
        self._finished = True
        stale = {path.name for path in self._folder.glob("tensors-*.safetensors")}
        self._remove(stale - {record["file"] for record in self._records})

    def _remove(self, names: set[str]) -> None:
        for name in names:
            (self._folder / name).unlink(missing_ok=True)

    def _failure(self, error: OSError) -> StorageError:
        return StorageError(
            f"could not write {self._kind} to {str(self._folder)!r}: {error}. What was there "
            "before is untouched; check the disk's free space and permissions"
        )


def write_folder(
    directory: str | PathLike[str],
    *,
    kind: str,
    meta: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Write tensors and metadata to ``directory``, replacing an earlier state of the same kind.

    Args:
        directory: Made if missing.
        kind: What the folder holds; checked on reading.
        meta: JSON-able; must not use the reserved keys.
        tensors: By key; stored on CPU, contiguous.

    Raises:
        StorageError: If a file cannot be written; nothing saved before is lost.
    """
    with FolderWriter(directory, kind) as writer:
        writer.add(tensors)
        writer.finish(meta)


def write_tensors(path: str | PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Write a plain safetensors file atomically."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _scratch(target.parent)
    try:
        _save(tensors, partial, {"format": "pt"})
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: str | PathLike[str], value: Any) -> None:
    """Write ``value`` as JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: str | PathLike[str], text: str) -> None:
    """Write a text file atomically."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _scratch(target.parent)
    try:
        partial.write_text(text, encoding="utf-8", newline="")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _save(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file; tensors that share memory are each written in full.

    Raises:
        OSError: If it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    seen: set[int] = set()
    whole = {}
    for key, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        memory = own.untyped_storage().data_ptr()
        whole[key] = own.clone() if memory in seen else own
        seen.add(memory)
    try:
        save_file(whole, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _named_files(index: Path) -> list[str]:
    """Return the files the folder's current state names."""
    try:
        config = json.loads(index.read_text(encoding="utf-8"))
        return [record["file"] for record in config["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _scratch(folder: Path) -> Path:
    return folder / f".partial-{os.getpid()}-{secrets.token_hex(4)}"
