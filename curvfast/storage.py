"""Folders of tensors on disk: versioned, written atomically, in one file or one a part.

``config.json`` names every tensor file with its size, SHA-256 and keys, and is replaced last: a
folder is either the old state or the new one, whenever the writer is killed. A folder holds:

* ``config.json``: {"kind", "format_version", "curvfast_version", "files": [{"file", "bytes",
  "sha256", "keys"}], "meta_sha256", ...meta}
* ``tensors-<first 16 digits of the hash>.safetensors``, one or more
"""

from __future__ import annotations

import hashlib
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

FORMAT_VERSION = 1
_CONFIG = "config.json"
_RESERVED = ("kind", "format_version", "curvfast_version", "files", "meta_sha256")


class FolderWriter:
    """Writes a folder part by part; nothing of it counts until :meth:`finish`."""

    def __init__(self, directory: str | PathLike[str], kind: str) -> None:
        """Make the folder if it is missing.

        Raises:
            StorageError: If it cannot be made.
        """
        self._folder, self._kind = Path(directory), kind
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
            kept = {name for name in _named_files(self._folder)}
            self._remove({record["file"] for record in self._records} - kept)

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write one part.

        Args:
            tensors: By key, unique in the folder; stored on CPU, contiguous.

        Raises:
            StorageError: If it cannot be written; nothing saved before is lost.
        """
        from safetensors.torch import save_file

        partial = _scratch(self._folder)
        try:
            save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, partial)
            digest = _sha256(partial)
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
        """Write ``config.json`` and remove the files of an earlier state.

        Args:
            meta: JSON-able; must not use the reserved keys.

        Raises:
            StorageError: If it cannot be written; nothing saved before is lost.
        """
        head: dict[str, Any] = {
            "kind": self._kind, "format_version": FORMAT_VERSION, "curvfast_version": __version__,
            "files": self._records, "meta_sha256": _meta_sha256(meta, self._records),
        }  # fmt: skip
        try:
            write_json(self._folder / _CONFIG, {**head, **meta})
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


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a folder, each read when asked for; a file is checked at its first use."""

    def __init__(self, folder: Path, records: list[dict[str, Any]]) -> None:
        """Note where each tensor is."""
        self._folder = folder
        self._records = {key: record for record in records for key in record["keys"]}
        self._checked: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        """Read one tensor.

        Raises:
            StorageError: If its file is missing or damaged.
        """
        from safetensors import SafetensorError, safe_open

        record = self._records[key]
        path = self._folder / Path(record["file"]).name
        if record["file"] not in self._checked:
            _check(path, record)
            self._checked.add(record["file"])
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise StorageError(f"{str(path)!r} cannot be read: {error}") from error
        return tensor

    def __iter__(self) -> Any:
        """Iterate over keys."""
        return iter(self._records)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._records)


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


def read_folder(
    directory: str | PathLike[str], *, kind: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a whole folder, every byte checked.

    Returns:
        Metadata and tensors.

    Raises:
        StorageError: If the folder is missing, of another kind or a newer format, or damaged.
    """
    meta, stored = open_folder(directory, kind=kind)
    return meta, dict(stored.items())


def open_folder(
    directory: str | PathLike[str], *, kind: str
) -> tuple[dict[str, Any], StoredTensors]:
    """Read a folder's metadata; its tensors are read, and their files checked, when asked for.

    Returns:
        Metadata and tensors.

    Raises:
        StorageError: If the folder is missing, of another kind or a newer format, or damaged.
    """
    folder = Path(directory)
    config = _read_config(folder, kind)
    for record in config["files"]:
        path = folder / Path(record["file"]).name
        if not path.is_file():
            raise StorageError(f"{str(path)!r} is missing: the folder was copied in part")
        if path.stat().st_size != record["bytes"]:
            raise StorageError(f"{str(path)!r} is damaged: it is not as long as what was written")
    meta = {key: value for key, value in config.items() if key not in _RESERVED}
    return meta, StoredTensors(folder, config["files"])


def write_json(path: str | PathLike[str], value: Any) -> None:
    """Write ``value`` as JSON; the file is either the old one or the whole new one."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _scratch(target.parent)
    try:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _read_config(folder: Path, kind: str) -> dict[str, Any]:
    path = folder / _CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StorageError(f"no {_CONFIG} in {str(folder)!r}: not a folder of {kind}") from error
    except (OSError, ValueError) as error:
        raise StorageError(f"{str(path)!r} cannot be read: {error}") from error
    found = config.get("kind") if isinstance(config, dict) else None
    if found != kind:
        raise StorageError(f"{str(folder)!r} holds {found or 'something else'}, not {kind}")
    version = config.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise StorageError(
            f"{str(folder)!r} is format {version} of {kind}; this curvfast {__version__} reads up "
            f"to {FORMAT_VERSION}: upgrade curvfast"
        )
    meta = {key: value for key, value in config.items() if key not in _RESERVED}
    if config.get("meta_sha256") != _meta_sha256(meta, config.get("files", [])):
        raise StorageError(f"{str(path)!r} is damaged or was edited: its checksum does not fit")
    found_config: dict[str, Any] = config
    return found_config


def _check(path: Path, record: Mapping[str, Any]) -> None:
    try:
        whole = path.stat().st_size == record["bytes"] and _sha256(path) == record["sha256"]
    except OSError as error:
        raise StorageError(f"{str(path)!r} is missing: the folder was copied in part") from error
    if not whole:
        raise StorageError(f"{str(path)!r} is damaged: its bytes differ from what was written")


def _named_files(folder: Path) -> list[str]:
    """Return the files the folder's current state names."""
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        return [record["file"] for record in config["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _meta_sha256(meta: Mapping[str, Any], records: list[dict[str, Any]]) -> str:
    whole = json.dumps([dict(meta), records], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


def _scratch(folder: Path) -> Path:
    return folder / f".partial-{os.getpid()}-{secrets.token_hex(4)}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
