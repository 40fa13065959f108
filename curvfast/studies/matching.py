"""Interpolation of methods' curves at equal perplexity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from curvfast.core.interpolation import between, first_crossing
from curvfast.errors import InputError

Measures = Mapping[str, float]


def at_perplexity(
    base: Measures, points: Sequence[Measures], value: float
) -> dict[str, float] | None:
    """Return a method's measures at one perplexity, interpolated between strengths.

    Args:
        base: Measures of the unedited model, where every curve begins.
        points: Measures at each strength, weak to strong.
        value: The perplexity; where a curve reaches it more than once, the first time counts.

    Returns:
        The measures common to ``base`` and all points; None if the curve does not reach it.
    """
    curve = [base, *points]
    try:
        found = first_crossing([point["perplexity"] for point in curve], value)
    except InputError:
        return None
    names = [name for name in base if all(name in point for point in points)]
    weaker, stronger = curve[found.before], curve[found.after]
    return {name: between(weaker[name], stronger[name], found.share) for name in names}
