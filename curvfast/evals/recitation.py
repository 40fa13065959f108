"""Length of recitation: the likeliest token compared with the true one under teacher forcing.

Up to the first mismatch greedy decoding would have written the true text, so the leading run of
matches is the length of the recitation, at the cost of one forward (up to rounding).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.errors import InputError
from curvfast.model.forward import Forward, forward_of, frozen, logits_of
from curvfast.model.identity import unwrap

Ids = Sequence[int]


@dataclass(frozen=True, eq=False)
class Scored:
    """Predictions for a batch of continuations, aligned at their ends."""

    chosen: list[int]
    """Indices of the continuations."""
    logits: Tensor
    """[continuations, longest, vocabulary]: predictions of ``targets``."""
    targets: Tensor
    """int64 [continuations, longest]; a shorter continuation has only the last entries."""


def leading_matches(
    model: nn.Module,
    prompts: Sequence[Ids],
    continuations: Sequence[Ids],
    *,
    offset: int = 0,
    batch_size: int = 32,
) -> list[int]:
    """Return the number of tokens of each continuation recited before the first mismatch.

    Args:
        model: A causal language model of transformers; in eval mode meanwhile.
        prompts: Token ids, none empty, of any lengths.
        continuations: What follows each, none empty.
        offset: Added to every position id.
        batch_size: Texts at a time.

    Returns:
        A number for each, at most the length of its continuation.

    Raises:
        InputError: If a text is empty, or positions cannot be moved by ``offset``.
    """
    found = [0] * len(prompts)
    for scored in predictions(model, prompts, continuations, offset=offset, batch_size=batch_size):
        hits = (scored.logits.argmax(-1) == scored.targets).cpu()
        for row, number in zip(hits, scored.chosen, strict=True):
            own = row[-len(continuations[number]) :]
            found[number] = int(own.long().cumprod(0).sum())
    return found


@torch.no_grad()
def predictions(
    model: nn.Module,
    prompts: Sequence[Ids],
    continuations: Sequence[Ids],
    *,
    offset: int = 0,
    batch_size: int = 32,
) -> Iterator[Scored]:
    """Yield a model's predictions for continuations, batch by batch, sorted by length.

    Unequal texts are padded on the left, under an attention mask, and positions count real tokens;
    of a model that takes no positions only equal texts are read together.

    The arguments are those of :func:`leading_matches`.

    Yields:
        The predictions for some of them.

    Raises:
        InputError: If a text is empty, or positions cannot be moved by ``offset``.
    """
    if any(not len(text) for text in (*prompts, *continuations)):
        raise InputError("a prompt or continuation is empty; give each at least one token")
    forward = forward_of(model)
    rows = [[*p, *c] for p, c in zip(prompts, continuations, strict=True)]
    longest = max(map(len, rows), default=0)
    _check_offset(model, offset, longest, forward)
    device = next(model.parameters()).device
    for chosen in forward.batches([len(row) for row in rows], batch_size):
        tokens, mask = _left_padded([rows[i] for i in chosen], device)
        keep = max(len(continuations[i]) for i in chosen) + 1
        options: dict[str, Any] = forward.uncached
        if "logits_to_keep" in forward.names:
            options["logits_to_keep"] = keep
        if not mask.all():
            options["attention_mask"] = mask
        if "position_ids" in forward.names:
            options["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0) + offset
        # Frozen batch by batch: a caller may stop in between.
        with frozen(model, keep_mode=False):
            logits = logits_of(model(input_ids=tokens, **options))
        yield Scored(chosen, logits[:, -keep:-1], tokens[:, -keep + 1 :])


def _check_offset(model: nn.Module, offset: int, longest: int, forward: Forward) -> None:
    if not offset:
        return
    if offset < 0 or "position_ids" not in forward.names:
        raise InputError(
            f"offset={offset}: pass 0 or more, and a model whose forward takes position_ids; "
            f"{type(model).__name__} " + ("does" if "position_ids" in forward.names else "does not")
        )
    places = getattr(getattr(unwrap(model), "config", None), "max_position_embeddings", None)
    if places is not None and offset + longest > places:
        raise InputError(
            f"offset={offset} moves texts of {longest} tokens past the model's {places} positions; "
            f"pass at most {places - longest}"
        )


def _left_padded(rows: Sequence[Ids], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for number, row in enumerate(rows):
        tokens[number, width - len(row) :] = torch.tensor(row)
        mask[number, width - len(row) :] = 1
    return tokens.to(device), mask.to(device)
