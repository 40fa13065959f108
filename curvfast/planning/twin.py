"""Copies of models and batches on the meta device, which hold shapes and no values."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.errors import InputError
from curvfast.provenance import unwrap


def meta_twin(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` on the meta device, in eval mode; no weight is copied.

    Tied parameters stay tied. The model itself is untouched.

    Raises:
        InputError: If something its modules hold cannot be copied.
    """
    model = unwrap(model)
    tensors = [*model.parameters(), *model.buffers()]
    # deepcopy reuses what it finds in its memo.
    memo: dict[int, Any] = {id(tensor): _shape_of(tensor) for tensor in tensors}
    try:
        return copy.deepcopy(model, memo).eval()
    except TypeError as error:
        raise InputError(
            f"this {type(model).__name__} holds what cannot be copied ({error}); plan with its "
            "configuration instead"
        ) from error


def on_meta(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch with its tensors on the meta device, without their values."""
    return {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in batch.items()}


def _shape_of(tensor: Tensor) -> Tensor:
    shape = torch.empty_like(tensor, device="meta")
    return nn.Parameter(shape) if isinstance(tensor, nn.Parameter) else shape
