"""What measuring each layer takes: bytes of its sums and factors, FLOPs of its second moments."""

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
    """One layer: y = x Wᵀ with W [d_out, d_in]."""

    name: str
    d_in: int
    d_out: int
    owner: str
    """The layer whose A it shares; itself, where it has its own."""
    rows: int
    """Rows of a batch that count."""
    a_bytes: int
    """Of the packed sum of A, shared or not."""
    g_bytes: int
    """Of the packed sum of G."""
    a_flops: int
    """Of adding one batch to A."""
    g_flops: int
    """Of adding one batch to G."""
    backward_flops: int
    """Of one batch's backward, from the loss to the gradient of this layer's output."""

    @property
    def shares(self) -> bool:
        """Whether its A is another layer's."""
        return self.owner != self.name

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-able values."""
        return asdict(self)


@dataclass(frozen=True)
class Totals:
    """Of layers measured together: a shared A counts once."""

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
        seen: What a batch does.
        device: Where the sums will live; it says how wide their tiles are.

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
    """Return what ``layers`` take together, in one pass."""
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
