"""A rehearsal: one batch of ``collect_from`` on the meta device, where tensors have only shapes.

The forward, the drawing of labels and the backward are those of the real pass, seen by the same
hooks. So shared inputs, saved activations and products are observed, not modelled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from curvfast.adapters import LinearLayer
from curvfast.capture import Arrival, Capture, SharedInput
from curvfast.counted_rows import AllRows
from curvfast.fisher import sampled_gradient
from curvfast.forward import forward_of
from curvfast.planning.answers import FLASH_FLOPS, MetaAnswers
from curvfast.planning.live import LiveBytes
from curvfast.planning.scratch import Scratch
from curvfast.planning.sharing import shared_inputs
from curvfast.provenance import is_causal_lm
from curvfast.rows import Batch, Routed, read_call
from curvfast.steps import backward_edge, logits_of


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
    read_call(batch, arguments)
    given = [value for value in arguments.values() if isinstance(value, Tensor)]
    live = LiveBytes([*model.parameters(), *model.buffers(), *given])
    count = FlopCounterMode(display=False, custom_mapping=FLASH_FLOPS)
    scratch = Scratch(device)
    readings: list[set[str]] = []
    rows: dict[str, int] = {}
    reached: dict[str, int] = {}

    def on_input(_name: str, _batch: Batch | Routed, shared: SharedInput, x: Tensor) -> None:
        readings.append(shared.readers)
        scratch.add(x)

    def on_arrival(arrival: Arrival) -> None:
        name, g = arrival.layer, arrival.g
        rows[name] = rows.get(name, 0) + arrival.batch.rows(name, g.shape[:-1], g.device).count
        reached[name] = count.get_total_flops() - forward_flops
        scratch.add(g)

    capture = Capture(layers, lambda: batch, on_arrival, on_input, share_inputs=True, driven=True)
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
            batch.predictions = shape[:-1]
            edge = backward_edge(logits)
            every = AllRows(shape[:-1].numel())
            gradient, _ = sampled_gradient(logits, every, torch.Generator())
            del logits
            torch.autograd.backward((edge,), (gradient,))
    finally:
        capture.remove()
    return Rehearsal(
        owners=shared_inputs(readings, layers),
        rows=rows,
        labels=batch.label_count(),
        classes=shape[-1],
        activations=activations,
        logits=size,
        peak=live.peak,
        forward_flops=forward_flops,
        backward_flops=reached,
    )
