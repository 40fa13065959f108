"""Greedy continuations of prompts of unequal length, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.errors import InputError
from curvfast.forward import Forward, forward_of
from curvfast.steps import frozen, logits_of


@torch.no_grad()
def greedy(
    model: nn.Module, prefixes: Sequence[Sequence[int]], length: int, *, batch_size: int = 32
) -> list[list[int]]:
    """Continue each prefix by exactly ``length`` tokens, always the likeliest.

    Prompts are padded on the *left*, so every continuation starts at one column and none is cut by
    padding; of a model that takes no positions only equal prompts are read together. The model's
    own generation settings (sampling, penalties, end tokens) play no part: ``generate()`` would
    merge them into whatever it is given.

    Args:
        model: A causal language model: one of transformers that can generate, or one whose forward
            takes ``input_ids`` and returns logits. In eval mode meanwhile.
        prefixes: Token ids, none empty.
        length: Tokens to generate.
        batch_size: Prompts at a time.

    Returns:
        ``length`` token ids for each prefix.

    Raises:
        InputError: If a prefix is empty, or the model cannot generate or cannot in batches.
    """
    forward = forward_of(model)
    if not forward.generates:
        raise InputError(
            f"{type(model).__name__} cannot generate: it says so, or its forward takes no "
            "input_ids alone; pass a causal language model"
        )
    if any(len(prefix) == 0 for prefix in prefixes):
        raise InputError("an empty prefix cannot be continued; give each at least one token")
    device = next(model.parameters()).device
    found: dict[int, list[int]] = {}
    with frozen(model, keep_mode=False):
        for chosen in forward.batches([len(prefix) for prefix in prefixes], batch_size):
            width = max(len(prefixes[i]) for i in chosen)
            tokens = torch.zeros(len(chosen), width, dtype=torch.long)
            mask = torch.zeros_like(tokens)
            for row, i in enumerate(chosen):
                tokens[row, width - len(prefixes[i]) :] = torch.tensor(list(prefixes[i]))
                mask[row, width - len(prefixes[i]) :] = 1
            new = _continue(model, forward, tokens.to(device), mask.to(device), length)
            found |= dict(zip(chosen, new.tolist(), strict=True))
    return [found[i] for i in range(len(prefixes))]


def _continue(
    model: nn.Module, forward: Forward, tokens: Tensor, mask: Tensor, length: int
) -> Tensor:
    """Return the ``length`` likeliest next tokens of left-padded prompts.

    A model that returns a cache, or a recurrent state, goes on from it and reads the last token
    alone; another reads all of them again.
    """
    options: dict[str, Any] = {"use_cache": True} if forward.cached else {}
    if "logits_to_keep" in forward.names:
        options["logits_to_keep"] = 1
    prompt = tokens.shape[1]
    carried: dict[str, Any] = {}
    for _ in range(length):
        unread = slice(-1, None) if carried else slice(None)
        given = {"input_ids": tokens[:, unread], **options}
        if "attention_mask" in forward.names:
            given["attention_mask"] = mask
        if "position_ids" in forward.names:
            given["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)[:, unread]
        output = model(**given, **carried)
        carried = forward.carried(output, given)
        logits, read = logits_of(output), given["input_ids"].shape
        if logits.shape[:-1] not in (read, (len(tokens), 1)):
            raise InputError(
                f"the logits of {type(model).__name__} are {list(logits.shape)} for tokens "
                f"{list(read)}, so it mixes texts that are continued together, or is no causal "
                "language model; with batch_size=1 none are"
            )
        new = logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, new], dim=1)
        mask = torch.cat([mask, torch.ones_like(new)], dim=1)
    return tokens[:, prompt:]
