"""Batches: which batch of the loop a call of a layer belongs to.

A batch begins with the model's forward; or, where the loop calls a part of the model itself, with
the first layer seen outside of one. What ``mask()`` and ``labels()`` said holds for it alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.collection.logits_reading import Reading
from curvfast.collection.logits_watch import LogitsWatch
from curvfast.collection.outputs import differentiable
from curvfast.collection.proofs import DRIVEN, Proofs
from curvfast.collection.returned_loss import ReturnedLoss
from curvfast.collection.unit import Counts, Unit, Unknown
from curvfast.model.batch import Batch
from curvfast.model.call import Call
from curvfast.model.counted import CallRows
from curvfast.model.rows import IGNORED_LABEL, RowRule, Rows, nothing
from curvfast.model.stream import TokenStream
from curvfast.model.token_streams import recomputing


@dataclass(eq=False)
class MeasuredBatch(Batch):
    """A batch, and what its gradients have shown so far."""

    number: int = 0
    """Of the batches that count, from 1."""
    bypassed: bool = False
    """Whether the loop called a part of the model instead of the model."""
    shown: bool = False
    """Whether a chosen layer was seen in its forward."""
    begun: bool = False
    """Whether a gradient of it has arrived."""
    call: Call | None = None
    """What the outermost module of it was called with."""
    loss: ReturnedLoss | None = None
    """The loss that the model returned."""
    watches: dict[str, LogitsWatch] = field(default_factory=dict)
    """Of what may be its logits, by name."""
    heads: list[Tensor] = field(default_factory=list)
    """What the output head returned, for a model that returns no logits."""
    unit: Unit | Unknown | None = None
    """Known from its first gradient on."""
    finite: bool = True
    """Whether its loss and logits are."""
    silent: bool = False
    """Whether no label is scored."""
    streams: dict[TokenStream, tuple[CallRows, torch.Size]] = field(default_factory=dict)
    """What rows of measured layers stood for, with the first such call and its leading shape."""

    def stream_on(self, grid: torch.Size) -> tuple[CallRows, torch.Size] | None:
        """Return the call of a layer whose rows stand for the positions of a grid, if one does.

        Args:
            grid: [sequences, length] of the tokens that a model embedded.
        """
        found = [each for stream, each in self.streams.items() if stream.grid == grid]
        return found[0] if len(found) == 1 else None

    @property
    def counts(self) -> bool:
        """Whether its rows are added, as far as its unit and its logits say."""
        return isinstance(self.unit, Unit) and self.finite and not self.silent

    def counts_of(self, reading: Reading | None) -> Counts:
        """Return what a mean loss of this batch may be over.

        Args:
            reading: What the gradient at its logits shows, which counts the labels of the call.
        """
        call = self.call or Call()
        items = None if call.num_items is None else int(call.num_items)
        own = call.labels if call.shift_labels is None else call.shift_labels
        labels = None
        if reading is not None and reading.shifted is None:
            # The gradient does not tell, so the class of the model does.
            labels = reading.labels_ahead if self.skip_last else reading.labels
        if reading is None and own is not None and not own.is_floating_point():
            shifted = self.skip_last and call.shift_labels is None and own.dim() > 1
            labels = int(((own[..., 1:] if shifted else own) != IGNORED_LABEL).sum())
        shapes = [watch.shape for watch in self.watches.values()]
        if not shapes:
            return Counts(items=items, labels=labels)
        shape = shapes[0]
        return Counts(items, labels, shape[:-1].numel(), shape[0])


@dataclass(frozen=True)
class Said:
    """What was said of the next batch before its forward."""

    mask: Tensor | None = None
    labels: int | None = None
    scored: Tensor | None = None
    several: bool = False
    thin: Callable[[Rows, torch.device], Rows] | None = None


_NOTHING = Said()


@dataclass(frozen=True)
class Rules:
    """What holds for every batch of a measurement."""

    rows: RowRule | None
    thin: Callable[[Rows, torch.device], Rows] | None
    every: int
    """One in this many calls of the model is counted."""
    parts: int
    """Number of sums that batches are added to in turn."""
    driven: bool
    """Whether the measurement makes the gradients itself."""


class Batches:
    """The batches of a loop, one after another."""

    def __init__(self, model: nn.Module, rules: Rules, proofs: Proofs) -> None:
        """Start before the first batch.

        Args:
            model: Whose forward begins a batch.
            rules: Of every batch.
            proofs: Say whether position t predicts the token at t + 1, as far as is known.
        """
        self._model, self._rules, self._proofs = model, rules, proofs
        self._said = _NOTHING
        self.deaf = False
        """True while nothing counts."""
        self.calls = self.counted = 0
        """Calls of the model so far, and those of them that count."""
        self.running: MeasuredBatch | None = None
        """The batch of the model's forward, while it runs."""
        self._recomputed: weakref.ref[MeasuredBatch] | None = None
        """Whose backward runs, held by its graph alone."""
        self._bypassing: MeasuredBatch | None = None

    def tell(self, **facts: Any) -> None:
        """Note what is said of the next batch."""
        self._said = replace(self._said, **facts)

    def open(self, module: nn.Module, call: Call) -> None:
        """Begin a batch with a call of the model, or of a part of it from outside."""
        if not torch.is_grad_enabled() or self.deaf:
            # An evaluation between steps: it counts nothing, and what was told still holds.
            if module is self._model:
                self.running = MeasuredBatch(skip_last=False, idle=True)
            return
        if module is self._model:
            self.running, self._bypassing = self._new(bypassed=False), None
        batch = self.current()
        if batch.call is None:
            batch.call = call

    def close(self, module: nn.Module, output: Any) -> MeasuredBatch | None:
        """End a call that :meth:`open` began; return its batch if that counts and did not raise."""
        batch = self.running
        if module is self._model:
            self.running = None
        elif torch.is_grad_enabled() and not self.deaf:
            batch = self.current()
        if batch is None or batch.idle or output is None:
            return None
        for tensor in differentiable(output):
            # A re-entrant recomputation, in the backward, needs the batch it belongs to.
            tensor.register_hook(partial(self._enter_backward, batch))
        return batch

    def _enter_backward(self, batch: MeasuredBatch, _: Tensor) -> None:
        self._recomputed = weakref.ref(batch)
        if batch is self._bypassing:
            self._bypassing = None

    def of_layer(self) -> MeasuredBatch:
        """Return the batch of a chosen layer that is called now."""
        batch = self.current()
        batch.shown = True
        return batch

    def running_or_open(self) -> MeasuredBatch | None:
        """Return the batch that a call of the loop is in or has begun, without beginning one."""
        if self.running is not None:
            return self.running
        batch = self._bypassing
        return None if batch is None or batch.begun or recomputing() else batch

    def current(self) -> MeasuredBatch:
        """Return the batch of what is called now."""
        if self.running is not None:
            return self.running
        if recomputing():
            batch = None if self._recomputed is None else self._recomputed()
            batch = self._bypassing or batch
            if batch is not None:
                return batch
        if not torch.is_grad_enabled():
            return MeasuredBatch(skip_last=False, idle=True)
        batch = self._bypassing
        if batch is None or batch.begun or self._said is not _NOTHING:
            batch = self._bypassing = self._new(bypassed=True)
        return batch

    def forget(self) -> None:
        """Hold no batch any more."""
        self.running = self._recomputed = self._bypassing = None

    def _new(self, *, bypassed: bool) -> MeasuredBatch:
        said, self._said = self._said, _NOTHING
        rules = self._rules
        idle = self.calls % rules.every != 0
        self.calls += 1
        batch = MeasuredBatch(
            skip_last=self._proofs.causality.causal, rule=rules.rows, mask=said.mask,
            labels=said.labels, scored=said.scored, several=said.several,
            thin=said.thin or rules.thin, idle=idle, bypassed=bypassed,
        )  # fmt: skip
        if not idle:
            batch.half = self.counted % rules.parts
            self.counted += batch.thin is not nothing
            batch.number = self.counted
        if rules.driven:
            batch.unit = Unit(1.0, DRIVEN)
        return batch
