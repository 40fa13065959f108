"""How far two measurements of the same layers agree: has enough been collected?

Of two halves of the data, the one's selection is judged by the other's curvature. By Ky Fan's
theorem no k pairs hold more of it than its own first k, so the share is at most 1.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from curvfast.core.factors import Factors, LayerFactors
from curvfast.core.layer_basis import LayerBasis, diagonal
from curvfast.core.staircase import Staircase, staircase_by_mass, staircase_by_pairs
from curvfast.errors import NumericalWarning


@dataclass(frozen=True)
class Agreement:
    """How far two measurements of one layer agree."""

    shared_mass: float
    """Curvature mass that one's kept pairs hold in the other, over that of as many of the other's
    own; the worse way round. 1 is perfect."""
    angle_a: float
    """Largest principal angle between the leading eigenvectors of A, in degrees."""
    angle_g: float
    """Largest principal angle between the leading eigenvectors of G, in degrees."""


def agreements(one: Factors, two: Factors, mass: float) -> dict[str, Agreement]:
    """Compare two measurements layer by layer.

    Args:
        one: Factors.
        two: Factors of the same model; layers that only one of them has are left out.
        mass: ρ of the kept pairs, and of the leading eigenvectors compared.

    Returns:
        The agreement of each layer both hold.

    Raises:
        InputError: If ``mass`` is outside (0, 1].
    """
    names = [name for name in one if name in two]
    with warnings.catch_warnings():
        # Early halves lack rank, and are compared to find out whether they still do.
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
    """Return the share of ``factors``' kept curvature that as many pairs of another basis hold.

    Args:
        basis: The basis to judge.
        own: That of ``factors``.
        factors: The curvature to judge by.
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
