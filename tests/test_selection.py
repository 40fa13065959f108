"""The staircase search against sorting, and the native core against its Python twin."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from curvfast.core.mask import random_mask
from curvfast.core.staircase import staircase_by_fraction, staircase_by_mass, staircase_by_pairs
from curvfast.errors import InputError
from curvfast.ops import _native, reference

native = pytest.mark.skipif(_native.unavailable() is not None, reason="built without a compiler")


def spectra(elements) -> st.SearchStrategy:
    return st.lists(elements, min_size=1, max_size=14).map(
        lambda v: np.sort(np.array(v, float))[::-1]
    )


smooth = spectra(st.floats(0, 1e3, allow_subnormal=False))
tied = spectra(st.integers(0, 4))
tiny = spectra(st.integers(0, 4)).map(lambda v: v * 1e-200)
decaying = st.integers(1, 14).map(lambda n: 1.0 / np.arange(1, n + 1) ** 2)
degenerate = st.integers(1, 14).map(lambda n: np.r_[1.0, np.zeros(n)])
anything = st.one_of(smooth, tied, tiny, decaying, degenerate)
masses = st.one_of(st.floats(1e-6, 1.0), st.sampled_from([0.25, 0.5, 0.6, 0.75, 0.9, 1.0]))


def by_sorting(g, a, mass):
    """Sort every product, take the largest until the mass is reached, then every tie."""
    products = np.multiply.outer(g / g[0], a / a[0])
    order = np.sort(products.ravel())[::-1]
    sums = np.cumsum(order)
    count = int(np.searchsorted(sums, mass * sums[-1] * (1 - 1e-12))) + 1
    return products, order[min(count, len(order)) - 1]


@given(anything, anything, masses)
@settings(max_examples=400, deadline=None)
def test_mass_selection_equals_sorting(g, a, mass) -> None:
    assume(g[0] > 0 and a[0] > 0)
    found = staircase_by_mass(g, a, mass)
    kept = found.dense().numpy()
    products, threshold = by_sorting(g, a, mass)
    if mass == 1.0:
        assert kept[products > 1e-290].all()
    # Rounding may move the last pair, so sets are compared away from it and masses at it.
    assert kept[products > threshold * (1 + 1e-9)].all()
    total = products.sum()
    assert products[kept].sum() >= mass * total * (1 - 1e-9)
    smallest = products[kept].min()
    without = products[kept & (products > smallest * (1 + 1e-9))].sum()
    assert without <= mass * total * (1 + 1e-9)
    assert found.mass == pytest.approx(products[kept].sum() / total, rel=1e-9)
    assert found.pairs == kept.sum()


whole = st.lists(st.integers(0, 9), min_size=1, max_size=9).map(sorted).map(lambda v: v[::-1])


@given(whole, whole, st.integers(1, 8), st.sampled_from([0, 40, -1000, -1074]))
@settings(max_examples=10_000, deadline=None)
def test_staircases_equal_brute_force_on_whole_numbers(
    g: list[int], a: list[int], eighths: int, exponent: int
) -> None:
    """Ties, zeros, denormals and single rows, where every sum is exact."""
    assume(g[0] > 0 and a[0] > 0)
    # Scaled by its largest value, a spectrum of powers of two stays exact.
    g, a = ([2**v if v else 0 for v in values] for values in (g, a))
    found = staircase_by_mass(
        np.ldexp(np.array(g, float), exponent), np.array(a, float), eighths / 8
    )
    products = sorted((x * y for x in g for y in a), reverse=True)
    sums = itertools.accumulate(products)
    threshold = next(
        p for p, s in zip(products, sums, strict=True) if 8 * s >= eighths * sum(products)
    )
    widths = [sum(x * y >= threshold and x * y > 0 for y in a) for x in g]
    assert found.widths.tolist() == widths


@given(tied, tied, st.integers(1, 16))
@settings(max_examples=300, deadline=None)
def test_ties_are_all_in_or_all_out(g, a, sixteenths) -> None:
    assume(g[0] > 0 and a[0] > 0)
    kept = staircase_by_mass(g, a, sixteenths / 16).dense().numpy()
    products = np.multiply.outer(g, a)
    # Small integers are exact: the kept set is exactly {product >= threshold}.
    values = np.sort(np.unique(products))[::-1]
    threshold = next(
        v for v in values if products[products >= v].sum() * 16 >= sixteenths * products.sum()
    )
    expected = products >= threshold if threshold > 0 else products > 0
    assert (kept == expected).all()


@given(anything, anything, masses)
@settings(max_examples=200, deadline=None)
def test_widths_never_increase_and_more_mass_keeps_more(g, a, mass) -> None:
    assume(g[0] > 0 and a[0] > 0)
    less, more = staircase_by_mass(g, a, mass / 2), staircase_by_mass(g, a, mass)
    for found in (less, more):
        assert (found.widths.diff() <= 0).all()
    assert (less.widths <= more.widths).all()


@given(anything, anything, st.data())
@settings(max_examples=300, deadline=None)
def test_pairs_are_exact_the_largest_and_in_row_order(g, a, data) -> None:
    pairs = data.draw(st.integers(0, len(g) * len(a)))
    found = staircase_by_pairs(g, a, pairs)
    kept = found.dense().numpy()
    assert kept.sum() == pairs == found.pairs
    assert (found.widths.diff() <= 0).all()
    scale_g, scale_a = (2.0 ** -np.frexp(v[0])[1] for v in (g, a))
    products = np.multiply.outer(g * scale_g, a * scale_a)
    if 0 < pairs < kept.size:
        assert products[kept].min() >= products[~kept].max()
        ties = list(zip(*np.nonzero(products == products[kept].min()), strict=True))
        taken = [bool(kept[i, j]) for i, j in ties]
        assert taken == sorted(taken, reverse=True)


@native
@given(anything, anything, masses, st.data())
@settings(max_examples=400, deadline=None)
def test_native_core_equals_its_twin_bit_for_bit(g, a, mass, data) -> None:
    pairs = data.draw(st.integers(0, len(g) * len(a)))
    searches = [("staircase_by_pairs", pairs)]
    if g[0] > 0 and a[0] > 0:
        searches.append(("staircase_by_mass", mass))
    for search, rule in searches:
        one, two = (getattr(backend, search)(g, a, rule) for backend in (_native, reference))
        assert (one.widths == two.widths).all()
        assert one[1:] == two[1:]


@native
def test_native_core_equals_its_twin_on_a_large_layer() -> None:
    g, a = 1 / np.arange(1, 4097.0), np.exp(-np.linspace(0, 12, 11008))
    for mass in (0.3, 0.6, 0.95, 1.0):
        one, two = (b.staircase_by_mass(g, a, mass) for b in (_native, reference))
        assert (one.widths == two.widths).all()
        assert one[1:] == two[1:]


def test_rank_one_keeps_its_one_pair() -> None:
    found = staircase_by_mass(torch.tensor([3.0, 0.0]), torch.tensor([2.0, 0.0, 0.0]), 1.0)
    assert found.widths.tolist() == [1, 0]
    assert found.threshold == 6.0


@pytest.mark.parametrize("scale", [1e-250, 1e-20, 1e20, 1e150])
def test_scale_does_not_matter(scale: float) -> None:
    g, a = np.array([5.0, 3, 2, 1]), np.array([7.0, 4, 4, 1])
    plain, scaled = staircase_by_mass(g, a, 0.7), staircase_by_mass(g * scale, a, 0.7)
    assert torch.equal(plain.widths, scaled.widths)
    assert scaled.mass == pytest.approx(plain.mass)


def test_fraction_rounds_to_the_nearest_pair() -> None:
    g, a = np.array([2.0, 1.0]), np.array([3.0, 1.0, 0.5])
    assert [staircase_by_fraction(g, a, f).pairs for f in (0, 0.24, 0.26, 1.0)] == [0, 1, 2, 6]


def test_complement_is_what_is_left() -> None:
    found = staircase_by_mass(np.array([5.0, 3, 1]), np.array([4.0, 2, 1]), 0.7)
    rest = found.complement()
    assert torch.equal(found.dense(), ~rest.dense())
    assert found.pairs + rest.pairs == 9
    assert rest.mass == pytest.approx(1 - found.mass)
    assert torch.equal(rest.complement().dense(), found.dense())


def test_random_masks_are_exact_seeded_and_leave_the_global_state() -> None:
    state = torch.get_rng_state()
    one, two, other = (
        random_mask(7, 9, 20, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert one.pairs == 20
    assert torch.equal(one.kept, two.kept)
    assert not torch.equal(one.kept, other.kept)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("g", "a", "mass", "match"),
    [
        ([1.0], [1.0], 0.0, r"in \(0, 1\]"),
        ([1.0], [1.0], 1.01, r"in \(0, 1\]"),
        ([1.0], [1.0], float("nan"), r"in \(0, 1\]"),
        ([1.0, 2.0], [1.0], 0.5, "descending"),
        ([1.0, -1.0], [1.0], 0.5, "non-negative"),
        ([float("nan")], [1.0], 0.5, "NaN"),
        ([float("inf")], [1.0], 0.5, "NaN or infinity"),
        ([], [1.0], 0.5, "shape"),
        ([[1.0]], [1.0], 0.5, "shape"),
        ([0.0, 0.0], [1.0], 0.5, "no curvature mass"),
    ],
)
def test_what_is_no_spectrum_is_refused(g, a, mass, match) -> None:
    with pytest.raises(InputError, match=match):
        staircase_by_mass(g, a, mass)


@native
def test_the_border_refuses_what_it_cannot_read() -> None:
    from curvfast import _C

    g, widths = np.array([2.0, 1.0]), np.zeros(2, np.int32)
    address, out = g.ctypes.data, widths.ctypes.data
    good = (address, 2, address, 2, 0.5, out)
    assert _C.staircase_by_mass(*good)[1] == 3
    swaps = {
        0: (0, address + 1),
        1: (0, -3),
        2: (0,),
        3: (0, -1),
        4: (0.0, -1.0, 2.0),
        5: (0, out + 1),
    }
    for place, values in swaps.items():
        for value in values:
            arguments = list(good)
            arguments[place] = value
            with pytest.raises(ValueError, match=r"address|empty|aligned|mass"):
                _C.staircase_by_mass(*arguments)
    for bad in ([1.0, 2.0], [1.0, np.nan], [1.0, -1.0], [np.inf, 1.0]):
        values = np.array(bad)
        with pytest.raises(ValueError, match="values_g"):
            _C.staircase_by_mass(values.ctypes.data, 2, address, 2, 0.5, out)
    for pairs in (-1, 5):
        with pytest.raises(ValueError, match="pairs"):
            _C.staircase_by_pairs(address, 2, address, 2, pairs, out)


def test_every_small_shape_has_every_number_of_pairs() -> None:
    for m, n in itertools.product(range(1, 4), repeat=2):
        for pairs in range(m * n + 1):
            assert staircase_by_pairs(np.ones(m), np.ones(n), pairs).pairs == pairs
