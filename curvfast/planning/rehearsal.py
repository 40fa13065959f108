"""A rehearsal: one batch of ``collect_from`` on the meta device, where tensors have only shapes.

The forward, the drawing of labels and the backward are those of the real pass, seen by the same
hooks. So shared inputs, saved activations and products are observed, not modelled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from curvfast.collection import placement
from curvfast.collection.hooks import Arrival, Capture, SharedInput
from curvfast.collection.likelihood import sampled_gradient
from curvfast.collection.step import backward_edge
from curvfast.model.batch import Batch
from curvfast.model.counted import CallRows
from curvfast.model.families import LinearLayer
from curvfast.model.forward import forward_of, logits_of
from curvfast.model.identity import is_causal_lm
from curvfast.model.layers import linear_layers
from curvfast.model.rows import AllRows
from curvfast.model.token_streams import TokenStreams
from curvfast.ops import blocked_second_moment, devices
from curvfast.ops.native import second_moment
from curvfast.planning.meta_device import FLASH_FLOPS, LiveBytes, MetaAnswers


def shared_inputs(readings: Iterable[set[str]], names: Iterable[str]) -> dict[str, str]:
    """Return the owner of each layer's A: the first layer that it shares it with, or itself.

    A group made by one call is split by a later one that only some of its members read, and never
    merged, as :class:`curvfast.collection.accumulator.Accumulator` splits its sums.

    Args:
        readings: The layers that read each input tensor, in the order they were read.
        names: Every layer, in module order.

    Returns:
        Layer name -> name of the layer that owns its A.
    """
    groups: list[set[str]] = []
    for readers in readings:
        newcomers = readers.difference(*groups)
        parts = [part for group in groups for part in (group & readers, group - readers) if part]
        groups = parts + ([newcomers] if newcomers else [])
    owners: dict[str, str] = {}
    for name in names:
        group = next((group for group in groups if name in group), {name})
        owners[name] = next((first for first in owners if first in group), name)
    return owners


class Scratch:
    """Allocates on the meta device the temporary buffers that adding rows needs on ``device``.

    On a CPU rows pass through a buffer: packed where the native core multiplies them unasked, in
    float32 elsewhere. GPU kernels read rows in place, and keep narrow ones alive until enough are
    queued for one launch (:mod:`curvfast.collection.placement`).
    """

    def __init__(self, device: torch.device) -> None:
        """Start with an empty queue."""
        self._device = device
        self._waiting: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Allocate the buffers for adding rows x [..., d]."""
        d, rows = x.shape[-1], x.shape[:-1].numel()
        if not devices.takes_kernels(self._device):
            torch.empty(self._buffer(x, rows, d), dtype=torch.uint8, device="meta")
        elif d <= placement.WIDEST and x.element_size() == 2:
            self._waiting.append(x)
            enough = sum(y.nbytes for y in self._waiting) >= placement.MOST_BYTES
            if enough or len(self._waiting) >= placement.MOST_CALLS:
                self._waiting.clear()

    @staticmethod
    def _buffer(x: Tensor, rows: int, d: int) -> int:
        if second_moment.packs(x.dtype, d):
            # The row offsets, and the packed rows.
            return 8 * rows + 4 * second_moment.room_words(x.dtype, rows, d)
        gathered = 0 if x.element_size() == 4 else x.element_size()
        return min(rows, blocked_second_moment.chunk_rows(d)) * d * (4 + gathered)


@dataclass(frozen=True)
class Rehearsal:
    """Rows, memory and FLOPs of one batch, found on the meta device."""

    owners: Mapping[str, str]
    """Layer -> the layer whose A it shares; its own name if it shares none."""
    rows: Mapping[str, int]
    """Layer -> counted rows of a batch."""
    labels: int
    """Labels drawn in a batch."""
    classes: int
    """Number of classes."""
    activations: int
    """Bytes that autograd keeps from the forward to the backward, without the logits."""
    logits: int
    """Bytes of the logits, overwritten by their gradient where the model allows it."""
    peak: int
    """Peak of bytes alive, without weights and sums."""
    forward_flops: int
    """FLOPs of the forward, as torch counts them."""
    backward_flops: Mapping[str, int]
    """Layer -> FLOPs of the backward down to the gradient of its output."""
    guessed_because: str | None = None
    """Why the batch was not rehearsed but estimated; None if it was rehearsed."""


def rehearse(
    model: nn.Module,
    layers: dict[str, LinearLayer],
    arguments: Mapping[str, Any],
    device: torch.device,
) -> Rehearsal:
    """Run one batch through ``model`` as ``collect_from`` would.

    Attention is that of fused kernels, which keep no score matrix. Where the model branches on its
    data, the condition is taken as true: sequences are unpadded, and not packed.

    Args:
        model: On the meta device, in eval mode. Its parameters are frozen and stay so.
        layers: The layers to measure.
        arguments: A batch on the meta device.
        device: Where the real pass will run.

    Returns:
        The observations.

    Raises:
        InputError: If the model returns no logits.
        Exception: Whatever a model raises that does not run on the meta device.
    """
    model.requires_grad_(False)
    arguments = {**forward_of(model).uncached, **arguments}
    batch = Batch(skip_last=is_causal_lm(model))
    streams = TokenStreams(model, layers.values())
    given = [value for value in arguments.values() if isinstance(value, Tensor)]
    live = LiveBytes([*model.parameters(), *model.buffers(), *given])
    count = FlopCounterMode(display=False, custom_mapping=FLASH_FLOPS)
    scratch = Scratch(device)
    readings: list[set[str]] = []
    rows: dict[str, int] = {}
    reached: dict[str, int] = {}

    def on_input(_name: str, _batch: CallRows, shared: SharedInput, x: Tensor) -> None:
        readings.append(shared.readers)
        scratch.add(x)

    def on_arrival(arrival: Arrival) -> None:
        name, g = arrival.layer, arrival.g
        rows[name] = rows.get(name, 0) + arrival.batch.rows(name, g.shape[:-1], g.device).count
        reached[name] = count.get_total_flops() - forward_flops
        scratch.add(g)

    capture = Capture(
        layers, lambda: batch, streams.current, on_arrival, on_input, share_inputs=True, driven=True
    )
    streams.attach()
    capture.attach()
    try:
        with MetaAnswers(), count, live, torch.enable_grad():
            output = model(**arguments)
            capture.flush()
            logits = logits_of(output)
            del output
            forward_flops, shape = count.get_total_flops(), logits.shape
            size = logits.nbytes
            activations = live.now - size
            edge = backward_edge(logits)
            every = AllRows(shape[:-1].numel())
            gradient, _ = sampled_gradient(logits, every, torch.Generator())
            del logits
            torch.autograd.backward((edge,), (gradient,))
    finally:
        capture.remove()
        streams.remove()
    return Rehearsal(
        owners=shared_inputs(readings, layers),
        rows=rows,
        labels=_labels(shape[:-1], causal=batch.skip_last),
        classes=shape[-1],
        activations=activations,
        logits=size,
        peak=live.peak,
        forward_flops=forward_flops,
        backward_flops=reached,
    )


def _labels(predictions: torch.Size, *, causal: bool) -> int:
    """Return how many predictions are scored: of a causal model not the last of a sequence."""
    last = predictions[:-1].numel() if causal and len(predictions) > 1 else 0
    return predictions.numel() - last


def estimate(
    model: nn.Module, layers: Mapping[str, LinearLayer], arguments: Mapping[str, Any], reason: str
) -> Rehearsal:
    """Estimate a batch's rows, memory and FLOPs from the linear layers alone.

    No A is assumed to be shared, which bounds sums, factors and their FLOPs from above. Every
    linear layer is assumed to see every position once, and to keep its input and output; attention
    and normalisation are not included.

    Args:
        model: The model.
        layers: The layers to measure.
        arguments: A batch.
        reason: Why there was no rehearsal.

    Returns:
        The estimate.
    """
    first = next(value for value in arguments.values() if isinstance(value, Tensor))
    rows = first.shape[:2].numel() if not first.is_floating_point() else first.shape[:-1].numel()
    linear = list(linear_layers(model).values())
    wide = sum(x.d_in + x.d_out for x in linear)
    size = next(model.parameters()).element_size()
    products = sum(2 * rows * x.d_in * x.d_out for x in linear)
    logits = rows * linear[-1].d_out * size
    return Rehearsal(
        owners={name: name for name in layers},
        rows=dict.fromkeys(layers, rows),
        labels=rows,
        classes=linear[-1].d_out,
        activations=rows * wide * size,
        logits=logits,
        peak=rows * wide * size + 2 * logits,
        forward_flops=products,
        backward_flops=dict.fromkeys(layers, products),
        guessed_because=reason,
    )
