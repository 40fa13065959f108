"""The format of stored folders: version, reserved names, and checksums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
