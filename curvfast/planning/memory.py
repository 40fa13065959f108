"""Bytes on a device, term by term: during a pass over the data, and while factors are read out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from curvfast.planning.layers import Totals
from curvfast.planning.rehearsal import Rehearsal


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors on the device that runs the model.

    What no tensor shows comes on top: a GPU's context, the workspaces of its libraries, and what
    the allocator rounds up or cannot reuse.
    """

    weights: int
    """Parameters and buffers."""
    activations: int
    """What autograd keeps from the forward to the backward."""
    logits: int
    """The logits, or their gradient in the same place."""
    temporaries: int
    """What else is alive at the worst moment: gradients under way, a copy in another dtype."""
    sums: int
    """Packed sums, for as long as the pass lasts."""
    factors: int
    """Dense factors, read from the sums at the end, when no activation is left."""

    @property
    def during_pass(self) -> int:
        """Most bytes alive at once while data passes."""
        return self.weights + self.activations + self.logits + self.temporaries + self.sums

    @property
    def read_out(self) -> int:
        """Most bytes alive at once while the factors are read from the sums."""
        return self.weights + self.sums + self.factors

    @property
    def peak(self) -> int:
        """Most bytes alive at once."""
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

    One sum at a time visits the device, the largest at the worst moment.
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
