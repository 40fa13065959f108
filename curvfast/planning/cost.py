"""FLOPs of a collection: the model's own passes, and the overhead of measuring."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from curvfast.planning.flops import sampling_flops
from curvfast.planning.layers import Totals
from curvfast.planning.rehearsal import Rehearsal


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
