"""Searches beyond one layer at one mass: equal to brute force, to their twins, on any threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curvfast import Eigenbasis, LayerBasis, ops
from curvfast.errors import InputError
from curvfast.kfac.selection.staircase import (
    staircase_by_mass,
    staircases_by_common_mass,
    staircases_by_mass,
)
from curvfast.ops import reference
from curvfast.ops.native import extension

pytestmark = pytest.mark.skipif(
    extension.unavailable() is not None, reason="the native core is not built"
)
# Small integers tie, powers of two apart underflow, and zero has no mass.
VALUES = st.one_of(
    st.integers(0, 4).map(float),
    st.sampled_from([0.0, 1e-300, 5e-324, 1e-20, 1.0, 1e20, 1e150]),
    st.floats(0, 1e10),
)
SPECTRA = st.lists(VALUES, min_size=1, max_size=8).map(
    lambda values: np.array(sorted(values, reverse=True))
)
LAYERS = st.lists(st.tuples(SPECTRA, SPECTRA), min_size=1, max_size=4)
MASSES = st.one_of(st.floats(0.01, 1.0), st.just(1.0))


def checked_spectra(layers: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(g, a) for g, a in layers if g[0] > 0 and a[0] > 0]


@given(LAYERS, st.lists(MASSES, min_size=1, max_size=3), st.integers(1, 3))
@settings(max_examples=300, deadline=None)
def test_many_searches_are_each_of_them(layers: Any, masses: Any, workers: int) -> None:
    layers = checked_spectra(layers)
    found = extension.staircases_by_mass(layers, masses, workers)
    for (g, a), own in zip(layers, found, strict=True):
        for mass, one in zip(masses, own, strict=True):
            alone = extension.staircase_by_mass(g, a, mass)
            twin = reference.staircase_by_mass(g, a, mass)
            assert one.widths.tolist() == alone.widths.tolist() == twin.widths.tolist()
            assert one[1:] == alone[1:] == twin[1:]


@given(LAYERS, MASSES)
@settings(max_examples=300, deadline=None)
def test_a_common_threshold_equals_its_twin_bit_for_bit(layers: Any, mass: float) -> None:
    if not checked_spectra(layers):
        return
    widths, threshold = extension.staircases_by_common_mass(layers, mass)
    twins, twin = reference.staircases_by_common_mass(layers, mass)
    assert [w.tolist() for w in widths] == [w.tolist() for w in twins]
    assert threshold == twin


INTEGERS = st.lists(st.integers(0, 5).map(float), min_size=1, max_size=6).map(
    lambda values: np.array(sorted(values, reverse=True))
)


@given(st.lists(st.tuples(INTEGERS, INTEGERS), min_size=1, max_size=4), st.integers(1, 16))
@settings(max_examples=300, deadline=None)
def test_a_common_threshold_keeps_the_largest_products_of_all(layers: Any, parts: int) -> None:
    if not checked_spectra(layers):
        return
    mass = parts / 16
    spectra = {str(i): pair for i, pair in enumerate(layers)}
    kept = staircases_by_common_mass(spectra, mass)
    products = {n: np.outer(g, a) for n, (g, a) in spectra.items()}
    every = np.sort(np.concatenate([p.ravel() for p in products.values()]))[::-1]
    # Products of small integers, and sixteenths of their sum, are exact.
    reached = np.cumsum(every) >= mass * every.sum()
    threshold = every[np.argmax(reached)]
    for name, product in products.items():
        expected = product >= max(threshold, 1)
        assert kept[name].dense().tolist() == expected.tolist()
        if product.sum():
            assert kept[name].mass == pytest.approx((product * expected).sum() / product.sum())


def basis(*scales: float) -> Eigenbasis:
    made = {}
    for number, scale in enumerate(scales):
        values = scale / torch.arange(1, 9, dtype=torch.float64)
        made[str(number)] = LayerBasis(values, torch.eye(8), values, torch.eye(8))
    return Eigenbasis(made)


def test_a_layer_of_little_curvature_keeps_little_of_a_common_mass() -> None:
    found = basis(1.0, 0.1).keep(mass=0.9, globally=True)
    alone = basis(1.0, 0.1).keep(mass=0.9)
    assert alone["0"].pairs == alone["1"].pairs
    assert found["1"].pairs < found["0"].pairs
    with pytest.raises(InputError, match="globally"):
        basis(1.0).keep(pairs=3, globally=True)


def test_several_masses_are_each_of_them() -> None:
    both = basis(1.0, 2.0)
    for mass, found in zip((0.3, 0.9), both.keep_each((0.3, 0.9)), strict=True):
        alone = both.keep(mass=mass)
        assert [found[n].widths.tolist() for n in found] == [
            alone[n].widths.tolist() for n in alone
        ]
    with pytest.raises(InputError, match=r"mass=1\.5"):
        both.keep_each((0.5, 1.5))
    with pytest.raises(InputError, match="layer 'x' is zero"):
        staircases_by_mass({"x": (torch.zeros(2), torch.ones(2))}, [0.5])


def test_ninety_six_layers_at_five_masses_are_one_call() -> None:
    rng = np.random.default_rng(1)
    spectra = [tuple(np.sort(rng.random(d) ** 4)[::-1] for d in (40, 60)) for _ in range(96)]
    masses = (0.5, 0.6, 0.8, 0.9, 0.99)
    found = ops.staircases_by_mass(spectra, masses, 2)
    assert len(found) == 96
    for i in (0, 50, 95):
        for m, mass in enumerate(masses):
            assert found[i][m].pairs == staircase_by_mass(*spectra[i], mass).pairs


ADDRESS = st.sampled_from([0, 1, 7])
SIZE = st.integers(-3, 3)


@given(ADDRESS, SIZE, ADDRESS, SIZE, ADDRESS, st.floats(), st.integers(-2, 2))
@settings(max_examples=300, deadline=None)
def test_the_border_refuses_bad_addresses(
    g: int, rows: int, a: int, columns: int, widths: int, mass: float, workers: int
) -> None:
    """Null, misaligned and empty arguments are errors, never a crash."""
    core = extension._C
    table = [(g, rows, a, columns, widths)]
    for call in (
        lambda: core.staircase_by_mass(g, rows, a, columns, mass, widths),
        lambda: core.staircase_by_pairs(g, rows, a, columns, rows, widths),
        lambda: core.staircases_by_mass(table, [mass], workers),
        lambda: core.staircases_by_mass([], [], workers),
        lambda: core.staircases_by_common_mass(table, mass),
        lambda: core.scores_by_mass([(g, rows, columns, a)], mass, workers),
        lambda: core.scores_by_mass([], mass, workers),
        lambda: core.scores_by_pairs(g, rows, columns, a, rows, workers),
    ):
        with pytest.raises(ValueError, match=r"null|misaligned|empty|no layer"):
            call()


def test_the_border_refuses_what_is_no_table() -> None:
    core = extension._C
    with pytest.raises(TypeError):
        core.staircases_by_mass([(1, 2, 3)], [0.5], 1)
