"""Drive and Pass: runs a model over data to measure it, pass after pass, with checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from curvfast import distributed
from curvfast.collection.checkpoint import Checkpoint
from curvfast.collection.convergence import Converged, compare
from curvfast.collection.curvature import Curvature
from curvfast.collection.measurement import Measurement
from curvfast.collection.step import run_step
from curvfast.display import Bar
from curvfast.distributed import Group, local, rank_and_size
from curvfast.errors import InputError
from curvfast.model.families import LinearLayer
from curvfast.model.forward import frozen
from curvfast.storage import checksum


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


LABELS = ("sampled", "gold")
M = TypeVar("M", bound=Measurement)
Begin = Callable[[dict[str, LinearLayer], bool, bool], M]
"""(layers of the pass, whether no activation is recomputed, whether it is one of many passes)."""


@dataclass(frozen=True)
class Drive:
    """Options of running a model over data; :func:`curvfast.collect_from` describes them."""

    labels: str
    tokens: int | None
    seed: int
    progress: bool
    keep_mode: bool
    layers_per_pass: int | None
    checkpoint: str | PathLike[str] | None
    every: int
    group: Group
    until: Converged | None = None

    def __post_init__(self) -> None:
        """Check every field.

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

    @property
    def facts(self) -> dict[str, Any]:
        """The facts that are saved with the result."""
        return {"labels": self.labels, "seed": self.seed}

    def passes(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        layers: dict[str, LinearLayer],
        causal: bool,
        begin: Begin[M],
        identity: Mapping[str, Any],
    ) -> Iterator[M]:
        """Yield the measurement of each pass once its data has run through.

        Args:
            model: Not wrapped by DistributedDataParallel.
            batches: Read anew by each pass.
            layers: All layers.
            causal: Whether position t predicts the label at t + 1.
            begin: Begins the measurement of a pass.
            identity: What else makes a checkpoint one of this measurement, JSON-able.

        Yields:
            What ``begin`` returned, closed.

        Raises:
            InputError: If there is nothing to count, or batches cannot be read again.
            StorageError: If the checkpoint is foreign, damaged, or of another measurement.
            DistributedError: If another rank is gone.
        """
        rank, world = rank_and_size(self.group)
        tokens = self.tokens and -(-self.tokens // world)
        device = next(model.parameters()).device
        chunks = list(_chunks(layers, self.layers_per_pass))
        if len(chunks) > 1 and iter(batches) is batches:
            raise InputError(
                f"{len(chunks)} passes need batches that can be read again: pass a list, a "
                "DataLoader or text_batches(), not a generator, or leave layers_per_pass= out"
            )
        for number, chosen in enumerate(chunks):
            generator = torch.Generator(device).manual_seed(self.seed + rank)
            whole = {
                **self.facts, "tokens": tokens, **identity, "pass": number,
                "until": self.until and asdict(self.until), "layers": list(chosen),
                "weights": _checksum(chosen),
            }  # fmt: skip
            part = f"pass-{number}" + (f"-rank-{rank}-of-{world}" if world > 1 else "")
            state = Checkpoint(Path(self.checkpoint) / part, whole) if self.checkpoint else None
            with (
                frozen(model, self.keep_mode) as driven,
                Bar("collect", tokens, "label", self.progress) as bar,
            ):
                measurement = begin(chosen, driven, len(chunks) > 1)
                try:
                    Pass(
                        model, measurement, self.labels, causal, generator, tokens, self.until,
                        state, self.every, self.group,
                    ).run(batches, bar)  # fmt: skip
                finally:
                    measurement.close()
            yield measurement


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


def _chunks(layers: dict[str, LinearLayer], size: int | None) -> Iterator[dict[str, LinearLayer]]:
    names = list(layers)
    for start in range(0, len(names), size or len(names)):
        yield {name: layers[name] for name in names[start : start + (size or len(names))]}


def _checksum(layers: dict[str, LinearLayer]) -> int:
    """Return a checksum of the first numbers of each weight: of these weights, not others."""
    return checksum(local(each.stored()).flatten()[:256].float() for each in layers.values())
