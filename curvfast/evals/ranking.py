"""nDCG of an edited model's token ranking against that of the unedited model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.errors import InputError, ShapeError
from curvfast.model.forward import frozen, logits_of, model_arguments
from curvfast.model.identity import is_causal_lm
from curvfast.model.stream import drop_last


def top_tokens(
    model: nn.Module, batches: Iterable[Mapping[str, Any] | Tensor], k: int = 10
) -> Tensor:
    """Return the k likeliest tokens at every position that predicts one, the likeliest first.

    Args:
        model: A model with logits; in eval mode meanwhile.
        batches: As in :func:`curvfast.collect_from`.
        k: Number of tokens.

    Returns:
        int64 [positions, k], on the CPU.

    Raises:
        InputError: If there is no position, or k is out of range.
    """
    device = next(model.parameters()).device
    found = []
    with frozen(model, keep_mode=False), torch.no_grad():
        for batch in batches:
            arguments = model_arguments(model, batch, device)
            arguments.pop("labels", None)
            logits = logits_of(model(**arguments))
            scored = _scored(arguments.get("attention_mask"), logits, causal=is_causal_lm(model))
            own = logits[scored]  # [count, tokens]
            if not 1 <= k <= own.shape[1]:
                raise InputError(
                    f"k={k}: pass a number from 1 to the {own.shape[1]} tokens there are"
                )
            found.append(own.topk(k).indices.cpu())
    if not sum(map(len, found)):
        raise InputError("batches hold no position that predicts a token; got nothing to rank")
    return torch.cat(found)


def _scored(mask: Tensor | None, logits: Tensor, *, causal: bool) -> Tensor:
    """Return which positions predict a token, bool, the leading shape of the logits."""
    every = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    if logits.dim() < 3:
        return every
    real = every if mask is None else mask.to(logits.device).bool()
    if real.shape != every.shape:
        raise ShapeError(
            f"attention_mask is {list(real.shape)}, and the model predicts {list(every.shape)}: "
            "pass one of [sequences, length]"
        )
    return drop_last(real) if causal else real


def ndcg(baseline: Tensor, found: Tensor) -> Tensor:
    """Return the nDCG@k of rankings against those of an unedited model.

    A token's relevance is k for the baseline's first, 1 for its k-th, 0 for any other; the discount
    at rank r is 1 / log2(r + 1). So a baseline's own ranking scores 1 and, of ten, the reverse of
    it 0.668: relevance follows the baseline's rank, not the edited model's (arXiv 2510.24256).

    Args:
        baseline: :func:`top_tokens` *before* the edit, [positions, k].
        found: :func:`top_tokens` after it, [positions, k].

    Returns:
        float64 [positions], in [0, 1].

    Raises:
        ShapeError: If the shapes differ.
    """
    if baseline.shape != found.shape or baseline.dim() != 2:
        raise ShapeError(
            f"rankings are {list(baseline.shape)} and {list(found.shape)}; pass two of one shape "
            "[positions, k], of the same batches"
        )
    k = baseline.shape[1]
    relevance = torch.arange(k, 0, -1, dtype=torch.float64)
    discount = 1 / torch.arange(2, k + 2, dtype=torch.float64).log2()
    # [positions, found rank, baseline rank]
    same = (found[:, :, None] == baseline[:, None, :]).double()
    return ((same @ relevance) @ discount) / (relevance @ discount)
