"""Batch: what was said of one batch, from which the rows of each layer that count follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvfast.model.counted import CallRows, RowCache
from curvfast.model.rows import RowRule, Rows
from curvfast.model.token_streams import Frame


@dataclass(eq=False)
class Batch:
    """What was said of the positions of one batch, in one forward of a model."""

    skip_last: bool
    """Whether position t predicts the token at t + 1; set before rows are first asked for."""
    rule: RowRule | None = None
    mask: Tensor | None = None
    """Real positions that the caller told, bool [sequences, length]."""
    labels: int | None = None
    """Number of labels the loss is averaged over, if the caller told it."""
    scored: Tensor | None = None
    """Positions whose prediction is scored, bool, where that is known better than from labels."""
    several: bool = False
    """Whether several backwards run through its graph: each adds to G, the first counts rows."""
    thin: Callable[[Rows, torch.device], Rows] | None = None
    """Row subsampling; None counts all."""
    half: int = 0
    """Index of the sum it is added to, if there are two."""
    idle: bool = False
    """Whether none of its rows are counted."""
    cache: RowCache = field(default_factory=RowCache)
    """Rows that were found, and the calls that layers were seen in."""

    def remember(self, layer: str, frame: Frame | None) -> None:
        """Note in which call a layer ran; needed where its rows are only seen in a recomputation.

        Args:
            layer: Its name.
            frame: The innermost running call.
        """
        if frame is not None:
            self.cache.remember(layer, frame)

    def call_rows(self, layer: str, x: Tensor, frame: Frame | None) -> CallRows:
        """Return the rows of one call of a layer; which of them count is decided when asked.

        Args:
            layer: Its name.
            x: Its input, with its graph.
            frame: The innermost running call, or None where there is none.
        """
        self.remember(layer, frame)
        return CallRows.of_call(self, layer, x, frame)

    def routed_rows(
        self, layer: str, positions: Tensor, of: torch.Size, frame: Frame | None
    ) -> CallRows:
        """Return the rows of one call of an expert, whose tokens are known by number.

        Args:
            layer: Its name.
            positions: int64 [rows]: where each row stands in the flattened ``of``.
            of: Leading shape of what the experts were given.
            frame: The innermost running call, or None where there is none.
        """
        self.remember(layer, frame)
        return CallRows.of_expert(self, layer, positions, of, frame)
