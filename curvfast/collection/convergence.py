"""Stopping rule of a collection: the agreement of the factors of two halves of the batches.

The selection from one half of the data is scored by the curvature of the other. By Ky Fan's
theorem no k pairs hold more of it than its own first k, so the share is at most 1.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from curvfast.errors import InputError, NumericalWarning
from curvfast.kfac.factors import Factors
from curvfast.kfac.layer_basis import LayerBasis, diagonal
from curvfast.kfac.layer_factors import LayerFactors
from curvfast.kfac.selection.staircase import Staircase, staircase_by_mass, staircase_by_pairs


@dataclass(frozen=True)
class Agreement:
    """Agreement of two measurements of one layer."""

    shared_mass: float
    """Curvature mass of the other measurement that one's kept pairs hold, over that of as many of
    the other's own top pairs; the smaller of both directions. 1 is perfect."""
    angle_a: float
    """Largest principal angle between the leading eigenvectors of A, in degrees."""
    angle_g: float
    """Largest principal angle between the leading eigenvectors of G, in degrees."""


def agreements(one: Factors, two: Factors, mass: float) -> dict[str, Agreement]:
    """Compare two measurements layer by layer.

    Args:
        one: Factors.
        two: Factors of the same model; layers missing in either are left out.
        mass: ρ of the kept pairs, and of the leading eigenvectors compared.

    Returns:
        The agreement of each layer both hold.

    Raises:
        InputError: If ``mass`` is outside (0, 1].
    """
    names = [name for name in one if name in two]
    with warnings.catch_warnings():
        # Early halves are rank-deficient; the comparison finds out whether they still are.
        warnings.simplefilter("ignore", NumericalWarning)
        first, second = (Factors({n: each[n] for n in names}).eigh() for each in (one, two))
    return {
        name: Agreement(
            min(
                shared_mass(first[name], second[name], two[name], mass),
                shared_mass(second[name], first[name], one[name], mass),
            ),
            _angle(first[name].values_a, first[name].vectors_a, second[name].vectors_a, mass),
            _angle(first[name].values_g, first[name].vectors_g, second[name].vectors_g, mass),
        )
        for name in names
    }


def shared_mass(basis: LayerBasis, own: LayerBasis, factors: LayerFactors, mass: float) -> float:
    """Return the curvature mass held by another basis's top pairs, over that of the own top pairs.

    Args:
        basis: The basis to evaluate.
        own: The eigenbasis of ``factors``.
        factors: The curvature to evaluate with.
        mass: ρ of the kept pairs.

    Returns:
        From 0 to 1; where there is no curvature, 1 if the other basis has none either, else 0.
    """
    if _is_flat(own):
        return float(_is_flat(basis))
    best = staircase_by_mass(own.values_g, own.values_a, mass)
    other = staircase_by_pairs(basis.values_g, basis.values_a, best.pairs)
    held = _mass(other, diagonal(factors.G, basis.vectors_g), diagonal(factors.A, basis.vectors_a))
    return held / _mass(best, own.values_g, own.values_a)


def _is_flat(basis: LayerBasis) -> bool:
    return not (basis.values_g[0] > 0 and basis.values_a[0] > 0)


def _mass(kept: Staircase, g: Tensor, a: Tensor) -> float:
    g, a = g.cpu(), a.cpu()
    prefix = torch.cat([a.new_zeros(1), a.cumsum(0)])
    return float((g * prefix[kept.widths.long()]).sum())


def _angle(values: Tensor, one: Tensor, two: Tensor, mass: float) -> float:
    """Return the largest principal angle between leading spans that hold ``mass`` of the trace."""
    sums = values.cumsum(0)
    rank = int((sums < mass * sums[-1]).sum()) + 1
    cosines = torch.linalg.svdvals(one[:, :rank].double().T @ two[:, :rank].double())
    return math.degrees(math.acos(min(1.0, float(cosines[-1]))))


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
