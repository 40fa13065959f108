"""Cost of a collection: FLOPs of the model's own passes, and of measuring each layer.

A product of [m, k] and [k, n] is 2·m·k·n FLOPs, as torch counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from curvfast import ops
from curvfast.model.families import LinearLayer
from curvfast.ops import blocked_second_moment, devices, sum_bytes
from curvfast.ops.native import second_moment
from curvfast.planning.rehearsal import Rehearsal

# Of a logit: subtract the maximum, exponentiate, add up, divide, compare with the number drawn.
_FLOPS_OF_A_LOGIT = 5
# Golub and Van Loan, Matrix Computations, section 8.3: eigenvalues and vectors by symmetric QR.
_EIGH_FLOPS = 9
_EIGH_NUMBERS = 5


def moment_flops(d: int, rows: int, device: torch.device) -> int:
    """Return the FLOPs of adding ``rows`` rows of d features to a packed sum: one triangle.

    On a GPU the tiles on the diagonal are multiplied whole; on a CPU only down to the diagonal of
    narrow strips (:mod:`curvfast.ops.native.second_moment`), or of steps
    (:mod:`curvfast.ops.blocked_second_moment`).
    """
    if devices.takes_kernels(device):
        return 2 * rows * (sum_bytes(d, device) // 4)
    if second_moment.packs(torch.float32, d):
        return 2 * rows * second_moment.products(d)
    width, step = blocked_second_moment.panel_width(d), blocked_second_moment.diagonal_step(d)
    entries = 0
    for start in range(0, d, width):
        stop = min(start + width, d)
        entries += start * (stop - start)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            entries += (last - start) * (last - first)
    return 2 * rows * entries


def sampling_flops(labels: int, classes: int) -> int:
    """Return the FLOPs of drawing labels from softmax(logits) and subtracting them: 5 a logit."""
    return _FLOPS_OF_A_LOGIT * labels * classes


def eigh_flops(d: int) -> int:
    """Return the FLOPs of a symmetric eigendecomposition with vectors, about 9 d³."""
    return _EIGH_FLOPS * d**3


def eigh_bytes(d: int) -> int:
    """Return the bytes that :meth:`curvfast.Factors.eigh` needs for one factor: 5 d² of float64."""
    return 8 * _EIGH_NUMBERS * d**2


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


@dataclass(frozen=True)
class Cost:
    """FLOPs of one batch, in every pass together; matrix products are counted as torch does."""

    forward: int
    backward: int
    """FLOPs of activation gradients only, down to the first chosen layer of a pass."""
    moments: int
    """FLOPs of the sums A += a aᵀ and G += g gᵀ, one triangle of tiles."""
    sampling: int
    """FLOPs of drawing labels from the logits, and of the gradient there."""

    @property
    def total(self) -> int:
        """Sum of all terms."""
        return self.forward + self.backward + self.moments + self.sampling

    @property
    def overhead(self) -> float:
        """FLOPs of measuring over those of forward and backward."""
        return (self.moments + self.sampling) / max(1, self.forward + self.backward)

    def to_dict(self) -> dict[str, Any]:
        """Return the terms, their sum and the overhead as JSON-able values."""
        return {**asdict(self), "total": self.total, "overhead": self.overhead}


def cost(seen: Rehearsal, parts: Iterable[Totals]) -> Cost:
    """Return the FLOPs of one batch that is passed once for each of ``parts``."""
    parts = list(parts)
    return Cost(
        forward=len(parts) * seen.forward_flops,
        backward=sum(part.backward_flops for part in parts),
        moments=sum(part.moment_flops for part in parts),
        sampling=len(parts) * sampling_flops(seen.labels, seen.classes),
    )


def busiest(spent: Cost, batches: int, passes: int, world_size: int) -> float:
    """Return the FLOPs of the busiest device: its passes over its share of the data.

    Devices share the passes first; those left over share the batches of each pass.
    """
    sharers = max(1, world_size // passes)
    return spent.total / passes * -(-passes // world_size) * -(-batches // sharers)
