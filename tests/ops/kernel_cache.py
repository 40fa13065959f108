"""What was found in machine code, kept by everything that decides it, and checked when read."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def digest(*parts: object) -> str:
    """Return the SHA-256 of JSON-able values, in hexadecimal."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def kept(folder: Path, key: str) -> dict[str, Any] | None:
    """Return what was found under a key; None where nothing was, or where it is damaged."""
    try:
        record = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
        found: dict[str, Any] = record["found"]
        return found if record["sha256"] == digest(key, found) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(folder: Path, key: str, found: dict[str, Any]) -> None:
    """Write what was found; the file is the old one or the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".partial-{key}-{os.getpid()}"
    partial.write_text(json.dumps({"found": found, "sha256": digest(key, found)}), encoding="utf-8")
    os.replace(partial, folder / f"{key}.json")
