"""Moment: one running second moment, as a float32 sum and an integer count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvfast import ops
from curvfast.errors import NonFiniteError
from curvfast.model.rows import Rows
from curvfast.ops import MomentRequest, TriangularSum


@dataclass
class Moment:
    """A running sum Σ x xᵀ and its rows; one may serve several layers."""

    sum: TriangularSum
    rows: int = 0
    members: set[str] = field(default_factory=set)
    spilled: TriangularSum | None = None
    """The float64 sum of spilled calls, if float32 is spilled."""
    calls: int = 0
    """Calls since the last spill."""

    def request(
        self, x: Tensor, rows: Rows, scale: float, weights: Tensor | None = None
    ) -> MomentRequest | None:
        """Note how many rows of x [..., d] count; return the update that sums them, if any does."""
        if not rows.count:
            return None
        self.rows += rows.count
        self.calls += 1
        x, index = rows.view(x)  # [rows, d] or [sequences, length, d]; index [count]
        if weights is not None:
            # w, [rows] or [sequences, length]: viewed as x is.
            weights = rows.view(weights.unsqueeze(-1))[0].squeeze(-1)
        return MomentRequest(self.sum, x, rows=index, weights=weights, scale=scale)

    def take_back(self, rows: Rows) -> None:
        """Forget the count of a request that was not run."""
        self.rows -= rows.count
        self.calls -= 1

    def absorb(self, other: Moment) -> None:
        """Add what another moment of as many features holds."""
        self.sum.tiles.add_(other.sum.tiles)
        if other.spilled is not None:
            self.spill()
            assert self.spilled is not None
            self.spilled.tiles.add_(other.spilled.tiles)
        self.rows += other.rows
        self.calls += other.calls

    def clear(self) -> None:
        """Empty it; its memory stays."""
        self.sum.tiles.zero_()
        if self.spilled is not None:
            self.spilled.tiles.zero_()
        self.rows = self.calls = 0

    def is_finite(self) -> bool:
        """Return whether the sum is finite: its diagonal, of squares, bounds every entry."""
        sums = [self.sum] if self.spilled is None else [self.sum, self.spilled]
        parts = [
            panel[start:stop].diagonal() for each in sums for start, stop, panel in each.panels()
        ]
        return all(ops.all_finite(part.unsqueeze(0)) for part in parts)

    def spill(self) -> None:
        """Move the float32 sum into float64."""
        if self.spilled is None:
            self.spilled = TriangularSum(
                torch.zeros_like(self.sum.tiles, dtype=torch.float64), self.sum.d
            )
        self.spilled.tiles.add_(self.sum.tiles)
        self.sum.tiles.zero_()
        self.calls = 0

    def dense(self) -> Tensor:
        """Return the sum as a matrix [d, d], float32."""
        if self.spilled is None:
            return self.sum.dense()
        total = TriangularSum(self.spilled.tiles + self.sum.tiles, self.sum.d)  # packed, float64
        return total.dense().float()

    def release(self) -> None:
        """Release the sum; the count stays."""
        self.sum = TriangularSum(self.sum.tiles.new_empty(0, self.sum.width), self.sum.d)
        self.spilled = None

    def split(self, leaving: set[str]) -> Moment:
        """Split off ``leaving`` into a separate moment that starts from the sum so far."""
        self.members -= leaving
        spilled = None if self.spilled is None else self.spilled.clone()
        return Moment(self.sum.clone(), self.rows, set(leaving), spilled, self.calls)


def distinct(moments: Mapping[str, Moment]) -> list[Moment]:
    """Return each moment once, however many layers share it."""
    return list({id(moment): moment for moment in moments.values()}.values())


def require_finite(side: str, moments: Mapping[str, Moment]) -> None:
    """Make sure that the sums of one side are finite.

    Raises:
        NonFiniteError: If squares overflowed.
    """
    for moment in distinct(moments):
        if not moment.is_finite():
            names = ", ".join(map(repr, sorted(moment.members)))
            raise NonFiniteError(
                f"the sum of squared {side.replace('_', ' ')} of {names} overflowed float32: its "
                "values are finite and beyond 1e19. The likely cause is a step that diverged, or a "
                "loss scale that was not divided out; leave out the batch, or pass loss_scale="
            )


def squared_norms(x: Tensor) -> Tensor:
    """Return ‖x_t‖² of each row of x [..., d], [...] float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=wide)  # [..., d] -> [...]
    return norms.float().square_()
