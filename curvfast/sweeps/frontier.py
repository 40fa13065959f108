"""Points of a sweep, and its curves compared where a measure reaches one value."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from curvfast.display import aligned
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


UNEDITED = "unedited"
SIZE = "kept_fraction"


@dataclass(frozen=True)
class SweepPoint:
    """The measurements of one edit."""

    importance: str
    """The importance that ranked pairs; ``"unedited"`` for the unedited model."""
    layers: str
    """The entry of ``layers=`` that was edited."""
    names: tuple[str, ...]
    """Names of the edited layers."""
    mass: float | None
    """The rule, if it was a share of the summed score."""
    fraction: float | None
    """The rule, if it was a share of the pairs."""
    kept_fraction: float
    """Kept pairs over all pairs of the edited layers; for ``"svd"`` singular directions."""
    metrics: Mapping[str, float]
    """Measured values by name; NaN for values that are not finite."""
    seconds: float
    """Duration of editing, measuring and restoring."""

    @property
    def key(self) -> tuple[object, ...]:
        """The key of this point within its sweep."""
        return self.importance, self.names, self.mass, self.fraction

    def value(self, metric: str) -> float:
        """Return a metric, or the kept fraction."""
        return self.kept_fraction if metric == SIZE else self.metrics[metric]


@dataclass(frozen=True)
class MatchedRow:
    """One curve, interpolated at the common value."""

    importance: str
    layers: str
    kept_fraction: float | None
    metrics: Mapping[str, float]
    """Interpolated between two points; empty if the curve does not reach the value."""
    times: int
    """Number of times the curve reaches the value; the row is the first, of the weakest edit."""
    refusal: str | None
    """Reason why there is no value, or None."""


@dataclass(frozen=True)
class Matched:
    """Curves at one value of one metric; prints as a table."""

    metric: str
    value: float
    rows: tuple[MatchedRow, ...]

    def __str__(self) -> str:
        """Return the rows as an aligned table, with notes on missing values."""
        names = [name for name in next((r.metrics for r in self.rows if r.metrics), {})]
        head = ["importance", "layers", SIZE, *names]
        table = [head, *([r.importance, r.layers, *_cells(r, names)] for r in self.rows)]
        notes = [f"{r.importance}, {r.layers}: {note}" for r in self.rows for note in _notes(r)]
        return "\n".join([f"at {self.metric} {self.value:.6g}", aligned(table, left=2), *notes])


def matched(
    unedited: SweepPoint, points: Iterable[SweepPoint], metric: str, value: float
) -> Matched:
    """Compare curves where each first reaches ``value``, from the unedited model on.

    A curve consists of the points of one importance and one set of layers, by falling kept
    fraction, from the unedited model on, which keeps all; it is linear between neighbours.

    Args:
        unedited: The point of the unedited model.
        points: Points of any number of curves.
        metric: The metric to equalise: a name in ``metrics``, or ``"kept_fraction"``.
        value: The common value.

    Returns:
        A row for each curve; one that does not reach the value says so, as nothing is extrapolated.

    Raises:
        InputError: If no curve has such a metric.
    """
    if metric != SIZE and metric not in unedited.metrics:
        raise InputError(
            f"no metric {metric!r} was measured; there are {', '.join(map(repr, unedited.metrics))}"
            f" and {SIZE!r}"
        )
    rows = (_row(own, metric, value) for own in curves(unedited, points).values())
    return Matched(metric, value, tuple(rows))


def curves(
    unedited: SweepPoint, points: Iterable[SweepPoint]
) -> dict[tuple[str, str], list[SweepPoint]]:
    """Return each curve by importance and layers, from the unedited model to the strongest edit."""
    found: dict[tuple[str, str], list[SweepPoint]] = {}
    for point in points:
        found.setdefault((point.importance, point.layers), []).append(point)
    return {key: [unedited, *sorted(own, key=_strength)] for key, own in found.items()}


def _strength(point: SweepPoint) -> tuple[float, float]:
    return -point.kept_fraction, -(point.mass or point.fraction or 0.0)


def _row(curve: Sequence[SweepPoint], metric: str, value: float) -> MatchedRow:
    importance, layers = curve[-1].importance, curve[-1].layers
    try:
        found = first_crossing([point.value(metric) for point in curve], value)
    except InputError as error:
        return MatchedRow(importance, layers, None, {}, 0, f"{metric} {error}")
    return MatchedRow(
        importance, layers, _at(curve, found, SIZE),
        {name: _at(curve, found, name) for name in curve[0].metrics}, found.times, None,
    )  # fmt: skip


def _at(curve: Sequence[SweepPoint], found: Crossing, metric: str) -> float:
    return between(curve[found.before].value(metric), curve[found.after].value(metric), found.share)


def _cells(row: MatchedRow, names: Sequence[str]) -> list[str]:
    if row.kept_fraction is None:
        return ["-"] * (1 + len(names))
    return [f"{row.kept_fraction:.4f}", *(f"{row.metrics[name]:.4g}" for name in names)]


def _notes(row: MatchedRow) -> list[str]:
    if row.refusal is not None:
        return [row.refusal]
    return [f"the first of {row.times} such edits: the curve is not monotone"] * (row.times > 1)
