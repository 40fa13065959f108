"""Output type and storage of models that are not from transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from curvfast.storage import read_folder, write_folder

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
