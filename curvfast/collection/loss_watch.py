"""LossWatch: what the two ends of a model show, where tokens enter and logits leave it."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch import Tensor, nn

from curvfast.collection.batches import Batches, MeasuredBatch
from curvfast.collection.config import CollectConfig
from curvfast.collection.logits_reading import Reading
from curvfast.collection.logits_watch import LogitsWatch
from curvfast.collection.outputs import watchable
from curvfast.collection.proofs import Proofs
from curvfast.collection.reach import due, input_embedding
from curvfast.collection.refusal import Refusals
from curvfast.collection.returned_loss import MeanLoss, returned_loss
from curvfast.collection.scaled_steps import ScaledSteps
from curvfast.collection.unit import Told, Unit, Unknown, one_of, unit_of
from curvfast.model.call import Call
from curvfast.model.families import Removable, watch_forward
from curvfast.model.token_streams import Frame, TokenStreams


class LossWatch:
    """Learns, batch by batch, the unit of a loop's loss and what its labels reach."""

    def __init__(
        self,
        config: CollectConfig,
        proofs: Proofs,
        batches: Batches,
        streams: TokenStreams,
        steps: ScaledSteps | None,
        refusals: Refusals,
    ) -> None:
        """Store what it reads and what it tells.

        Args:
            config: What the caller said of the loss.
            proofs: Told of every batch.
            batches: Tells which batch a call belongs to.
            streams: Tells which call an embedding runs in.
            steps: The steps of a scaled loop, or None.
            refusals: Takes errors found inside hooks.
        """
        self._config, self._proofs, self._batches = config, proofs, batches
        self._streams, self._steps, self._refusals = streams, steps, refusals
        self.mean = MeanLoss()
        """Of the losses that the model returned."""

    def attach(self, model: nn.Module) -> list[Removable]:
        """Register hooks where tokens enter a model and where its logits leave it."""
        ends = (
            (input_embedding(model), self._after_embedding),
            (output_head(model), self._after_head),
        )
        return [
            watch_forward(module, partial(self._refusals.run, after, aside=None))
            for module, after in ends
            if module is not None
        ]

    def watch(self, batch: MeasuredBatch, output: Any) -> None:
        """Watch the loss and the logits in what the model returned for a batch."""
        batch.loss = returned_loss(output)
        found = watchable(output)
        for name, logits in found.items():
            self._watch_logits(batch, name, logits)
        if not found:
            for head in batch.heads:
                self._watch_logits(batch, "output head", head)
        batch.heads.clear()

    def _watch_logits(self, batch: MeasuredBatch, name: str, logits: Tensor) -> None:
        call = batch.call or Call()
        labels = call.labels if call.shift_labels is None else call.shift_labels
        number = sum(key.startswith(name) for key in batch.watches)
        batch.watches[f"{name} {number}" if number else name] = LogitsWatch(
            logits, labels=labels, input_ids=call.ids, shifted=call.shift_labels is not None,
            beside=None if batch.watches else batch.loss,
        )  # fmt: skip

    def _after_head(self, module: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
        """Watch what the output head returned, where the model does not return it."""
        if not isinstance(y, Tensor) or not y.requires_grad or self._batches.deaf:
            return
        batch = self._batches.running_or_open()
        if batch is None or batch.idle or not watchable(y):
            return
        if batch.bypassed:
            self._watch_logits(batch, "output head", y)
        else:
            batch.heads.append(y)

    def _after_embedding(self, module: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
        """Probe which positions reach a label, at the output of the input embedding."""
        if not isinstance(y, Tensor) or not y.requires_grad or self._batches.deaf:
            return
        batch = self._batches.running_or_open()
        if batch is None or batch.idle or batch.rule is not None or not due(batch.number):
            return
        if batch.call is not None and batch.call.images_too:
            return  # Their features take the place of embeddings, which then have no gradient.
        ids = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
        if ids is not None and ids.shape == y.shape[:-1]:
            y.register_hook(partial(self._probe, batch, self._streams.current()))

    def _probe(self, batch: MeasuredBatch, frame: Frame | None, g: Tensor) -> None:
        if not batch.counts or self._batches.deaf or batch.thin is not None:
            return
        # What measured layers read was embedded here: of this call's tokens, or of their shape.
        own = None if frame is None else batch.streams.get(frame.stream)
        found = own or batch.stream_on(g.shape[:-1])
        if found is not None and found[0].stream(found[1]).grid is not None:
            self._proofs.reach.note(*found, batch, g)

    def settle(self, batch: MeasuredBatch, g: Tensor) -> None:
        """Learn unit and causality of a batch from the first of its gradients; once."""
        if batch.unit is not None:
            return
        batch.begun = True
        for watch in batch.watches.values():
            # A measured output head: its own hook runs before the one that watches.
            if watch.shape == g.shape and watch.reading is None:
                watch.see(g)
        reading = one_of({n: r for n, w in batch.watches.items() if (r := w.reading) is not None})
        factor = None if batch.loss is None else batch.loss.factor
        if isinstance(reading, Unknown):
            batch.unit = reading
        else:
            batch.unit = unit_of(reading, self._told(batch), batch.counts_of(reading), factor)
            if reading is not None:
                self._proofs.causality.see(reading.shifted, batch.number)
                batch.silent = reading.silent
                batch.finite = reading.finite
        if batch.loss is not None and batch.loss.value is not None:
            figures = (batch.loss.value, batch.loss.factor or 0.0)
            batch.finite = batch.finite and all(map(math.isfinite, figures))
        batch.skip_last = self._proofs.causality.causal
        if not batch.finite:
            self._proofs.note_bad(batch.number)
        elif not batch.silent:
            self._proofs.note_unit(batch.unit, batch.number)
            if batch.loss is not None and isinstance(batch.unit, Unit):
                own = reading.counted_labels if isinstance(reading, Reading) else []
                self.mean.add(batch.loss, batch.unit.value, next(iter(own), None))
        batch.watches.clear()
        # A loss that is held holds its batch: of what that was called with, the labels stay.
        batch.call = None if batch.call is None else Call(labels=batch.call.labels)

    def _told(self, batch: MeasuredBatch) -> Told:
        config, amp = self._config, None if self._steps is None else self._steps.scale
        return Told(config.loss_reduction, config.loss_scale, amp, batch.labels)


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the module that makes a model's logits, or None if it does not say."""
    get = getattr(model, "get_output_embeddings", None)
    try:
        found = get() if callable(get) else None
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, nn.Module) else None
