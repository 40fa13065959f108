"""Cache of trained models, by what their training depends on, and storage of our own kinds."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from curvfast.experiments.data.fetch import cache_dir
from curvfast.storage import read_folder, write_folder

T = TypeVar("T")


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


KIND = "curvfast-lab-model"
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Output:
    """Output of a forward, with the field names of transformers."""

    logits: Tensor
    """[..., classes]."""
    loss: Tensor | None = None
    """Mean cross-entropy, if labels were given."""
    past_key_values: Any = None
    """State of a recurrent model, for the next call."""


def save_weights(model: nn.Module, folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the parameters of a model, and JSON-able facts about it, into a folder."""
    write_folder(folder, kind=KIND, meta={"facts": facts}, tensors=dict(model.named_parameters()))


def load_weights(model: M, folder: Path) -> M:
    """Load parameters that :func:`save_weights` wrote into a model of the same sizes; return it.

    Raises:
        StorageError: If the folder is damaged.
    """
    _, tensors = read_folder(folder, kind=KIND)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
    return model
