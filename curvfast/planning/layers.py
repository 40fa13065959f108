"""Cost of measuring each layer: bytes of its sums and factors, FLOPs of its second moments."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from curvfast import ops
from curvfast.adapters import LinearLayer
from curvfast.planning.flops import eigh_flops, moment_flops
from curvfast.planning.rehearsal import Rehearsal


@dataclass(frozen=True)
class LayerPlan:
    """Cost of one layer y = x Wᵀ with W [d_out, d_in]."""

    name: str
    d_in: int
    d_out: int
    owner: str
    """The layer whose A it shares; its own name if it shares none."""
    rows: int
    """Counted rows of a batch."""
    a_bytes: int
    """Bytes of the packed sum of A, shared or not."""
    g_bytes: int
    """Bytes of the packed sum of G."""
    a_flops: int
    """FLOPs of adding one batch to A."""
    g_flops: int
    """FLOPs of adding one batch to G."""
    backward_flops: int
    """FLOPs of one batch's backward, from the loss to the gradient of this layer's output."""

    @property
    def shares(self) -> bool:
        """Whether its A is another layer's."""
        return self.owner != self.name

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-able values."""
        return asdict(self)


@dataclass(frozen=True)
class Totals:
    """Total cost of layers measured together; a shared A counts once."""

    sums: int
    """Bytes of the packed sums, float32."""
    factors: int
    """Bytes of the factors read from them, dense float32."""
    largest_sum: int
    """Bytes of the largest packed sum."""
    moment_flops: int
    """FLOPs of adding one batch."""
    backward_flops: int
    """FLOPs of one batch's backward, down to the lowest of the layers."""
    eigh_flops: int
    """FLOPs of decomposing every factor once."""
    widest: int
    """Features of the widest factor."""


def layer_plans(
    layers: dict[str, LinearLayer], seen: Rehearsal, device: torch.device
) -> tuple[LayerPlan, ...]:
    """Return the plan of each layer, in module order.

    Args:
        layers: The chosen layers.
        seen: The rehearsed batch.
        device: Device of the sums, which determines the width of their tiles.

    Returns:
        One plan a layer.
    """
    return tuple(
        LayerPlan(
            name,
            layer.d_in,
            layer.d_out,
            seen.owners[name],
            seen.rows.get(name, 0),
            ops.sum_bytes(layer.d_in, device),
            ops.sum_bytes(layer.d_out, device),
            moment_flops(layer.d_in, seen.rows.get(name, 0), device),
            moment_flops(layer.d_out, seen.rows.get(name, 0), device),
            seen.backward_flops.get(name, 0),
        )
        for name, layer in layers.items()
    )


def totals(layers: Iterable[LayerPlan]) -> Totals:
    """Return the total cost of ``layers`` in one pass."""
    layers = list(layers)
    inputs = list({layer.owner: layer for layer in layers}.values())
    widths = [layer.d_in for layer in inputs] + [layer.d_out for layer in layers]
    sums = [layer.a_bytes for layer in inputs] + [layer.g_bytes for layer in layers]
    return Totals(
        sums=sum(sums),
        factors=sum(4 * d * d for d in widths),
        largest_sum=max(sums),
        moment_flops=sum(x.a_flops for x in inputs) + sum(x.g_flops for x in layers),
        backward_flops=max(layer.backward_flops for layer in layers),
        eigh_flops=sum(map(eigh_flops, widths)),
        widest=max(widths),
    )
