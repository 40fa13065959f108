"""Comparison of methods at equal perplexity, interpolated along their strengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from curvfast.errors import InputError
from curvfast.sweeps.frontier import between, first_crossing

Point = Mapping[str, Any]
MEASURES = tuple(
    f"{measure}_{half}"
    for half in ("seen", "unseen")
    for measure in ("strict", "loose", "levenshtein")
)


# A line from the unedited model to a weakest change that costs more than this many times the rise
# asked for would say nothing about the change.
_TOO_FAR = 2


@dataclass(frozen=True)
class Matched:
    """A method where its perplexity has risen by a given share, or as near as it comes."""

    values: Mapping[str, float]
    """:data:`MEASURES`, and ``cpu_seconds`` of the next stronger change measured."""
    rise: float
    """Relative rise of perplexity there."""
    reached: bool
    """Whether that is the share asked for; otherwise this is the strongest change measured, or the
    weakest where that costs far more already."""


def at_rise(base: Point, points: Sequence[Point], rise: float) -> Matched:
    """Return a method at the unedited model's perplexity times 1 + ``rise``.

    The curve is linear between neighbours, from the unedited model on, strength by strength; where
    it reaches that perplexity more than once, the first time counts.

    Args:
        base: Measures of the unedited model.
        points: Measures at each strength, weak to strong; at least one.
        rise: Positive.
    """
    curve = [base, *points]
    try:
        found = first_crossing([p["perplexity"] for p in curve], base["perplexity"] * (1 + rise))
    except InputError:
        return _as_measured(base, points[-1])
    if found.before == 0 and _rise(base, points[0]) > _TOO_FAR * rise:
        return _as_measured(base, points[0])
    weaker, stronger = curve[found.before], curve[found.after]
    values = {m: between(weaker[m], stronger[m], found.share) for m in MEASURES}
    return Matched({**values, "cpu_seconds": stronger["cpu_seconds"]}, rise, True)


def _as_measured(base: Point, point: Point) -> Matched:
    values = {m: point[m] for m in (*MEASURES, "cpu_seconds")}
    return Matched(values, _rise(base, point), False)


def _rise(base: Point, point: Point) -> float:
    return float(point["perplexity"] / base["perplexity"] - 1)


def over_seeds(found: Sequence[Matched], measure: str) -> tuple[float, float | None]:
    """Return the mean of a measure and its standard deviation, None for a single seed."""
    values = [one.values[measure] for one in found]
    return mean(values), stdev(values) if len(values) > 1 else None


def furthest(found: Sequence[Matched]) -> float | None:
    """Return the mean rise where some seed does not reach the one asked for, else None."""
    return None if all(one.reached for one in found) else mean(one.rise for one in found)
