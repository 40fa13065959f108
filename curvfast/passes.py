"""One pass over the data: batch after batch, until there is enough, with checkpoints on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import nn

from curvfast.checkpoint import Checkpoint
from curvfast.convergence import Converged, compare
from curvfast.core.factors import Factors
from curvfast.curvature import Curvature
from curvfast.errors import InputError
from curvfast.progress import Bar
from curvfast.steps import run_step


@dataclass
class Pass:
    """One pass, and where it stands."""

    model: nn.Module
    curvature: Curvature
    labels: str
    """Where labels come from."""
    causal: bool
    generator: torch.Generator
    """Draws the labels."""
    tokens: int | None
    """Labels to stop at."""
    until: Converged | None
    """When else to stop."""
    checkpoint: Checkpoint | None
    every: int
    """Batches between two checkpoints."""
    counted: int = 0
    """Labels so far."""
    taken: int = 0
    """Batches so far."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    """What each comparison of the halves found."""
    compare_at: int = 0
    """Batches before the next comparison."""

    def run(self, batches: Iterable[Any], bar: Bar) -> Factors:
        """Count batches until there is enough; return the factors.

        Args:
            batches: From the first one on, whatever was counted before.
            bar: Told of every label.

        Raises:
            InputError: If there is nothing to count.
            CoverageError: If a layer got no rows.
            StorageError: If a checkpoint cannot be written or is of no use.
        """
        if self.until:
            self.compare_at = self.until.first
        bar.advance(self._resume(batches))
        for batch in self._rest(batches) if not self._enough() else ():
            count = run_step(self.model, batch, self.labels, self.causal, self.generator)
            self.counted += count
            self.taken += 1
            bar.advance(count)
            if self.until and self.taken >= self.compare_at:
                self._compare(self.until)
            if self._enough():
                break
            if self.checkpoint and self.taken % self.every == 0:
                self._save(batches)
        if not self.counted:
            raise InputError(
                "batches gave no label to measure with: the iterable is empty (a generator is used "
                "up after one pass), or every position is masked"
            )
        if self.checkpoint:
            self._save(batches)
        if self.until:
            self.curvature.add_facts(convergence=self.curve)
        self.curvature.add_facts(tokens=self.counted, batches=self.taken)
        self.curvature.close()
        return self.curvature.factors()

    def _enough(self) -> bool:
        reached = self.tokens is not None and self.counted >= self.tokens
        return reached or bool(self.curve and self.curve[-1]["converged"])

    def _compare(self, rule: Converged) -> None:
        halves = self.curvature.half(0), self.curvature.half(1)
        self.curve.append(compare(rule, halves, self.counted))
        self.compare_at = rule.next(self.taken)

    def _save(self, batches: Iterable[Any]) -> None:
        facts, tensors = self.curvature.state()
        state = {
            "batches": self.taken, "labels": self.counted, "curve": self.curve,
            "compare_at": self.compare_at, "curvature": facts,
        }  # fmt: skip
        if hasattr(batches, "state_dict"):
            state["data"] = batches.state_dict()
        assert self.checkpoint is not None
        self.checkpoint.save(state, {**tensors, "labels": self.generator.get_state()})

    def _resume(self, batches: Iterable[Any]) -> int:
        """Go back to the last checkpoint, if there is one; return the labels counted then."""
        loaded = self.checkpoint.load() if self.checkpoint else None
        if loaded is None:
            return 0
        state, tensors = loaded
        self.curvature.restore(state["curvature"], tensors)
        self.generator.set_state(tensors["labels"])
        self.counted, self.taken = state["labels"], state["batches"]
        self.curve, self.compare_at = state["curve"], state["compare_at"]
        if "data" in state and hasattr(batches, "load_state_dict"):
            batches.load_state_dict(state["data"])
        return self.counted

    def _rest(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Return the batches not yet counted: those that know their position, or all but some."""
        if hasattr(batches, "load_state_dict"):
            return iter(batches)
        return islice(iter(batches), self.taken, None)
