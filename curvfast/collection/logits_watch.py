"""Watch: the gradient that arrives at a model's logits, a few rows of it, read once a batch."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from curvfast.collection import logits_reading, returned_loss
from curvfast.collection.cross_entropy import evenly, measure
from curvfast.collection.logits_reading import Reading
from curvfast.collection.logits_rows import (
    FEWEST,
    CandidateRows,
    candidate_rows,
    rows_read,
    take_rows,
)
from curvfast.collection.returned_loss import ReturnedLoss


class LogitsWatch:
    """The gradient at one tensor of logits, measured on the device when it arrives.

    Changes no gradient, waits for no device before :attr:`reading`, and holds a few rows of the
    logits until the gradient comes, and the gradient of many rows until the reading or the end of
    the backward: those that are not zero may have to be searched for.
    """

    def __init__(
        self,
        logits: Tensor,
        *,
        labels: Tensor | None = None,
        input_ids: Tensor | None = None,
        shifted: bool = False,
        beside: ReturnedLoss | None = None,
    ) -> None:
        """Choose rows and watch for their gradient.

        Args:
            logits: A differentiable output [..., C] or [N, C, ...].
            labels: Of the call: integers, -100 where there is none; or probabilities of the shape
                of the logits.
            input_ids: Tokens [sequences, length], which tell a causal model where labels do not.
            shifted: Whether ``labels`` are those of the next position already.
            beside: The loss of the call, whose factor is read in the same transfer.
        """
        self.shape = logits.shape
        self._coarse = logits.dtype.itemsize == 2
        self._beside = beside
        self._vector: Tensor | None = None
        self._reading: Reading | None = None
        self._seen = False
        self._held: Tensor | None = None
        self._logits = weakref.ref(logits)
        self._version = logits._version
        self._place = object()
        with torch.no_grad():
            self._rows, self._counts = candidate_rows(
                logits.detach(), labels, input_ids, shifted=shifted
            )
        # One of the first backward alone; a kept graph may bring more.
        node, self._output = _origin(logits)
        _marks(node)[self._place] = self._output
        node.register_prehook(self._arrive)

    @property
    def reading(self) -> Reading | None:
        """What the gradient shows, in one transfer from the device; None before it came."""
        if self._reading is None and self._vector is not None:
            self._reading = self._read()
        return self._reading

    def of_same_tensor(self, y: Tensor) -> bool:
        """Return whether the gradient of ``y`` is the one that is watched."""
        if y.grad_fn is None:
            return False
        node, output = _origin(y)
        return bool(_marks(node).get(self._place) == output)

    def see(self, gradient: Tensor) -> None:
        """Measure the gradient of the logits; of several the first."""
        if self._seen:
            return
        self._seen = True
        gradient = gradient.detach()
        self._coarse |= gradient.dtype.itemsize == 2
        with torch.no_grad():
            vectors = [rows.measure(gradient) for rows in self._rows]
            if self._counts is not None:
                vectors.append(self._counts)
            self._vector = torch.cat(vectors)
        self._rows = [replace(rows, logits=rows.logits[:0].clone()) for rows in self._rows]
        if not self._rows[0].complete:
            self._hold(gradient)

    def _arrive(self, gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[self._output]
        if gradient is not None:
            self.see(gradient.reshape(self.shape))

    def _hold(self, gradient: Tensor) -> None:
        watch = weakref.ref(self)

        def release() -> None:
            if (held := watch()) is not None:
                held._held = None

        try:
            torch.autograd.Variable._execution_engine.queue_callback(release)
        except RuntimeError:
            return  # Seen outside a backward: nothing would let it go.
        self._held = gradient

    def _read(self) -> Reading:
        assert self._vector is not None
        vector, beside = self._vector, None
        if self._beside is not None:
            beside = self._beside.vector()
        if beside is not None and beside.device == vector.device:
            vector = torch.cat([vector, beside])
        values = vector.tolist()
        if len(vector) > len(self._vector):
            assert self._beside is not None
            self._beside.take(*values[-returned_loss.WIDTH :])
        readings = [
            self._reading_of(rows, values[i * logits_reading.WIDTH :])
            for i, rows in enumerate(self._rows)
        ]
        counted = values[len(self._rows) * logits_reading.WIDTH :]
        reading = next((r for r in readings if r.is_cross_entropy), readings[0])
        if self._counts is not None:
            own, ahead = (int(count) for count in counted[:2])
            reading = replace(reading, labels=own, labels_ahead=ahead)
        unlucky = reading.moved < (FEWEST if self._counts is None else 1)
        if unlucky and reading.finite and not reading.complete:
            reading = self._search(reading)
        self._held = self._vector = None
        return reading

    def _reading_of(self, rows: CandidateRows, values: list[float]) -> Reading:
        return Reading.of(
            values[: logits_reading.WIDTH],
            classes=self.shape[rows.axis],
            coarse=self._coarse,
            complete=rows.complete,
        )

    @torch.no_grad()
    def _search(self, reading: Reading) -> Reading:
        """Return what rows with a gradient show, searched for among all: a second transfer."""
        gradient, logits = self._held, self._logits()
        if gradient is None:
            return reading
        moved = [(gradient != 0).any(rows.axis).flatten() for rows in self._rows]  # [rows] each
        counts = [rows.sum().double()[None] for rows in moved]
        if logits is None or logits._version != self._version:
            return replace(reading, moved=int(counts[0]), complete=True)
        vectors = []
        for rows, alive in zip(self._rows, moved, strict=True):
            wanted = rows_read(self.shape[rows.axis])
            index, exists = evenly(alive, wanted)
            z, g = (take_rows(t.detach(), rows.axis, index) for t in (logits, gradient))
            vectors.append(measure(z, g, exists, wanted))
        values = torch.cat([*vectors, *counts]).tolist()
        found = []
        for i, rows in enumerate(self._rows):
            own = self._reading_of(rows, values[i * logits_reading.WIDTH :])
            total = int(values[len(vectors) * logits_reading.WIDTH + i])
            found.append(
                replace(
                    own,
                    votes=reading.votes,
                    moved=total,
                    complete=True,
                    labels=reading.labels,
                    labels_ahead=reading.labels_ahead,
                )
            )
        return next((r for r in found if r.is_cross_entropy), found[0])


def _origin(logits: Tensor) -> tuple[Node, int]:
    """Return the node that made ``logits`` and which of its outputs they are.

    Under mixed precision accelerate returns a float32 copy of the logits that made the loss.
    """
    edge = get_gradient_edge(logits)
    node, output = edge.node, edge.output_nr
    while node.name().startswith("ToCopyBackward"):
        source, number = node.next_functions[0]
        if source is None:
            break
        node, output = source, number
    return node, output


def _marks(node: Node) -> dict[Any, Any]:
    """Return what is noted on a node: a node itself would be held with all of its graph."""
    return cast(dict[Any, Any], node.metadata)
