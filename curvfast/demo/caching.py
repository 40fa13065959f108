"""Trained models are kept by what their training depends on, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from curvfast.demo.fetch import cache_dir

T = TypeVar("T")


def key_of(facts: Mapping[str, Any]) -> str:
    """Return a name for JSON-able ``facts``: the first 16 hexadecimal digits of their SHA-256."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def cached(
    kind: str,
    key: str,
    *,
    read: Callable[[Path], T],
    make: Callable[[Path], T],
    write: Callable[[T, Path], None],
) -> T:
    """Return a model of an earlier run, or make it now and keep it.

    Args:
        kind: The folder of such models in the cache.
        key: The model's name there, as of :func:`key_of`.
        read: Reads it from its folder.
        make: Makes it; given a folder for what it goes on from if it is cut off, which is removed
            once the model is kept.
        write: Writes it into a folder, with a ``config.json``.

    Returns:
        What ``read`` or ``make`` returned.

    Raises:
        OSError: If the folder cannot be written.
    """
    folder = cache_dir() / kind / key
    if (folder / "config.json").is_file():
        return read(folder)
    unfinished = folder.with_name(f".unfinished-{folder.name}")
    made = make(unfinished)
    partial = folder.with_name(f".partial-{folder.name}-{os.getpid()}")
    write(made, partial)
    try:
        partial.rename(folder)
    except OSError:
        # Another run finished the same model first: the two are the same.
        if not (folder / "config.json").is_file():
            raise
        shutil.rmtree(partial)
    shutil.rmtree(unfinished, ignore_errors=True)
    return made
