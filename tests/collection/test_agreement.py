"""Agreement of two measurements, thinned rows, skipped steps, and sums that are copied."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import llama, token_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import curvfast
from curvfast import Converged, Factors, LayerFactors, ops
from curvfast.collection.convergence import agreements, shared_mass
from curvfast.collection.placement import CopiedSums
from curvfast.errors import InputError
from curvfast.model.rows import AllRows, ChosenRows, FirstRows, Rows, Thinning
from curvfast.ops import MomentRequest

pytestmark = pytest.mark.filterwarnings("ignore:.*rank-deficient")


def factors(seed: int, rows: int = 600, d_in: int = 9, d_out: int = 6) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, d_in, generator=generator) * torch.logspace(0, -1.5, d_in)
    g = torch.randn(rows, d_out, generator=generator) * torch.logspace(0, -1, d_out)
    return Factors({"x": LayerFactors(x.T @ x, g.T @ g, rows, rows)})


def test_a_measurement_agrees_with_itself() -> None:
    found = agreements(factors(0), factors(0), 0.8)["x"]
    assert found.shared_mass == pytest.approx(1, abs=1e-6)
    assert max(found.angle_a, found.angle_g) < 0.1


def test_more_rows_agree_better() -> None:
    shares = [agreements(factors(1, n), factors(2, n), 0.8)["x"].shared_mass for n in (12, 4000)]
    assert shares[0] < 0.95 < shares[1]


@given(st.integers(0, 50), st.integers(51, 99), st.sampled_from([0.3, 0.6, 0.9]))
@settings(max_examples=60, deadline=None)
def test_shared_mass_is_what_brute_force_says_and_at_most_one(
    one: int, two: int, mass: float
) -> None:
    first, second = factors(one, 40), factors(two, 40)
    a, b = first.eigh()["x"], second.eigh()["x"]
    found = shared_mass(a, b, second["x"], mass)
    pairs = second.eigh().keep(mass=mass)["x"].pairs
    products = torch.outer(a.values_g, a.values_a).flatten()
    kept = products.argsort(descending=True, stable=True)[:pairs]
    fisher = torch.kron(second["x"].G.double(), second["x"].A.double())
    directions = torch.kron(a.vectors_g.double(), a.vectors_a.double())[:, kept]
    held = float((directions * (fisher @ directions)).sum())
    best = float(torch.outer(b.values_g, b.values_a).flatten().sort().values[-pairs:].sum())
    assert found == pytest.approx(held / best, rel=1e-5)
    assert found <= 1 + 1e-6


def test_orthogonal_measurements_share_nothing() -> None:
    one, two = torch.zeros(4, 4), torch.zeros(4, 4)
    one[0, 0] = two[3, 3] = 1.0
    pair = [Factors({"x": LayerFactors(m, m, 1, 1)}) for m in (one, two)]
    found = agreements(*pair, 0.5)["x"]
    assert found.shared_mass == pytest.approx(0, abs=1e-6)
    assert found.angle_a == pytest.approx(90, abs=1e-3)


def test_a_layer_without_curvature_agrees_with_none_but_its_like() -> None:
    alive, dead = factors(0)["x"], torch.zeros(6, 6)
    dead = replace(alive, g_sum=dead)
    for one, two, share in ((dead, dead, 1.0), (dead, alive, 0.0), (alive, dead, 0.0)):
        found = agreements(Factors({"x": one}), Factors({"x": two}), 0.6)
        assert found["x"].shared_mass == share


def test_a_collection_stops_once_its_halves_agree() -> None:
    model = llama()
    batches = token_batches(padding="none", sizes=[16] * 24)
    easy, hard = Converged(shared_mass=0.5, first=4), Converged(shared_mass=0.999999, first=4)
    part = ["*.0.mlp.gate_proj", "*.0.mlp.up_proj"]
    stopped = curvfast.collect_from(model, batches, part, until=easy, progress=False)
    whole = curvfast.collect_from(model, batches, part, until=hard, progress=False)
    assert stopped.provenance["batches"] < whole.provenance["batches"] == 24
    curve = whole.provenance["convergence"]
    assert [point["converged"] for point in curve] == [False] * len(curve)
    assert curve[-1]["worst"] > curve[0]["worst"]
    assert set(curve[-1]["layers"]) == set(whole)
    plain = curvfast.collect_from(model, batches, part, progress=False)
    for name in plain:
        torch.testing.assert_close(whole[name].g_sum, plain[name].g_sum)
        assert whole[name].rows_a == plain[name].rows_a


def test_the_rule_is_checked() -> None:
    with pytest.raises(InputError, match="shares"):
        Converged(shared_mass=1.0)
    with pytest.raises(InputError, match="growth"):
        Converged(growth=1.0)
    with pytest.raises(InputError, match="converged"):
        curvfast.collect_from(llama(), [], until="tired")


@given(
    st.integers(1, 40),
    st.one_of(st.floats(0.01, 0.99), st.integers(1, 50)),
    st.sampled_from(["all", "index", "first"]),
)
@settings(max_examples=200, deadline=None)
def test_thinned_rows_are_some_of_those_that_count(n: int, part: float, form: str) -> None:
    rows: Rows = AllRows(n)
    if form == "index":
        rows = ChosenRows(torch.arange(n) * 2)
    elif form == "first":
        rows = FirstRows(3, n + 1, n)
    thinned = Thinning(part, torch.Generator().manual_seed(0)).thin(rows, torch.device("cpu"))
    allowed = {
        "all": set(range(n)),
        "index": set(range(0, 2 * n, 2)),
        "first": {s * (n + 1) + t for s in range(3) for t in range(n)},
    }[form]
    wanted = round(part * rows.count) if part < 1 else part
    assert thinned.count == min(max(1, wanted), rows.count)
    drawn = thinned.indices(torch.device("cpu")).tolist()
    assert drawn == sorted(set(drawn))
    assert set(drawn) <= allowed
    assert len(drawn) == thinned.count


def test_thinned_factors_are_unbiased() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    batches = [torch.randn(n, 6) for n in (40, 50)]

    def measure(**options: Any) -> Tensor:
        found = curvfast.collect_from(model, batches, "*", progress=False, **options)["2"]
        return found.A

    whole, alone = measure(), measure(rows_per_step=0.25)
    mean = torch.stack([measure(rows_per_step=0.25, seed=seed) for seed in range(100)]).mean(0)
    assert (mean - whole).norm() < 0.3 * (alone - whole).norm()


def test_a_and_g_are_thinned_alike_and_no_global_number_is_drawn() -> None:
    model, batch = llama(), token_batches(sizes=(12,))[0]
    before = torch.get_rng_state()
    with curvfast.collect(model, "all", rows_per_step=7) as curvature:
        model(**batch).loss.backward()
    assert torch.equal(torch.get_rng_state(), before)
    for layer in curvature.factors().values():
        assert layer.rows_a == layer.rows_g == 7


def test_every_second_call_is_counted_and_the_others_are_not_touched() -> None:
    model, batches = llama(), token_batches(sizes=(9, 10, 11, 12))
    with curvfast.collect(model, every=2) as some:
        for batch in batches:
            model(**batch).loss.backward()
    with curvfast.collect(model) as chosen:
        for batch in batches[::2]:
            model(**batch).loss.backward()
    for name, layer in chosen.factors().items():
        assert torch.equal(some.factors()[name].a_sum, layer.a_sum)
        assert torch.equal(some.factors()[name].g_sum, layer.g_sum)


@pytest.mark.parametrize(
    "bad",
    [
        {"rows_per_step": 0},
        {"rows_per_step": 2.5},
        {"every": 0},
        {"sums_device": "moon"},
        {"streams": "many"},
        {"streams": "overlap"},
    ],
    ids=str,
)
def test_bad_arguments_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(bad))), curvfast.collect(llama(), **bad):
        pass


@pytest.mark.cpu_branches
def test_copied_sums_are_the_sums() -> None:
    copies = CopiedSums()
    sums = [ops.new_sum(d) for d in (5, 5, 70)]
    expected: list[Tensor] = [torch.zeros(d, d) for d in (5, 5, 70)]
    for turn in range(4):
        for out, dense in zip(sums, expected, strict=True):
            x = torch.randint(-4, 5, (6 + turn, len(dense))).float()
            dense += 2 * x.T @ x
            copies.add(MomentRequest(out, x, scale=2.0))
    copies.flush()
    copies.flush()
    for out, dense in zip(sums, expected, strict=True):
        assert torch.equal(out.dense(), dense)
