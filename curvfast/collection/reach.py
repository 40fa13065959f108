"""Reach: which positions a label is reached from, seen at the output of the input embedding.

Every layer's gradient at a position passes through that position's embedding, so a position that
counts has a gradient there, and one that is rightly left out has none: 0 of 4,872 rows misfired in
84 causal and 10 vision-language classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.model.batch import Batch
from curvfast.model.counted import CallRows
from curvfast.ops import devices

_FIRST = 8
_EVERY = 64


def due(number: int) -> bool:
    """Return whether batch ``number``, from 1, is probed: the first ones, then one in 64."""
    return number <= _FIRST or number % _EVERY == 0


@dataclass(eq=False)
class Reach:
    """Counts of the probes so far, added up without a wait for the device."""

    counts: Tensor | None = None
    """int64 [4]: rows that count and are reached, that count and are not, that are left out and
    reached, and that are left out and not."""
    example: tuple[Tensor, Tensor] | None = None
    """Of the first probe, on a CPU the first with an unreached position that counts: bool
    [sequences, length], which count and which are reached."""
    _shows: bool = False

    def note(self, rows: CallRows, shape: torch.Size, batch: Batch, gradient: Tensor) -> None:
        """Add one probe.

        Args:
            rows: Of a layer whose rows stand for the tokens that were embedded.
            shape: Leading shape of its input.
            batch: The batch.
            gradient: At the embedding's output, [sequences, length, d].
        """
        reached = (gradient != 0).any(-1)  # [sequences, length]
        keep = rows.stream(shape).keep(batch.skip_last, batch.scored)
        counted = torch.ones_like(reached) if keep is None else keep.to(reached.device)
        if counted.shape != reached.shape:
            return
        pairs = (counted & reached, counted & ~reached, ~counted & reached, ~counted & ~reached)
        found = torch.stack([each.sum() for each in pairs])
        # No label at all: nothing is reached, and nothing shown.
        found = torch.where(reached.any(), found, 0)
        self.counts = found if self.counts is None else self.counts.to(found.device) + found
        waits = devices.on_accelerator(reached.device)
        if self.example is None or not (self._shows or waits):
            self.example = (counted, reached)
            # Elsewhere the first stays: to look would be to wait.
            self._shows = waits or bool(pairs[1].numpy().any())

    def read(self) -> tuple[int, int, int, int]:
        """Return the four counts, in one transfer."""
        if self.counts is None:
            return (0, 0, 0, 0)
        both, unreached, leaking, neither = self.counts.tolist()
        return both, unreached, leaking, neither


def input_embedding(model: nn.Module) -> nn.Module | None:
    """Return the module that embeds a model's input tokens, or None if there is none to be told."""
    get: Callable[[], Any] | None = getattr(model, "get_input_embeddings", None)
    if callable(get):
        try:
            found = get()
        except (NotImplementedError, AttributeError, KeyError):
            found = None
        if isinstance(found, nn.Module):
            return found
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    return max(tables, key=lambda m: m.num_embeddings, default=None)
