"""Pass: a model run over data to measure its layers, in one pass or several, with checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from curvfast import distributed
from curvfast.collection.checkpoint import Checkpoint
from curvfast.collection.convergence import Converged, compare
from curvfast.collection.measurement import Measurement
from curvfast.collection.step import run_step
from curvfast.display import Bar
from curvfast.distributed import Group, local, rank_and_size
from curvfast.errors import InputError
from curvfast.model.families import LinearLayer
from curvfast.model.forward import frozen
from curvfast.storage import checksum

LABELS = ("sampled", "gold")
M = TypeVar("M", bound=Measurement)


@dataclass(kw_only=True)
class Pass:
    """One pass over data, its options and its state; :func:`curvfast.collect_from` describes them.

    Measured few layers at a time, a pass is split into one for each such part.
    """

    model: nn.Module
    """Not wrapped by DistributedDataParallel."""
    batches: Iterable[Any]
    """From the first one on, whatever was counted before; each pass reads them anew."""
    layers: dict[str, LinearLayer]
    causal: bool
    """Whether position t predicts the label at t + 1."""
    labels: str
    tokens: int | None
    """Labels to stop at, on all ranks together."""
    seed: int
    progress: bool
    keep_mode: bool
    layers_per_pass: int | None
    checkpoint: str | PathLike[str] | None
    every: int
    """Batches between two checkpoints."""
    group: Group
    """The ranks that count with this one."""
    identity: Mapping[str, Any]
    """What else makes a checkpoint one of this measurement, JSON-able."""
    until: Converged | None = None
    """The stopping rule, besides ``tokens``."""
    number: int = 0
    """Which of the passes it is split into."""

    measurement: Measurement = field(init=False)
    generator: torch.Generator = field(init=False)
    """Draws the labels."""
    slots: Checkpoint | None = field(init=False, default=None)
    share: int | None = field(init=False, default=None)
    """Labels of this rank to stop at."""
    counted: int = field(init=False, default=0)
    """Labels so far."""
    taken: int = field(init=False, default=0)
    """Batches so far."""
    steps: int = field(init=False, default=0)
    """Turns so far, of all ranks together where they keep step."""
    saved_at: int | None = field(init=False, default=None)
    """Turns at the last checkpoint."""
    curve: list[dict[str, Any]] = field(init=False, default_factory=list)
    """What each comparison of the halves found."""
    compare_at: int = field(init=False, default=0)
    """Turns before the next comparison."""

    def __post_init__(self) -> None:
        """Check every option.

        Raises:
            InputError: If one is out of range.
        """
        if self.labels not in LABELS:
            raise InputError(
                f"labels={self.labels!r}: pass 'sampled' (true Fisher) or 'gold' (empirical)"
            )
        if self.tokens is not None and self.tokens < 1:
            raise InputError(
                f"tokens={self.tokens}: pass a positive number of labels, or None for all"
            )
        if self.every < 1:
            raise InputError(
                f"every={self.every}: pass the number of batches between two checkpoints"
            )
        if self.layers_per_pass is not None and self.layers_per_pass < 1:
            raise InputError(
                f"layers_per_pass={self.layers_per_pass}: pass a number of layers, or None"
            )

    def measure(self, begin: Callable[..., M]) -> Iterator[M]:
        """Yield the measurement of each pass once its data has run through.

        Args:
            begin: Begins the measurement of a pass, given its ``layers``, whether it is ``driven``
                (no activation is recomputed) and ``one_of_many``, its ``group`` and its ``facts``.

        Yields:
            What ``begin`` returned, closed.

        Raises:
            InputError: If there is nothing to count, or batches cannot be read again.
            StorageError: If the checkpoint is foreign, damaged, or of another measurement.
            DistributedError: If another rank is gone.
        """
        names = list(self.layers)
        size = self.layers_per_pass or len(names)
        parts = [names[start : start + size] for start in range(0, len(names), size)]
        if len(parts) > 1 and iter(self.batches) is self.batches:
            raise InputError(
                f"{len(parts)} passes need batches that can be read again: pass a list, a "
                "DataLoader or text_batches(), not a generator, or leave layers_per_pass= out"
            )
        for number, part in enumerate(parts):
            layers = {name: self.layers[name] for name in part}
            own = replace(self, layers=layers, number=number)
            yield own._run(begin, one_of_many=len(parts) > 1)

    def _run(self, begin: Callable[..., M], *, one_of_many: bool) -> M:
        rank, world = rank_and_size(self.group)
        self.share = self.tokens and -(-self.tokens // world)
        device = next(self.model.parameters()).device
        self.generator = torch.Generator(device).manual_seed(self.seed + rank)
        facts = {"labels": self.labels, "seed": self.seed}
        if self.checkpoint:
            part = f"pass-{self.number}" + (f"-rank-{rank}-of-{world}" if world > 1 else "")
            identity = {
                **facts, "tokens": self.share, **self.identity, "pass": self.number,
                "until": self.until and asdict(self.until), "layers": list(self.layers),
                "weights": _checksum(self.layers),
            }  # fmt: skip
            self.slots = Checkpoint(Path(self.checkpoint) / part, identity)
        with (
            frozen(self.model, self.keep_mode) as driven,
            Bar("collect", self.share, "label", self.progress) as bar,
        ):
            measurement = begin(
                layers=self.layers, driven=driven, one_of_many=one_of_many, group=self.group,
                facts=facts,
            )  # fmt: skip
            self.measurement = measurement
            try:
                self._count_all(bar)
            finally:
                measurement.close()
        return measurement

    def _count_all(self, bar: Bar) -> None:
        """Count batches until there is enough, and note how many there were."""
        if self.until:
            self.compare_at = self.until.first
        bar.advance(self._resume())
        for batch, counts in self._turns(self._rest()):
            self.steps += 1
            if counts:
                bar.advance(self._count(batch))
            elif batch is not None:
                self._keep_step(batch)
            if self.until and self.steps >= self.compare_at:
                self._compare(self.until)
            if counts and self.slots and self.taken % self.every == 0:
                self._save(self.slots)
        total = sum(distributed.gather(self.counted, self.group))
        if not total:
            raise InputError(
                "batches gave no label to measure with: the iterable is empty (a generator is used "
                "up after one pass), or every position is masked"
            )
        if self.slots and self.saved_at != self.steps:
            self._save(self.slots)
        if self.until:
            self.measurement.add_facts(convergence=self.curve)
        self.measurement.add_facts(tokens=total, batches=self.taken)

    def _enough(self) -> bool:
        reached = self.share is not None and self.counted >= self.share
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
        halves = self.measurement.halves()
        labels = sum(distributed.gather(self.counted, self.group))
        # One rank decides: others might see the last digit otherwise, and wait for ever.
        self.curve.append(distributed.gather(compare(rule, halves, labels), self.group)[0])
        self.compare_at = rule.next(self.steps)

    def _save(self, slots: Checkpoint) -> None:
        facts, tensors = self.measurement.state()
        state = {
            "batches": self.taken, "labels": self.counted, "curve": self.curve,
            "steps": self.steps, "compare_at": self.compare_at, "curvature": facts,
        }  # fmt: skip
        if hasattr(self.batches, "state_dict"):
            state["data"] = self.batches.state_dict()
        slots.save(state, {**tensors, "labels": self.generator.get_state()})
        self.saved_at = self.steps

    def _resume(self) -> int:
        """Go back to the last checkpoint, if there is one; return the labels counted then."""
        loaded = self.slots.load() if self.slots else None
        if loaded is not None:
            self._restore(*loaded)
        # Ranks killed at different moments meet at the same turn.
        turns = distributed.gather((self.steps, self.compare_at), self.group)
        self.steps, self.compare_at = (max(each) for each in zip(*turns, strict=True))
        return self.counted

    def _restore(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.measurement.restore(state["curvature"], tensors)
        self.generator.set_state(tensors["labels"])
        self.counted, self.taken = state["labels"], state["batches"]
        self.steps, self.compare_at = state["steps"], state["compare_at"]
        self.curve, self.saved_at = state["curve"], state["steps"]
        if "data" in state and hasattr(self.batches, "load_state_dict"):
            self.batches.load_state_dict(state["data"])

    def _rest(self) -> Iterator[Any]:
        """Return the batches not yet counted: those that know their position, or all but some."""
        if hasattr(self.batches, "load_state_dict"):
            return iter(self.batches)
        return islice(iter(self.batches), self.taken, None)


def merged_provenance(provenances: Sequence[Mapping[str, Any]], batches: Any) -> dict[str, Any]:
    """Return the provenance of all passes as one, with the batches' own provenance."""
    merged = dict(provenances[0])
    if len(provenances) > 1:
        merged["passes"] = [dict(each) for each in provenances]
        merged["unrouted"] = [name for each in provenances for name in each["unrouted"]]
    describe = getattr(batches, "provenance", None)
    if callable(describe):
        merged["data"] = describe()
    return merged


def _checksum(layers: dict[str, LinearLayer]) -> int:
    """Return a checksum of the first numbers of each weight: of these weights, not others."""
    return checksum(local(each.stored()).flatten()[:256].float() for each in layers.values())
