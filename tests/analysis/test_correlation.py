"""Correlations: against definitions by brute force, and intervals that know what was drawn."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curvfast.analysis import correlation_interval, pearson, spearman
from curvfast.analysis.statistics import ranks
from curvfast.errors import InputError

few = st.integers(-4, 4).map(float)
pairs = st.lists(st.tuples(few, few), min_size=2, max_size=12)


def slow_ranks(values: list[float]) -> list[float]:
    """A rank is one, plus all below, plus half of the others that are equal."""
    return [1 + sum(w < v for w in values) + (values.count(v) - 1) / 2 for v in values]


def slow_pearson(x: list[float], y: list[float]) -> float:
    n = len(x)
    cov = math.fsum(a * b for a, b in zip(x, y, strict=True)) - math.fsum(x) * math.fsum(y) / n
    own = (math.fsum(a * a for a in v) - math.fsum(v) ** 2 / n for v in (x, y))
    return cov / math.sqrt(math.prod(own))


@given(st.lists(few, min_size=1, max_size=12))
def test_ranks_are_counted(values: list[float]) -> None:
    assert ranks(values).tolist() == slow_ranks(values)


@given(pairs)
def test_both_coefficients_are_their_definitions(points: list[tuple[float, float]]) -> None:
    x, y = (list(values) for values in zip(*points, strict=True))
    if len({*x}) == 1 or len({*y}) == 1:
        assert math.isnan(pearson(x, y))
        assert math.isnan(spearman(x, y))
        return
    assert pearson(x, y) == pytest.approx(slow_pearson(x, y), abs=1e-12)
    ranked = slow_pearson(slow_ranks(x), slow_ranks(y))
    assert spearman(x, y) == pytest.approx(ranked, abs=1e-12)


@given(pairs, st.sampled_from([1e-200, 1.0, 1e150]), st.sampled_from([-3.0, 0.0, 7.0]))
def test_scale_and_origin_play_no_part(
    points: list[tuple[float, float]], scale: float, origin: float
) -> None:
    x, y = (np.array(values) for values in zip(*points, strict=True))
    expected = pearson(x, y)
    assert pearson(scale * (x + origin), y) == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert pearson(-scale * x, y) == pytest.approx(-expected, abs=1e-9, nan_ok=True)


def test_ranks_see_order_alone() -> None:
    x = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert spearman(x, [math.exp(9 * v) for v in x]) == 1
    assert pearson(x, [math.exp(9 * v) for v in x]) < 0.8
    assert spearman([1, 2, 2, 4], [1, 3, 3, 9]) == pytest.approx(1)


def test_equal_values_have_no_correlation_and_give_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(pearson([0.1] * 10, list(range(10))))


@pytest.mark.parametrize("of", [pearson, spearman])
@pytest.mark.parametrize("y", [[1.0], [1.0, 2.0], [1.0, math.nan, 3.0], [1.0, math.inf, 3.0]])
def test_what_makes_no_pairs_is_refused(of: Any, y: list[float]) -> None:
    with pytest.raises(InputError, match="pairs"):
        of([1.0, 2.0, 3.0] if len(y) > 1 else [1.0], y)


def test_the_interval_of_a_line_is_one_and_of_noise_is_wide() -> None:
    x = np.arange(10.0)[None]
    assert correlation_interval(x, 2 * x + 1, pearson) == pytest.approx((1, 1))
    noise = np.random.default_rng(0).normal(size=(1, 10))
    low, high = correlation_interval(x, noise, samples=500)
    assert low < 0 < high
    assert high - low > 0.5
    narrow = correlation_interval(x, noise, samples=500, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for trial in range(50):
        x, e = generator.normal(size=(2, 1, 40))
        low, high = correlation_interval(x, x + e, pearson, samples=100, confidence=0.8, seed=trial)
        hits += low < math.sqrt(0.5) < high
    assert 30 <= hits <= 47


def test_runs_are_drawn_again_too() -> None:
    """One run says the one thing, the other its opposite: nothing is known, whatever the items."""
    line = np.arange(8.0)
    x, y = np.stack([line, line]), np.stack([3 * line, -2 * line])
    low, high = correlation_interval(x, y, pearson, samples=300)
    assert low == pytest.approx(-1)
    assert high == pytest.approx(1)
    assert correlation_interval(x[:1], y[:1], pearson, samples=50) == pytest.approx((1, 1))


def test_an_item_keeps_its_pair_and_a_run_its_items() -> None:
    x = np.random.default_rng(2).normal(size=(3, 6))
    assert correlation_interval(x, x, samples=100) == pytest.approx((1, 1))


def test_the_seed_decides_and_no_global_generator_is_drawn_from() -> None:
    x, y = np.random.default_rng(3).normal(size=(2, 2, 9))
    np.random.seed(0)
    state = np.random.get_state()[1].tolist()
    first = correlation_interval(x, y, samples=50, seed=1)
    assert first == correlation_interval(x, y, samples=50, seed=1)
    assert first != correlation_interval(x, y, samples=50, seed=2)
    assert np.random.get_state()[1].tolist() == state


def test_an_interval_of_no_spread_is_nan() -> None:
    found = correlation_interval(np.ones((1, 5)), np.arange(5.0)[None], samples=20)
    assert all(map(math.isnan, found))


@pytest.mark.parametrize("shapes", [((5,), (5,)), ((1, 4), (1, 5)), ((0, 5), (0, 5))])
def test_an_interval_needs_two_tables_of_one_shape(shapes: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match="one shape"):
        correlation_interval(*map(np.ones, shapes))
