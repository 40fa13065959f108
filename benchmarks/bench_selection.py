"""The exact staircase of one layer: the search over two sorted lists against a dense sort."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from curvfast.core.selection import staircase_by_mass

# (d_out, d_in): GPT-2's and Llama-2-7B's up projections.
SHAPES = ((768, 3072), (4096, 11008))


def dense(values_g: torch.Tensor, values_a: torch.Tensor, mass: float) -> int:
    """Return how many pairs are kept, by sorting every product."""
    products = torch.outer(values_g, values_a).flatten().sort(descending=True).values
    return int((products.cumsum(0) < mass * products.sum()).sum()) + 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_selection(race: Any, shape: tuple[int, int]) -> None:
    g, a = (torch.rand(d, dtype=torch.float64).pow(3).sort(descending=True).values for d in shape)
    found, expected = staircase_by_mass(g, a, 0.8).pairs, dense(g, a, 0.8)
    # The dense sum rounds: its count may be off by the pairs within its rounding of the mass.
    assert abs(found - expected) <= 1e-9 * shape[0] * shape[1] + 2
    race(lambda: staircase_by_mass(g, a, 0.8), lambda: dense(g, a, 0.8), rounds=5)
