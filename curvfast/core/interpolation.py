"""Linear interpolation of a measured curve to a target value, without extrapolation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from curvfast.errors import InputError


@dataclass(frozen=True)
class Crossing:
    """The position at which a curve first reaches a value."""

    before: int
    """Index of the last sample before it, or of the sample equal to it."""
    after: int
    """Index of the next sample, or ``before`` again."""
    share: float
    """Interpolation weight between the two, in [0, 1]."""
    times: int
    """How often the curve reaches the value; more than once if it is not monotone there."""


def first_crossing(values: Sequence[float], target: float) -> Crossing:
    """Return where a curve, linear between neighbours, first reaches ``target``.

    A noisy curve may reach it several times; the first is where its running extreme does, and
    ``times`` counts them all. No interpolation crosses a value that is not finite.

    Args:
        values: Samples in order.
        target: The value.

    Raises:
        InputError: If the curve does not reach it: nothing is extrapolated.
    """
    known = [value if math.isfinite(value) else math.nan for value in values]
    hits = [
        (i, i, 0.0)
        for i, value in enumerate(known)
        if value == target and (i == 0 or known[i - 1] != target)
    ]
    for i, (one, two) in enumerate(pairwise(known)):
        if one < target < two or two < target < one:
            hits.append((i, i + 1, (target - one) / (two - one)))
    if not hits:
        raise InputError(f"{target:.6g} {_reach(known, target)}; nothing is extrapolated")
    return Crossing(*min(hits), len(hits))


def between(one: float, two: float, share: float) -> float:
    """Return the linear interpolation between two values, clamped to their range."""
    found = (1 - share) * one + share * two
    return min(max(found, min(one, two)), max(one, two))


def _reach(known: Sequence[float], target: float) -> str:
    finite = [value for value in known if not math.isnan(value)]
    if not finite:
        return "cannot be found: no sample is finite"
    low, high = min(finite), max(finite)
    if low < target < high:
        return "lies in a gap, beside a sample that is not finite"
    return f"is outside what was measured, {low:.6g} to {high:.6g}"
