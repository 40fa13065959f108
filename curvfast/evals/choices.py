"""Multiple-choice accuracy by the log-likelihoods of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curvfast.errors import InputError
from curvfast.model.forward import frozen


@dataclass(frozen=True)
class Choice:
    """A multiple-choice question as token ids: a prompt, and its answers, the right one first."""

    prefix: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]


def choice_accuracy(model: nn.Module, choices: Sequence[Choice], *, batch_size: int = 64) -> float:
    """Return the share of questions whose right answer has the highest log-likelihood.

    An answer's log-likelihood is the sum over its tokens, given the prompt, not normalised by
    length. A tie counts as wrong.

    Args:
        model: A causal language model of transformers; in eval mode meanwhile.
        choices: Prompts and answers.
        batch_size: Answers at a time.

    Returns:
        A share in [0, 1].

    Raises:
        InputError: If there is no question, or one has an empty part or fewer than two answers.
    """
    if not choices or any(
        not c.prefix or len(c.answers) < 2 or not all(c.answers) for c in choices
    ):
        raise InputError(
            "choice_accuracy needs questions, each with a prompt and two or more answers"
        )
    pairs = [(choice.prefix, answer) for choice in choices for answer in choice.answers]
    # Sorted by length, so that a batch is padded little.
    order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))
    scores = torch.empty(len(pairs), dtype=torch.float64)
    with frozen(model, keep_mode=False):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            scores[chosen] = _likelihoods(model, [pairs[i] for i in chosen])
    right, start = 0, 0
    for choice in choices:
        own = scores[start : start + len(choice.answers)]
        right += bool(own[0] > own[1:].max())
        start += len(choice.answers)
    return right / len(choices)


@torch.no_grad()
def _likelihoods(
    model: nn.Module, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
) -> Tensor:
    """Return Σ log p(answer | prompt), float64 [pairs]; padding on the right has no effect."""
    device = next(model.parameters()).device
    width = max(len(prefix) + len(answer) for prefix, answer in pairs)
    tokens = torch.zeros(len(pairs), width, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    scored = torch.zeros(len(pairs), width - 1, dtype=torch.bool)
    for row, (prefix, answer) in enumerate(pairs):
        length = len(prefix) + len(answer)
        tokens[row, :length] = torch.tensor([*prefix, *answer])
        mask[row, :length] = 1
        scored[row, len(prefix) - 1 : length - 1] = True
    logits = model(input_ids=tokens.to(device), attention_mask=mask.to(device)).logits[:, :-1]
    found = torch.log_softmax(logits.float(), -1).gather(-1, tokens.to(device)[:, 1:, None])
    return (found.squeeze(-1).cpu().double() * scored).sum(-1)
