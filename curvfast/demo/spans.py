"""recited_spans(): spans of a text that a pretrained model predicts exactly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from curvfast.evals.memorization import Passage
from curvfast.progress import track

CONTEXT = 32
SPAN = 8


@torch.no_grad()
def recited_spans(
    model: nn.Module, stream: Tensor, *, window: int = 128, batch_size: int = 8
) -> list[Passage]:
    """Return every span of 8 tokens a causal language model predicts exactly, given its context.

    A span is recited if the likeliest token is the true one at all its positions, each predicted
    from the true text before it; greedy decoding then gives the same tokens. A span that stands in
    its own context is copied, not recalled, and left out. Spans do not overlap (the "Historical
    Quotes" form of arXiv 2510.24256: the last 8 tokens, all before as prompt).

    Args:
        model: A causal language model of transformers, in eval mode.
        stream: The text, int64 [tokens], cut into windows; a shorter remainder is left out.
        window: Tokens in a window; a span's context starts where its window starts.
        batch_size: Windows at a time.

    Returns:
        Spans in order of the text, each with at least 32 tokens of context.
    """
    device = next(model.parameters()).device
    rows = stream[: len(stream) // window * window].view(-1, window)
    parts = rows.split(batch_size)
    found = []
    for part in track(parts, "search", len(parts), "batch"):
        logits = model(input_ids=part.to(device)).logits
        right = (logits[:, :-1].argmax(-1).cpu() == part[:, 1:]).tolist()
        for row, hits in zip(part.tolist(), right, strict=True):
            # hits[i] is the prediction of token i + 1.
            start = CONTEXT
            while start + SPAN <= window:
                if not all(hits[start - 1 : start - 1 + SPAN]):
                    start += 1
                    continue
                context, span = row[:start], row[start : start + SPAN]
                if not _holds(context, span):
                    found.append(Passage(tuple(context), tuple(span)))
                start += SPAN
    return found


def _holds(context: list[int], span: list[int]) -> bool:
    return any(context[i : i + len(span)] == span for i in range(len(context) - len(span) + 1))
