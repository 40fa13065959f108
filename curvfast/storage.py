"""Folders of tensors on disk: versioned, written atomically.

``config.json`` names the tensor file with its size and SHA-256 and is replaced last, so a folder is
either the old state or the new one, whenever the writer is killed. A folder holds:

* ``config.json``: {"kind", "format_version", "curvfast_version", "tensors": {"file", "bytes",
  "sha256"}, "meta_sha256", ...meta}
* ``tensors-<first 16 digits of the hash>.safetensors``
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from curvfast._version import __version__
from curvfast.errors import StorageError

FORMAT_VERSION = 1
_CONFIG = "config.json"
_RESERVED = ("kind", "format_version", "curvfast_version", "tensors", "meta_sha256")


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
    from safetensors.torch import save_file

    folder = Path(directory)
    partial: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = _scratch(folder)
        save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, partial)
        digest = _sha256(partial)
        final = folder / f"tensors-{digest[:16]}.safetensors"
        size = partial.stat().st_size
        os.replace(partial, final)
        record = {"file": final.name, "bytes": size, "sha256": digest}
        head: dict[str, Any] = {
            "kind": kind,
            "format_version": FORMAT_VERSION,
            "curvfast_version": __version__,
        }
        head |= {"tensors": record, "meta_sha256": _meta_sha256(meta)}
        write_json(folder / _CONFIG, {**head, **meta})
    except OSError as error:
        raise StorageError(
            f"could not write {kind} to {str(folder)!r}: {error}. What was there before is "
            "untouched; check the disk's free space and permissions"
        ) from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)
    for stale in folder.glob("tensors-*.safetensors"):
        if stale != final:
            stale.unlink(missing_ok=True)


def read_folder(
    directory: str | PathLike[str], *, kind: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what :func:`write_folder` wrote, every byte checked.

    Returns:
        Metadata and tensors.

    Raises:
        StorageError: If the folder is missing, of another kind or a newer format, or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(directory)
    config = _read_config(folder, kind)
    record = config["tensors"]
    path = folder / Path(record["file"]).name
    if not path.is_file():
        raise StorageError(f"{str(path)!r} is missing: the folder was copied or written in part")
    if path.stat().st_size != record["bytes"] or _sha256(path) != record["sha256"]:
        raise StorageError(f"{str(path)!r} is damaged: its bytes differ from what was written")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise StorageError(f"{str(path)!r} is not a safetensors file: {error}") from error
    return {key: value for key, value in config.items() if key not in _RESERVED}, tensors


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
    if config.get("meta_sha256") != _meta_sha256(meta) or "tensors" not in config:
        raise StorageError(f"{str(path)!r} is damaged or was edited: its checksum does not fit")
    found_config: dict[str, Any] = config
    return found_config


def _meta_sha256(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _scratch(folder: Path) -> Path:
    return folder / f".partial-{os.getpid()}-{secrets.token_hex(4)}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
