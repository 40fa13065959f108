"""Estimate from the linear layers, for models that do not run on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from curvfast.adapters import LinearLayer
from curvfast.layers import linear_layers
from curvfast.planning.rehearsal import Rehearsal


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
