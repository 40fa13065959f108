"""Greedy continuations of prompts of unequal length, in batches."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.errors import InputError
from curvfast.steps import frozen


@torch.no_grad()
def greedy(
    model: nn.Module, prefixes: Sequence[Sequence[int]], length: int, *, batch_size: int = 32
) -> list[list[int]]:
    """Continue each prefix by exactly ``length`` tokens, always the likeliest.

    Prompts are padded on the *left*, so every continuation starts at one column and none is cut by
    padding. The model's own generation settings (sampling, penalties, end tokens) play no part:
    ``generate()`` would merge them into whatever it is given.

    Args:
        model: A causal language model of transformers; in eval mode meanwhile.
        prefixes: Token ids, none empty.
        length: Tokens to generate.
        batch_size: Prompts at a time.

    Returns:
        ``length`` token ids for each prefix.

    Raises:
        InputError: If a prefix is empty or the model cannot generate.
    """
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise InputError(f"{type(model).__name__} cannot generate; pass a causal language model")
    if any(len(prefix) == 0 for prefix in prefixes):
        raise InputError("an empty prefix cannot be continued; give each at least one token")
    device = next(model.parameters()).device
    # Sorted by length, so that a batch is padded little.
    order = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i]))
    found: dict[int, list[int]] = {}
    with frozen(model, keep_mode=False):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = max(len(prefixes[i]) for i in chosen)
            tokens = torch.zeros(len(chosen), width, dtype=torch.long)
            mask = torch.zeros_like(tokens)
            for row, i in enumerate(chosen):
                tokens[row, width - len(prefixes[i]) :] = torch.tensor(list(prefixes[i]))
                mask[row, width - len(prefixes[i]) :] = 1
            new = _continue(model, tokens.to(device), mask.to(device), length)
            found |= dict(zip(chosen, new.tolist(), strict=True))
    return [found[i] for i in range(len(prefixes))]


def _continue(model: nn.Module, tokens: Tensor, mask: Tensor, length: int) -> Tensor:
    """Return the ``length`` likeliest next tokens of left-padded prompts, by a cached forward."""
    known = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in known:
        options["logits_to_keep"] = 1
    generated = []
    past = None
    for _ in range(length):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        if "position_ids" in known:
            options["position_ids"] = positions if past is None else positions[:, -1:]
        out = model(input_ids=tokens, attention_mask=mask, past_key_values=past, **options)
        past = out.past_key_values
        tokens = out.logits[:, -1:].argmax(-1)
        generated.append(tokens)
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
    return torch.cat(generated, dim=1)
