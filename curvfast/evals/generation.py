"""Greedy continuations of prompts of unequal length, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from curvfast.errors import InputError


@torch.no_grad()
def greedy(
    model: nn.Module, prefixes: Sequence[Sequence[int]], length: int, *, batch_size: int = 32
) -> list[list[int]]:
    """Continue each prefix by exactly ``length`` tokens, always the likeliest.

    Prompts are padded on the *left*, so every continuation starts at one column and none is cut by
    padding. The model's own generation settings (sampling, penalties, end tokens) are not used.

    Args:
        model: A causal language model of transformers; evaluated in eval mode, its mode restored.
        prefixes: Token ids, none empty.
        length: Tokens to generate.
        batch_size: Prompts at a time.

    Returns:
        ``length`` token ids for each prefix.

    Raises:
        InputError: If a prefix is empty or the model cannot generate.
    """
    if not hasattr(model, "generate"):
        raise InputError(f"{type(model).__name__} has no generate(); pass a causal language model")
    if any(len(prefix) == 0 for prefix in prefixes):
        raise InputError("an empty prefix cannot be continued; give each at least one token")
    device = next(model.parameters()).device
    # Sorted by length, so that a batch is padded little.
    order = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i]))
    found: dict[int, list[int]] = {}
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = max(len(prefixes[i]) for i in chosen)
            tokens = torch.zeros(len(chosen), width, dtype=torch.long)
            mask = torch.zeros_like(tokens)
            for row, i in enumerate(chosen):
                tokens[row, width - len(prefixes[i]) :] = torch.tensor(list(prefixes[i]))
                mask[row, width - len(prefixes[i]) :] = 1
            out = _generate(model, tokens.to(device), mask.to(device), length)
            found |= dict(zip(chosen, out[:, width:].tolist(), strict=True))
    finally:
        model.train(training)
    return [found[i] for i in range(len(prefixes))]


def _generate(model: Any, tokens: torch.Tensor, mask: torch.Tensor, length: int) -> torch.Tensor:
    settings = type(model.generation_config)(
        max_new_tokens=length, do_sample=False, pad_token_id=0, eos_token_id=None, bos_token_id=None
    )
    result: torch.Tensor = model.generate(
        input_ids=tokens, attention_mask=mask, generation_config=settings
    )
    return result
