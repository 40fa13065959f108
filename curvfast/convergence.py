"""Stopping rule of a collection: the factors of two halves of the batches are compared."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from curvfast.core.agreement import agreements
from curvfast.core.factors import Factors
from curvfast.errors import InputError


@dataclass(frozen=True)
class Converged:
    """Stopping rule ``until="converged"``: both halves share enough curvature mass per layer."""

    shared_mass: float = 0.95
    """Share of the other half's curvature that the kept pairs of one half must hold, in (0, 1)."""
    mass: float = 0.6
    """ρ of the kept pairs."""
    first: int = 8
    """Batches before the first comparison."""
    growth: float = 1.5
    """Factor by which the number of batches grows from one comparison to the next."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            InputError: If one is out of range.
        """
        if not (0 < self.shared_mass < 1 and 0 < self.mass < 1):
            raise InputError(
                f"shared_mass={self.shared_mass}, mass={self.mass}: both are shares, in (0, 1)"
            )
        if self.first < 2 or self.growth <= 1:
            raise InputError(
                f"first={self.first}, growth={self.growth}: two halves need 2 batches, and later "
                "comparisons must come later: growth above 1"
            )

    def next(self, batches: int) -> int:
        """Return the number of batches at which the next comparison is made."""
        return max(self.first, round(self.growth * batches), batches + 2)


def compare(rule: Converged, halves: tuple[Factors, Factors], labels: int) -> dict[str, Any]:
    """Return one point of the convergence curve, JSON-able.

    Args:
        rule: The stopping rule.
        halves: The factors of even and of odd batches.
        labels: Number of labels counted so far.

    Returns:
        ``labels``, ``converged``, ``worst`` (the smallest shared mass), and by layer its shared
        mass and principal angles.
    """
    found = agreements(*halves, rule.mass)
    worst = min((layer.shared_mass for layer in found.values()), default=0.0)
    whole = bool(found) and halves[0].keys() == halves[1].keys()
    return {
        "labels": labels,
        "converged": whole and worst >= rule.shared_mass,
        "worst": worst,
        "layers": {name: asdict(layer) for name, layer in found.items()},
    }
