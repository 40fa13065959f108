"""Benchmarks of decompositions: leading pairs, cold or warm-started, against all pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from curvfast import Factors, LayerFactors

MASS = 0.8


def turned(spectrum: Tensor, turns: int) -> Tensor:
    """Return a matrix of this spectrum; each turn moves its eigenvectors a little."""
    d = len(spectrum)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    for _ in range(turns):
        noise = torch.randn(d, d, generator=generator, dtype=torch.float64)
        vectors = torch.linalg.qr(vectors + 1e-3 * vectors @ (noise - noise.T) / d**0.5)[0]
    return (vectors * spectrum) @ vectors.T


def measured(d: int, turns: int = 0) -> Factors:
    """Return the factors of a down projection with massive activations: one wide A, one G."""
    tail = torch.arange(1, d - 1, dtype=torch.float64) ** -0.5
    a = turned(torch.cat([torch.tensor([30.0 * d, d], dtype=torch.float64), tail]), turns)
    g = torch.diag(torch.arange(1, 257, dtype=torch.float64) ** -1)
    return Factors({"down": LayerFactors(a, g, 1, 1)})


@pytest.mark.parametrize("start", ["cold", "warm"])
@pytest.mark.parametrize("d", [1024, 2048])
def test_leading_eigenpairs(race: Any, d: int, start: str) -> None:
    earlier = measured(d).eigh(mass=MASS) if start == "warm" else None
    factors = measured(d, turns=1)
    part, full = factors.eigh(mass=MASS, start=earlier), factors.eigh()
    assert part["down"].vectors_a.shape[1] < d / 8
    assert torch.equal(part.keep(mass=MASS)["down"].widths, full.keep(mass=MASS)["down"].widths)
    race(lambda: factors.eigh(mass=MASS, start=earlier), factors.eigh, rounds=5)


@pytest.mark.parametrize("d", [1024, 2048])
def test_a_search_in_vain(race: Any, d: int) -> None:
    """A spectrum that needs every pair: what the search for leading ones costs on top."""
    spectrum = torch.arange(1, d + 1, dtype=torch.float64) ** -0.5
    factors = Factors({"x": LayerFactors(turned(spectrum, 0), torch.eye(8), 1, 1)})
    part, full = factors.eigh(mass=MASS), factors.eigh()
    assert part["x"].complete
    torch.testing.assert_close(part["x"].values_a, full["x"].values_a)
    race(lambda: factors.eigh(mass=MASS), factors.eigh, rounds=3)
