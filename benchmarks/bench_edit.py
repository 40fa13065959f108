"""From factors to edited weights: one ρ, a sweep of them, and collecting as well."""

from __future__ import annotations

from typing import Any

import official
import pytest
import torch
from peers.cases import CASES
from torch import Tensor, nn

import curvfast
from curvfast import Eigenbasis, Factors
from curvfast.core.projection import project as projected
from curvfast.core.projection import rotate, rotate_back, sweep

MASSES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
CASE = CASES["wide"]
LAYERS = ["model.layers.2.mlp.up_proj"]
# The power of the spectra, i^-1: eight masses take the heap some seconds.
UNEVEN = 1.0

pytestmark = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")


@pytest.fixture(scope="module")
def uneven() -> tuple[nn.Module, Factors]:
    """A model and factors whose spectra fall as those of trained models do."""
    generator = torch.Generator().manual_seed(0)

    def factor(d: int) -> Tensor:
        vectors = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
        values = torch.arange(1, d + 1, dtype=torch.float64) ** -UNEVEN
        return ((vectors * values) @ vectors.T).float()

    shape = (CASE.mlp, CASE.hidden)
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
    layer = curvfast.LayerFactors(factor(shape[1]), factor(shape[0]), 1, 1)
    return model, Factors({"0": layer})


def weights(model: nn.Module, basis: Eigenbasis) -> list[Tensor]:
    """Return the weight at each ρ, rotated once."""
    kept = [selection["0"] for selection in basis.keep_each(MASSES)]
    return list(sweep(model[0].weight.detach(), basis["0"], kept))


def test_a_sweep_of_eight_masses(race: Any, uneven: tuple[nn.Module, Factors]) -> None:
    """Against eight edits of the published kind: each decomposes, ranks and rotates anew."""
    model, factors = uneven
    weight, layer = model[0].weight.detach(), factors["0"]

    def theirs() -> list[Tensor]:
        return [official.edit(weight, layer.A, layer.G, mass) for mass in MASSES]

    for ours, other in zip(weights(model, factors.eigh()), theirs(), strict=True):
        assert (ours - other).norm() <= 1e-2 * weight.norm()
    race(lambda: weights(model, factors.eigh()), theirs, rounds=5)


def test_a_sweep_against_a_published_edit_without_its_heap(
    race: Any, uneven: tuple[nn.Module, Factors]
) -> None:
    """The same race with the staircase in the heap's place: decomposition and products alone."""
    model, factors = uneven
    weight, layer = model[0].weight.detach(), factors["0"]

    def theirs() -> None:
        for mass in MASSES:
            (g, u_g), (a, u_a) = official.eigh(layer.G), official.eigh(layer.A)
            kept = curvfast.core.staircase.staircase_by_mass(g.clamp_min(0), a.clamp_min(0), mass)
            official.project(weight, u_g, u_a, kept.dense())

    race(lambda: weights(model, factors.eigh()), theirs, rounds=5)


@pytest.mark.parametrize("mass", [0.6, 0.9])
def test_projection(race: Any, uneven: tuple[nn.Module, Factors], mass: float) -> None:
    """One weight at one ρ, its basis known: the cheapest exact plan against four dense products."""
    model, factors = uneven
    weight, basis = model[0].weight.detach(), factors.eigh()
    kept = basis.keep(mass=mass)["0"]
    mask = kept.dense()

    def theirs() -> Tensor:
        return rotate_back(rotate(weight, basis["0"]) * mask, basis["0"])

    ours = projected(weight, basis["0"], kept).weight
    torch.testing.assert_close(ours, theirs(), rtol=1e-4, atol=1e-5)
    race(lambda: projected(weight, basis["0"], kept), theirs)


def test_collect_and_edit(race: Any, benchmark: Any) -> None:
    """A whole run on one layer of a Llama: factors, decomposition, ranking, edit."""
    model, batches = CASE.model(), CASE.data(4)
    module = model.get_submodule(LAYERS[0])
    mass = 0.3

    def ours() -> Tensor:
        factors = curvfast.collect_from(model, batches, LAYERS, labels="gold", progress=False)
        with curvfast.edited(model, factors.eigh(), mass=mass):
            return module.weight.detach().clone()

    def theirs() -> Tensor:
        means = official.collect(model, batches, LAYERS)
        edited = official.edit(module.weight, means.a[LAYERS[0]], means.g[LAYERS[0]], mass)
        return edited.detach()

    found, expected = ours(), theirs()
    benchmark.extra_info["difference"] = float((found - expected).norm() / expected.norm())
    assert benchmark.extra_info["difference"] <= 0.05
    race(ours, theirs, rounds=5)
