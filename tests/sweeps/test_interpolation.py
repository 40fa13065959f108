"""Where curves reach a value: exactly at samples, between neighbours, and never beyond."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curvfast.errors import InputError
from curvfast.sweeps.frontier import (
    UNEDITED,
    Crossing,
    SweepPoint,
    between,
    curves,
    first_crossing,
    matched,
)

NUMBERS = st.floats(-1e6, 1e6)
CURVES = st.lists(NUMBERS, min_size=1, max_size=9)
RISING = st.lists(st.integers(0, 10**6), min_size=2, max_size=9, unique=True).map(sorted)


def value_at(values: list[float], found: Crossing) -> float:
    return between(values[found.before], values[found.after], found.share)


@given(CURVES, st.data())
def test_a_measured_value_is_found_where_it_was_first_measured_or_passed(
    values: list[float], data: st.DataObject
) -> None:
    target = data.draw(st.sampled_from(values))
    found = first_crossing(values, target)
    assert value_at(values, found) == pytest.approx(target, rel=1e-9, abs=1e-9)
    reached = values.index(target)
    assert (found.before, found.share) <= (reached, 0.0)
    # Until there every sample lies on one side.
    before = values[: found.before + (found.share > 0)]
    assert all(v < target for v in before) or all(v > target for v in before)


@given(CURVES, NUMBERS)
def test_what_lies_between_the_extremes_is_reached_and_nothing_else_is(
    values: list[float], target: float
) -> None:
    if min(values) <= target <= max(values):
        found = first_crossing(values, target)
        low, high = sorted((values[found.before], values[found.after]))
        assert low <= target <= high
        assert found.after - found.before <= 1
        assert 0 <= found.share <= 1
    else:
        with pytest.raises(InputError, match=r"outside what was measured.*nothing is extrapolated"):
            first_crossing(values, target)


@given(RISING, st.floats(0, 1))
def test_a_monotone_curve_is_reached_once_and_backwards_alike(
    values: list[int], where: float
) -> None:
    curve = [float(v) for v in values]
    target = between(curve[0], curve[-1], where)
    one, two = first_crossing(curve, target), first_crossing(curve[::-1], target)
    assert one.times == two.times == 1
    assert value_at(curve, one) == pytest.approx(value_at(curve[::-1], two))
    position = one.before + one.share
    assert position == pytest.approx(len(curve) - 1 - two.before - two.share)


@given(RISING, st.integers(0, 7), st.floats(0.01, 0.99), st.floats(0, 1))
def test_a_sample_on_the_line_changes_nothing(
    values: list[int], place: int, where: float, target: float
) -> None:
    curve = [float(v) for v in values]
    place = min(place, len(curve) - 2)
    denser = [*curve[: place + 1], between(curve[place], curve[place + 1], where)]
    denser += curve[place + 1 :]
    positions = [*map(float, range(place + 1)), place + where, *range(place + 1, len(curve))]
    goal = between(curve[0], curve[-1], target)
    one, two = first_crossing(curve, goal), first_crossing(denser, goal)
    at = between(positions[two.before], positions[two.after], two.share)
    assert at == pytest.approx(one.before + one.share, abs=1e-6)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.sampled_from([0.0, 0.5, 3.0]))
def test_every_time_a_curve_reaches_a_value_is_counted(values: list[int], target: float) -> None:
    # Walking in steps of a sixth passes every crossing of a curve of small integers.
    fine = [values[0] * 840.0]
    for one, two in pairwise(values):
        fine += [840 * one + (two - one) * 140.0 * step for step in range(1, 7)]
    signs = [(v > 840 * target) - (v < 840 * target) for v in fine]
    runs = [s for i, s in enumerate(signs) if i == 0 or s != signs[i - 1]]
    expected = sum(s == 0 for s in runs)
    expected += sum(one * two < 0 for one, two in pairwise(runs))
    if expected:
        assert first_crossing([float(v) for v in values], target).times == expected
    else:
        with pytest.raises(InputError):
            first_crossing([float(v) for v in values], target)


def test_a_gap_is_not_bridged() -> None:
    for gap in (math.nan, math.inf, -math.inf):
        with pytest.raises(InputError, match="lies in a gap"):
            first_crossing([1.0, gap, 3.0], 2.0)
        assert first_crossing([1.0, gap, 3.0, 2.0, gap], 2.5) == Crossing(2, 3, 0.5, 1)
        assert first_crossing([1.0, gap, 2.0], 2.0) == Crossing(2, 2, 0.0, 1)
        with pytest.raises(InputError, match="no sample is finite"):
            first_crossing([gap], 2.0)


@given(NUMBERS, NUMBERS, st.floats(0, 1))
def test_between_is_exact_at_both_ends_and_never_outside(
    one: float, two: float, share: float
) -> None:
    assert (between(one, two, 0.0), between(one, two, 1.0)) == (one, two)
    assert min(one, two) <= between(one, two, share) <= max(one, two)
    assert between(one, one, share) == one
    assert math.isnan(between(one, math.nan, share))


def point(
    kept: float, importance: str = "kfac", layers: str = "all", **metrics: float
) -> SweepPoint:
    return SweepPoint(importance, layers, ("x",), kept, None, kept, metrics, 1.0)


BASE = replace(point(1.0, UNEDITED, UNEDITED, ppl=20.0, strict=1.0), names=(), mass=None)
POINTS = [
    point(0.2, ppl=40.0, strict=0.0),
    point(0.6, ppl=22.0, strict=0.5),
    point(0.4, ppl=30.0, strict=0.1),
    point(0.5, "random", ppl=60.0, strict=0.9),
    point(0.5, layers="one", ppl=20.5, strict=0.99),
]


@given(st.permutations(POINTS))
def test_the_order_of_points_does_not_matter_within_a_curve(points: list[SweepPoint]) -> None:
    found = {(r.importance, r.layers): r for r in matched(BASE, points, "ppl", 26.0).rows}
    row = found["kfac", "all"]
    assert row.kept_fraction == pytest.approx(0.5)
    assert row.metrics == {"ppl": 26.0, "strict": pytest.approx(0.3)}
    assert (row.times, row.refusal) == (1, None)
    # 6 of the 40 between the unedited model and the only point.
    row = found["random", "all"]
    assert row.kept_fraction == pytest.approx(1 - 0.5 * 6 / 40)
    assert row.metrics["strict"] == pytest.approx(1 - 0.1 * 6 / 40)
    assert [len(own) for own in curves(BASE, points).values()].count(4) == 1


def test_a_curve_that_does_not_reach_the_value_says_how_far_it_goes() -> None:
    found = matched(BASE, POINTS, "ppl", 26.0)
    row = next(r for r in found.rows if r.layers == "one")
    assert (row.kept_fraction, row.metrics) == (None, {})
    statement = "ppl 26 is outside what was measured, 20 to 20.5; nothing is extrapolated"
    assert row.refusal == statement
    assert f"kfac, one: {statement}" in str(found)
    for beyond in (19.9, 60.1):
        assert all(r.refusal for r in matched(BASE, POINTS, "ppl", beyond).rows)


def test_curves_meet_at_one_size() -> None:
    rows = matched(BASE, POINTS, "kept_fraction", 0.5).rows
    ppl = {(r.importance, r.layers): r.metrics["ppl"] for r in rows}
    assert ppl == {("kfac", "all"): 26.0, ("random", "all"): 60.0, ("kfac", "one"): 20.5}
    assert all(r.kept_fraction == pytest.approx(0.5) for r in rows)
    with pytest.raises(
        InputError, match="no metric 'loss' was measured; there are 'ppl', 'strict'"
    ):
        matched(BASE, POINTS, "loss", 1.0)


def test_a_noisy_curve_gives_the_weakest_edit_and_says_so() -> None:
    noisy = [point(0.8, ppl=24.0, strict=0.8), point(0.6, ppl=21.0, strict=0.6)]
    found = matched(BASE, [*noisy, point(0.4, ppl=25.0, strict=0.4)], "ppl", 22.0)
    (row,) = found.rows
    assert row.times == 3
    assert row.kept_fraction == pytest.approx(0.9)
    assert row.metrics["strict"] == pytest.approx(0.9)
    assert "kfac, all: the first of 3 such edits: the curve is not monotone" in str(found)


def test_a_table_is_aligned() -> None:
    lines = str(matched(BASE, POINTS[:4], "ppl", 26.0)).splitlines()
    assert lines[0] == "at ppl 26"
    assert lines[1].split() == ["importance", "layers", "kept_fraction", "ppl", "strict"]
    assert lines[2].split() == ["kfac", "all", "0.5000", "26", "0.3"]
    assert len(lines[1]) == len(lines[2])


def test_equal_sizes_go_by_what_was_asked_for() -> None:
    pair = [point(0.5, ppl=24.0), point(0.5, ppl=22.0)]
    asked = [replace(pair[0], mass=0.7), replace(pair[1], mass=0.9)]
    for points in (asked, asked[::-1]):
        ((_, curve),) = curves(BASE, points).items()
        assert [own.metrics["ppl"] for own in curve] == [20.0, 22.0, 24.0]


def test_monotone_curves_of_two_points_with_one_value_take_the_weaker() -> None:
    level = [point(0.8, ppl=22.0, strict=0.8), point(0.6, ppl=22.0, strict=0.6)]
    (row,) = matched(BASE, level, "ppl", 22.0).rows
    assert (row.kept_fraction, row.metrics["strict"], row.times) == (0.8, 0.8, 1)
