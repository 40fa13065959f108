"""The decay of a spectrum, against spectra whose law is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curvfast.errors import InputError
from curvfast.kfac.spectrum import power_law


def law(d: int, exponent: float, scale: float = 1.0) -> np.ndarray:
    return scale * np.arange(1, d + 1, dtype=float) ** -exponent


@given(st.integers(8, 300), st.floats(0, 2), st.floats(-50, 50))
def test_an_exact_law_is_found_with_its_scale(d: int, exponent: float, power: float) -> None:
    found = power_law(law(d, exponent, 10**power))
    assert found.exponent == pytest.approx(exponent, abs=1e-9)
    assert found.at(1) == pytest.approx(10**power, rel=1e-9)
    assert found.at(7) == pytest.approx(10**power * 7**-exponent, rel=1e-9)
    assert found.r_squared == pytest.approx(1, abs=1e-6) or exponent < 1e-6


@given(st.lists(st.floats(1e-2, 1e3), min_size=8, max_size=60), st.data())
def test_the_line_is_that_of_numpy_over_the_ranks_named(numbers: list[float], data) -> None:
    values = np.sort(numbers)[::-1]
    first = data.draw(st.integers(1, len(values) - 3))
    last = data.draw(st.integers(first + 2, len(values)))
    found = power_law(torch.tensor(values.copy()), first=first, last=last)
    x, y = np.log(np.arange(first, last + 1)), np.log(values[first - 1 : last])
    slope, level = np.polyfit(x, y, 1)
    assert (found.first, found.last) == (first, last)
    assert found.exponent == pytest.approx(-slope, abs=1e-7)
    assert found.scale == pytest.approx(np.exp(level), rel=1e-6)
    if np.ptp(y) > 1e-3:
        assert found.r_squared == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2, abs=1e-6)


def test_the_ends_of_the_spectrum_play_no_part_by_default() -> None:
    values = law(256, 1.5)
    values[:7] *= 40
    values[128:] *= 1e-2
    found = power_law(values)
    assert (found.first, found.last) == (8, 128)
    assert found.exponent == pytest.approx(1.5, abs=1e-12)
    assert power_law(values, first=1, last=256).exponent > 1.8


def test_scaling_a_spectrum_does_not_change_its_exponent() -> None:
    rng = np.random.default_rng(0)
    values = np.sort(law(64, 1.0) * np.exp(rng.normal(size=64)))[::-1]
    one, two = power_law(values), power_law(1e-30 * values)
    assert one.exponent == pytest.approx(two.exponent, rel=1e-12)
    assert one.r_squared == pytest.approx(two.r_squared, rel=1e-12)
    assert 0 < one.r_squared < 1


def test_what_rounding_left_of_missing_rank_is_not_fitted() -> None:
    values = law(64, 1.0)
    values[9:] = 1e-9 * np.linspace(2, 1, 55)
    found = power_law(values)
    assert (found.first, found.last) == (2, 9)
    assert found.exponent == pytest.approx(1)


@pytest.mark.parametrize(
    ("values", "ranks"),
    [
        (law(10, 1), {"first": 0}),
        (law(10, 1), {"last": 11}),
        (law(10, 1), {"first": 6, "last": 5}),
        (law(10, 1), {"first": 4, "last": 5}),
        (np.r_[1.0, 0.5, np.zeros(8)], {}),
        (np.zeros(8), {}),
    ],
)
def test_what_has_no_line_is_refused(values: np.ndarray, ranks: dict[str, int]) -> None:
    with pytest.raises(InputError, match="pass"):
        power_law(values, **ranks)
