"""Memory model: bytes on a device during a pass over the data and while factors are read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from curvfast.planning.layers import Totals
from curvfast.planning.rehearsal import Rehearsal


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors on the device that runs the model.

    Not included: a GPU's context, the workspaces of its libraries, and fragmentation of its
    allocator.
    """

    weights: int
    """Parameters and buffers."""
    activations: int
    """Activations that autograd keeps from the forward to the backward."""
    logits: int
    """The logits, or their gradient in the same memory."""
    temporaries: int
    """Further tensors alive at the peak: gradients in flight, copies in another dtype."""
    sums: int
    """Packed sums, during the whole pass."""
    factors: int
    """Dense factors, read from the sums at the end, after the activations are freed."""

    @property
    def during_pass(self) -> int:
        """Peak of bytes alive during the pass."""
        return self.weights + self.activations + self.logits + self.temporaries + self.sums

    @property
    def read_out(self) -> int:
        """Peak of bytes alive while the factors are read from the sums."""
        return self.weights + self.sums + self.factors

    @property
    def peak(self) -> int:
        """Peak of bytes alive."""
        return max(self.during_pass, self.read_out)

    def to_dict(self) -> dict[str, Any]:
        """Return the terms and their sums as JSON-able values."""
        return {
            **asdict(self),
            "during_pass": self.during_pass,
            "read_out": self.read_out,
            "peak": self.peak,
        }


def with_sums_here(weights: int, seen: Rehearsal, needs: Totals) -> Memory:
    """Return the memory of a pass whose sums and factors stay on the device."""
    return _memory(weights, seen, needs.sums, needs.factors)


def with_sums_elsewhere(weights: int, seen: Rehearsal, needs: Totals) -> Memory:
    """Return the memory of a pass whose sums and factors live on the host or on disk.

    One sum at a time is moved to the device, at the peak the largest.
    """
    return _memory(weights, seen, needs.largest_sum, 0)


def _memory(weights: int, seen: Rehearsal, sums: int, factors: int) -> Memory:
    return Memory(
        weights=weights,
        activations=seen.activations,
        logits=seen.logits,
        temporaries=seen.peak - seen.activations - seen.logits,
        sums=sums,
        factors=factors,
    )
