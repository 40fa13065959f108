"""Reading of stored folders; sizes and checksums are verified before use."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from curvfast._version import __version__
from curvfast.errors import FormatError, StorageError
from curvfast.storage.format import CONFIG, FORMAT_VERSION, RESERVED, meta_sha256, sha256


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a folder, read lazily; each file is verified at its first use."""

    def __init__(self, folder: Path, records: list[dict[str, Any]]) -> None:
        """Store the place of each tensor."""
        self._folder = folder
        self._records = {key: record for record in records for key in record["keys"]}
        self._checked: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        """Read one tensor.

        Raises:
            StorageError: If its file is missing or damaged.
        """
        with self._opened(key) as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of one tensor without reading it.

        Raises:
            StorageError: If its file is missing or damaged.
        """
        with self._opened(key) as file:
            return tuple(file.get_slice(key).get_shape())

    @contextmanager
    def _opened(self, key: str) -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        record = self._records[key]
        path = self._folder / Path(record["file"]).name
        if record["file"] not in self._checked:
            _check(path, record)
            self._checked.add(record["file"])
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise StorageError(f"{str(path)!r} cannot be read: {error}") from error

    def __iter__(self) -> Any:
        """Iterate over keys."""
        return iter(self._records)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._records)


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
    directory: str | PathLike[str], *, kind: str, index: str = CONFIG
) -> tuple[dict[str, Any], StoredTensors]:
    """Read a folder's metadata; its tensors are read lazily, and their files verified then.

    Args:
        directory: The folder.
        kind: What it must hold.
        index: The file that was replaced last; ``config.json`` unless the writer named another.

    Returns:
        Metadata and tensors.

    Raises:
        StorageError: If the folder is missing, of another kind or a newer format, or damaged.
    """
    folder = Path(directory)
    config = _read_config(folder, kind, index)
    for record in config["files"]:
        path = folder / Path(record["file"]).name
        if not path.is_file():
            raise StorageError(f"{str(path)!r} is missing: the folder was copied in part")
        if path.stat().st_size != record["bytes"]:
            raise StorageError(f"{str(path)!r} is damaged: it is not as long as what was written")
    meta = {key: value for key, value in config.items() if key not in RESERVED}
    return meta, StoredTensors(folder, config["files"])


def _read_config(folder: Path, kind: str, index: str) -> dict[str, Any]:
    path = folder / index
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StorageError(f"no {index} in {str(folder)!r}: not a folder of {kind}") from error
    except (OSError, ValueError) as error:
        raise StorageError(f"{str(path)!r} cannot be read: {error}") from error
    found = config.get("kind") if isinstance(config, dict) else None
    if found != kind:
        raise FormatError(f"{str(folder)!r} holds {found or 'something else'}, not {kind}")
    version = config.get("format_version")
    if not isinstance(version, int):
        raise StorageError(f"{str(path)!r} is damaged: it names no format version")
    if version > FORMAT_VERSION:
        raise FormatError(
            f"{str(folder)!r} is format {version} of {kind}; this curvfast {__version__} reads up "
            f"to {FORMAT_VERSION}: upgrade curvfast"
        )
    meta = {key: value for key, value in config.items() if key not in RESERVED}
    if config.get("meta_sha256") != meta_sha256(meta, config.get("files", [])):
        raise StorageError(f"{str(path)!r} is damaged or was edited: its checksum does not fit")
    found_config: dict[str, Any] = config
    return found_config


def _check(path: Path, record: Mapping[str, Any]) -> None:
    try:
        whole = path.stat().st_size == record["bytes"] and sha256(path) == record["sha256"]
    except OSError as error:
        raise StorageError(f"{str(path)!r} is missing: the folder was copied in part") from error
    if not whole:
        raise StorageError(f"{str(path)!r} is damaged: its bytes differ from what was written")
