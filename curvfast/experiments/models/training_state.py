"""Training state: weights and optimizer state after some step, from which training resumes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from curvfast.errors import StorageError
from curvfast.storage import read_folder, write_folder

KIND = "curvfast-training-state"
_WEIGHT, _OPTIMIZER = "weight", "optimizer"


def keep(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, taken: int) -> None:
    """Write the state after ``taken`` steps in the place of an earlier one, atomically.

    Raises:
        StorageError: If it cannot be written.
    """
    state = {
        f"{_OPTIMIZER}.{index}.{name}": value
        for index, own in optimizer.state_dict()["state"].items()
        for name, value in own.items()
    }
    meta = {"taken": taken, "torch": torch.__version__}
    write_folder(folder, kind=KIND, meta=meta, tensors={**_weights(model), **state})


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put a model and its optimizer into the state of ``folder``, where there is one that fits.

    A state that is damaged, or of another version of torch, is none: training is then as if it had
    never been cut off.

    Args:
        folder: As of :func:`keep`.
        model: Of the same class and sizes.
        optimizer: Freshly made, of the model's parameters.

    Returns:
        The steps taken; 0 if nothing was restored.
    """
    try:
        meta, tensors = read_folder(folder, kind=KIND)
    except StorageError:
        return 0
    weights = _weights(model)
    found = {key: tensor.shape for key, tensor in tensors.items() if key.startswith(_WEIGHT)}
    fits = found == {key: tensor.shape for key, tensor in weights.items()}
    if not fits or meta["torch"] != torch.__version__:
        return 0
    state: dict[int, dict[str, Tensor]] = {}
    for key in tensors.keys() - weights.keys():
        _, index, name = key.split(".", 2)
        state.setdefault(int(index), {})[name] = tensors[key]
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    with torch.no_grad():
        for key, tensor in weights.items():
            tensor.copy_(tensors[key])
    taken: int = meta["taken"]
    return taken


def _weights(model: nn.Module) -> dict[str, Tensor]:
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {f"{_WEIGHT}.{name}": tensor for name, tensor in named.items()}
