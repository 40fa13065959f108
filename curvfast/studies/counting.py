"""CountedPassages: batches of passages of unequal length, with a row rule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from curvfast.evals.memorization import Passage

_ROWS = 32


class CountedPassages:
    """Batches of passages, and the row rule that selects the positions to count.

    An analysis runs one batch after another: the rule applies to the last batch drawn.
    """

    def __init__(self) -> None:
        """Count nothing until a batch is drawn."""
        self._keep = torch.zeros(0, 0, dtype=torch.bool)

    def batches(self, passages: Sequence[Passage], *, whole: bool) -> Iterator[dict[str, Tensor]]:
        """Yield passages with their continuations, padded on the right.

        Args:
            passages: Prompts and continuations.
            whole: Whether all positions except the first and the last count; else only those that
                predict the continuation.

        Yields:
            ``input_ids`` and ``attention_mask``, int64 [passages, longest].
        """
        for start in range(0, len(passages), _ROWS):
            part = passages[start : start + _ROWS]
            texts = [(*p.prefix, *p.suffix) for p in part]
            tokens = torch.zeros(len(part), max(map(len, texts)), dtype=torch.long)
            mask, keep = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
            for row, (passage, text) in enumerate(zip(part, texts, strict=True)):
                tokens[row, : len(text)] = torch.tensor(text)
                mask[row, : len(text)] = 1
                keep[row, 1 if whole else len(passage.prefix) - 1 : len(text) - 1] = True
            self._keep = keep
            yield {"input_ids": tokens, "attention_mask": mask}

    def __call__(self, _: str, __: torch.Size) -> Tensor:
        """Return the counted positions of the last batch drawn, bool [passages, longest]."""
        return self._keep
