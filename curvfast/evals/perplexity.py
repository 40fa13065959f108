"""Perplexity: exp of the token-weighted mean loss, independent of batch size and padding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from curvfast.errors import InputError
from curvfast.model.forward import frozen

_CHUNK_ROWS = 4096


@torch.no_grad()
def perplexity(model: nn.Module, batches: Iterable[Mapping[str, Any] | Tensor]) -> float:
    """Return the perplexity exp(Σ loss / Σ tokens) over next-token predictions of ``batches``.

    Args:
        model: A causal language model; in eval mode meanwhile.
        batches: Dicts with ``input_ids`` [sequences, length] and, where padded, ``attention_mask``;
            or tensors of token ids.

    Returns:
        Perplexity over every predicted real token; infinity if float64 overflows.

    Raises:
        InputError: If ``batches`` holds no prediction.
    """
    device = next(model.parameters()).device
    loss, count = 0.0, 0
    with frozen(model, keep_mode=False):
        for batch in batches:
            tokens, mask = _read(batch, device)
            given = {} if mask is None else {"attention_mask": mask}
            logits = model(input_ids=tokens, **given).logits
            predicted, targets = logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
            if mask is not None:
                scored = (mask[:, 1:].bool() & mask[:, :-1].bool()).flatten()
                predicted, targets = predicted[scored], targets[scored]
            for part, target in zip(
                predicted.split(_CHUNK_ROWS), targets.split(_CHUNK_ROWS), strict=True
            ):
                loss += float(cross_entropy(part.float(), target, reduction="sum").double())
            count += targets.numel()
    if not count:
        raise InputError("perplexity needs at least one sequence of two real tokens; got none")
    try:
        return math.exp(loss / count)
    except OverflowError:
        return math.inf


def _read(batch: Mapping[str, Any] | Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    mask = batch.get("attention_mask")
    return batch["input_ids"].to(device), None if mask is None else mask.to(device)
