"""Pass: one pass over the data, until enough labels are counted, with checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from curvfast import distributed
from curvfast.checkpoint import Checkpoint
from curvfast.convergence import Converged, compare
from curvfast.curvature import Curvature
from curvfast.errors import InputError
from curvfast.measurement import Measurement
from curvfast.progress import Bar
from curvfast.steps import run_step


@dataclass
class Pass:
    """One pass over the data, and its state."""

    model: nn.Module
    measurement: Measurement
    labels: str
    """Where labels come from."""
    causal: bool
    generator: torch.Generator
    """Draws the labels."""
    tokens: int | None
    """Labels to stop at."""
    until: Converged | None
    """The stopping rule, besides ``tokens``."""
    checkpoint: Checkpoint | None
    every: int
    """Batches between two checkpoints."""
    group: distributed.Group
    """The ranks that count with this one."""
    counted: int = 0
    """Labels so far."""
    taken: int = 0
    """Batches so far."""
    steps: int = 0
    """Turns so far, of all ranks together where they keep step."""
    saved_at: int | None = None
    """Turns at the last checkpoint."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    """What each comparison of the halves found."""
    compare_at: int = 0
    """Turns before the next comparison."""

    def run(self, batches: Iterable[Any], bar: Bar) -> None:
        """Count batches until there is enough, and close the measurement.

        Args:
            batches: From the first one on, whatever was counted before.
            bar: Told of every label.

        Raises:
            InputError: If there is nothing to count.
            StorageError: If a checkpoint cannot be written or is of no use.
        """
        if self.until:
            self.compare_at = self.until.first
        bar.advance(self._resume(batches))
        for batch, counts in self._turns(self._rest(batches)):
            self.steps += 1
            if counts:
                bar.advance(self._count(batch))
            elif batch is not None:
                self._keep_step(batch)
            if self.until and self.steps >= self.compare_at:
                self._compare(self.until)
            if counts and self.checkpoint and self.taken % self.every == 0:
                self._save(batches)
        total = sum(distributed.gather(self.counted, self.group))
        if not total:
            raise InputError(
                "batches gave no label to measure with: the iterable is empty (a generator is used "
                "up after one pass), or every position is masked"
            )
        if self.checkpoint and self.saved_at != self.steps:
            self._save(batches)
        if self.until:
            self.measurement.add_facts(convergence=self.curve)
        self.measurement.add_facts(tokens=total, batches=self.taken)
        self.measurement.close()

    def _enough(self) -> bool:
        reached = self.tokens is not None and self.counted >= self.tokens
        return reached or bool(self.curve and self.curve[-1]["converged"])

    def _turns(self, own: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
        """Yield this rank's batches, and whether they count, until there is enough.

        Ranks whose model is sharded, or who compare halves, keep step until none has a batch left:
        those that have none run one that does not count where the model needs every rank.
        """
        sharded = distributed.is_sharded_model(self.model)
        if self.group is None or not (sharded or self.until):
            while not self._enough() and (batch := next(own, None)) is not None:
                yield batch, True
            return
        last = None
        while True:
            batch = None if self._enough() else next(own, None)
            last = last if batch is None else batch
            facts = distributed.gather((batch is not None, last is None), self.group)
            if not any(has for has, _ in facts):
                return
            if sharded and any(lacks for _, lacks in facts):
                lender = [has for has, _ in facts].index(True)
                lent = distributed.gather(batch, self.group)[lender]
                last = lent if last is None else last
            yield (batch, True) if batch is not None else (last if sharded else None, False)

    def _count(self, batch: Any) -> int:
        count = run_step(self.model, batch, self.labels, self.causal, self.generator)
        self.counted += count
        self.taken += 1
        return count

    def _keep_step(self, batch: Any) -> None:
        """Run a batch that does not count, with labels that are drawn apart."""
        self.measurement.skip_next()
        aside = torch.Generator(self.generator.device)
        run_step(self.model, batch, self.labels, self.causal, aside)

    def _compare(self, rule: Converged) -> None:
        assert isinstance(self.measurement, Curvature)
        halves = self.measurement.halves()
        labels = sum(distributed.gather(self.counted, self.group))
        # One rank decides: others might see the last digit otherwise, and wait for ever.
        self.curve.append(distributed.gather(compare(rule, halves, labels), self.group)[0])
        self.compare_at = rule.next(self.steps)

    def _save(self, batches: Iterable[Any]) -> None:
        facts, tensors = self.measurement.state()
        state = {
            "batches": self.taken, "labels": self.counted, "curve": self.curve,
            "steps": self.steps, "compare_at": self.compare_at, "curvature": facts,
        }  # fmt: skip
        if hasattr(batches, "state_dict"):
            state["data"] = batches.state_dict()
        assert self.checkpoint is not None
        self.checkpoint.save(state, {**tensors, "labels": self.generator.get_state()})
        self.saved_at = self.steps

    def _resume(self, batches: Iterable[Any]) -> int:
        """Go back to the last checkpoint, if there is one; return the labels counted then."""
        loaded = self.checkpoint.load() if self.checkpoint else None
        if loaded is not None:
            self._restore(*loaded, batches)
        # Ranks killed at different moments meet at the same turn.
        turns = distributed.gather((self.steps, self.compare_at), self.group)
        self.steps, self.compare_at = (max(each) for each in zip(*turns, strict=True))
        return self.counted

    def _restore(
        self, state: dict[str, Any], tensors: dict[str, Tensor], batches: Iterable[Any]
    ) -> None:
        self.measurement.restore(state["curvature"], tensors)
        self.generator.set_state(tensors["labels"])
        self.counted, self.taken = state["labels"], state["batches"]
        self.steps, self.compare_at = state["steps"], state["compare_at"]
        self.curve, self.saved_at = state["curve"], state["steps"]
        if "data" in state and hasattr(batches, "load_state_dict"):
            batches.load_state_dict(state["data"])

    def _rest(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Return the batches not yet counted: those that know their position, or all but some."""
        if hasattr(batches, "load_state_dict"):
            return iter(batches)
        return islice(iter(batches), self.taken, None)
