"""Pass: a model run over data to measure its layers, in one pass or several, with checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from curvfast import distributed
from curvfast.collection.checkpoint import Checkpoint
from curvfast.collection.convergence import Converged, compare
from curvfast.collection.head import Said
from curvfast.collection.likelihood import Likelihood
from curvfast.collection.measurement import Measurement
from curvfast.collection.next_token import causality, of_given_labels, told
from curvfast.collection.step import EXACT, GOLD, LABELS, Asked, call_arguments, run_step
from curvfast.collection.targets import LabelMask
from curvfast.display import Bar
from curvfast.distributed import Group, local, rank_and_size
from curvfast.errors import InputError
from curvfast.kfac.evidence import KEY, Evidence
from curvfast.kfac.evidence import merged as merged_evidence
from curvfast.model.families import LinearLayer
from curvfast.model.forward import frozen, input_device
from curvfast.storage import checksum

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
    skip_last: bool | None
    """Whether position t predicts the label at t + 1; None asks the model in the first batch."""
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
    said: Said = field(default_factory=Said)
    """What the caller says of the model's head."""
    label_mask: LabelMask | None = None
    """Where labels are wanted."""
    by_kind: bool = False
    """Whether layers were chosen by kind: one that is never called is then left out."""
    until: Converged | None = None
    """The stopping rule, besides ``tokens``."""
    number: int = 0
    """Which of the passes it is split into."""

    measurement: Measurement = field(init=False)
    generator: torch.Generator = field(init=False)
    """Draws the labels."""
    slots: Checkpoint | None = field(init=False, default=None)
    asked: Asked = field(init=False)
    """Which labels, and what is known of the head."""
    share: int | None = field(init=False, default=None)
    """Labels of this rank to stop at."""
    counted: int = field(init=False, default=0)
    """Labels so far."""
    taken: int = field(init=False, default=0)
    """Batches so far."""
    steps: int = field(init=False, default=0)
    """Turns so far, of all ranks together where they keep step."""
    begun: bool = field(init=False, default=False)
    """Whether the model was asked what its predictions are of."""
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
                f"labels={self.labels!r}: pass 'sampled' (true Fisher), 'gold' (empirical), or "
                "'exact' (true Fisher without a draw, for few classes)"
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
        self.asked = Asked(self.labels, bool(self.skip_last), self.said, self.label_mask)
        self.generator = torch.Generator(input_device(self.model)).manual_seed(self.seed + rank)
        facts = {"labels": self.labels, "seed": self.seed}
        said: dict[str, Any] = {k: v for k, v in asdict(self.said).items() if v is not None}
        if isinstance(self.label_mask, str):
            said["label_mask"] = self.label_mask
        if self.checkpoint:
            part = f"pass-{self.number}" + (f"-rank-{rank}-of-{world}" if world > 1 else "")
            identity = {
                **facts, **said, "tokens": self.share, **self.identity, "pass": self.number,
                "until": self.until and asdict(self.until), "layers": list(self.layers),
                "weights": _checksum(self.layers),
            }  # fmt: skip
            self.slots = Checkpoint(Path(self.checkpoint) / part, identity)
        with (
            frozen(self.model, self.keep_mode) as driven,
            Bar("collect", self.share, "label", self.progress) as bar,
        ):
            if self.labels == EXACT and not driven:
                raise InputError(
                    "labels='exact' runs several backward passes through one graph, which "
                    "activation checkpointing would recompute for each: leave keep_mode= out, or "
                    "pass labels='sampled'"
                )
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
        if self.asked.likelihood is not None:
            self.measurement.add_facts(likelihood=self.asked.likelihood.known.to_dict())
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
        first = not self.taken
        self._ask(batch)
        count = run_step(self.model, batch, self.asked, self.generator, self.measurement)
        self.counted += count
        self.taken += 1
        if first:
            self.measurement.after_first_batch(by_kind=self.by_kind)
        return count

    def _ask(self, batch: Any) -> None:
        """Ask the model in the first batch whether a prediction is that of the next token."""
        if self.begun:
            return
        self.begun = True
        if self.skip_last is not None:
            known = told(self.skip_last)
        else:
            self.measurement.pause()
            arguments = call_arguments(self.model, batch, self.asked)
            found = causality(self.model, arguments)
            if self.labels == GOLD:
                found = of_given_labels(self.model, batch, found)
            self.asked.causal, known = found
            self.measurement.resume()
        self.measurement.set_causal(self.asked.causal, known)

    def _keep_step(self, batch: Any) -> None:
        """Run a batch that does not count, with labels that are drawn apart."""
        self._ask(batch)  # it begins the next batch anew
        self.measurement.skip_next()
        aside = torch.Generator(self.generator.device)
        run_step(self.model, batch, self.asked, aside, self.measurement)

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
            "begun": self.begun, "causal": self.asked.causal,
            "likelihood": self.asked.likelihood and asdict(self.asked.likelihood),
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
        # What the first batch showed holds on: a shorter one might not show it again.
        self.begun, self.asked.causal = state.get("begun", False), state.get("causal", False)
        if state.get("likelihood"):
            self.asked.likelihood = Likelihood(**state["likelihood"])
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
        known = [Evidence.from_dict(each[KEY]) for each in provenances]
        merged[KEY] = reduce(merged_evidence, known).to_dict()
    describe = getattr(batches, "provenance", None)
    if callable(describe):
        merged["data"] = describe()
    return merged


def _checksum(layers: dict[str, LinearLayer]) -> int:
    """Return a checksum of the first numbers of each weight: of these weights, not others."""
    return checksum(local(each.stored()).flatten()[:256].float() for each in layers.values())
