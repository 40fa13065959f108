"""Selection of one layer's pairs: staircases and arbitrary scores, against sorts and a heap."""

from __future__ import annotations

from typing import Any

import official
import pytest
import torch
from torch import Tensor

from curvfast.kfac.selection.rule import Rule
from curvfast.kfac.selection.scores import masks
from curvfast.kfac.selection.staircase import staircase_by_mass

# (d_out, d_in): GPT-2's and Llama-2-7B's up projections.
SHAPES = ((768, 3072), (4096, 11008))


def spectra(shape: tuple[int, int], power: float) -> tuple[Tensor, Tensor]:
    g, a = (torch.rand(d, dtype=torch.float64).pow(power) for d in shape)
    return g.sort(descending=True).values, a.sort(descending=True).values


def dense(values_g: Tensor, values_a: Tensor, mass: float) -> int:
    """Return how many pairs are kept, by sorting every product."""
    products = torch.outer(values_g, values_a).flatten().sort(descending=True).values
    return int((products.cumsum(0) < mass * products.sum()).sum()) + 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_selection(race: Any, shape: tuple[int, int]) -> None:
    g, a = spectra(shape, 3)
    found, expected = staircase_by_mass(g, a, 0.8).pairs, dense(g, a, 0.8)
    # The dense sum rounds: its count may be off by the pairs within its rounding of the mass.
    assert abs(found - expected) <= 1e-9 * shape[0] * shape[1] + 2
    race(lambda: staircase_by_mass(g, a, 0.8), lambda: dense(g, a, 0.8), rounds=5)


def test_selection_against_the_published_heap(race: Any, benchmark: Any) -> None:
    """The heap pays for each pair it pops, so it is given a mass that few pairs hold."""
    g, a = spectra(SHAPES[1], 3)
    mass = 0.1
    found, popped = staircase_by_mass(g, a, mass).pairs, official.top_pairs(g, a, mass)
    assert abs(found - len(popped)) <= 2
    benchmark.extra_info["pairs"] = found
    race(
        lambda: staircase_by_mass(g, a, mass),
        lambda: official.top_pairs(g, a, mass),
        rounds=5,
        rival="heap",
    )


def sorted_scores(scores: Tensor, mass: float) -> Tensor:
    """Return the mask of the largest scores that reach a mass, by sorting them all."""
    ordered = scores.flatten().sort(descending=True).values
    reached = ordered.cumsum(0, dtype=torch.float64)
    return scores >= ordered[(reached < mass * reached[-1]).sum()]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_general_selection(race: Any, shape: tuple[int, int]) -> None:
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(0)).pow_(6)
    found, expected = masks({"x": scores}, Rule(mass=0.8))["x"], sorted_scores(scores, 0.8)
    differs = found.dense() != expected
    # The running sum rounds: scores within its rounding of the threshold may be on either side.
    assert differs.sum() <= 1e-6 * scores.numel()
    edge = scores[expected].min()
    assert ((scores[differs] / edge - 1).abs() < 1e-5).all()
    race(lambda: masks({"x": scores}, Rule(mass=0.8)), lambda: sorted_scores(scores, 0.8), rounds=3)
