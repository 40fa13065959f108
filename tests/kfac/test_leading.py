"""Leading eigenpairs: certified, the kept set that of a full decomposition, or none at all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import curvfast
from curvfast import Eigenbasis, Factors, LayerFactors
from curvfast.errors import BasisMismatch, InputError, NonFiniteError, NumericalWarning
from curvfast.kfac import eigh, leading
from curvfast.kfac.decomposition import decompose_factor
from curvfast.kfac.leading import leading_spectrum, none_above, rayleigh_ritz
from curvfast.kfac.projection import project

D = 640


def matrix(spectrum: Tensor, turn: float = 0.0) -> Tensor:
    d = len(spectrum)
    generator = torch.Generator().manual_seed(5)
    vectors = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    if turn:
        noise = torch.randn(d, d, generator=generator, dtype=torch.float64)
        twist = torch.eye(d, dtype=torch.float64) + turn * (noise - noise.T) / d**0.5
        vectors = torch.linalg.qr(vectors @ twist)[0]
    return (vectors * spectrum) @ vectors.T


def falling(d: int, power: float) -> Tensor:
    return torch.arange(1, d + 1, dtype=torch.float64) ** -power


def massive(d: int) -> Tensor:
    """Return a spectrum with two massive activations, as inputs of a down projection have."""
    return torch.cat([torch.tensor([900.0, 40.0], dtype=torch.float64), falling(d - 2, 0.5)])


def measured(d_in: int = D, d_out: int = 48, turn: float = 0.0) -> Factors:
    a = matrix(massive(d_in), turn)
    gs = [matrix(falling(d_out, p)) for p in (1.0, 1.5)]
    return Factors({f"layer{i}": LayerFactors(a, g, 1, 1) for i, g in enumerate(gs)})


@pytest.mark.parametrize("spectrum", [falling(D, 1), falling(D, 2), massive(D)])
@pytest.mark.parametrize("scale", [1.0, 1e20, 1e-20])
def test_leading_pairs_are_those_of_the_full_decomposition(spectrum: Tensor, scale: float) -> None:
    m = matrix(spectrum) * scale
    full = decompose_factor(m, dtype=torch.float64, title="M")
    found = leading_spectrum(m, 8, share=0.0)
    assert found is not None
    k = found.vectors.shape[1]
    assert k == 8
    torch.testing.assert_close(found.values[:k], full.values[:k], rtol=1e-12, atol=0)
    torch.testing.assert_close(found.vectors, full.vectors[:, :k], rtol=0, atol=1e-6)


def test_the_trace_is_kept_and_the_tail_never_exceeds_what_was_found() -> None:
    m = matrix(massive(D))
    found = leading_spectrum(m, 8, share=0.0)
    assert found is not None
    assert len(found.values) == D
    assert (found.values.diff() <= 0).all()
    torch.testing.assert_close(found.values.sum(), m.trace(), rtol=1e-12, atol=0)


def test_a_spectrum_without_a_gap_is_not_certified() -> None:
    assert leading_spectrum(torch.eye(D, dtype=torch.float64), 8, share=0.0) is None


@pytest.mark.parametrize("kind", ["zeros", "flat"])
def test_what_leading_pairs_cannot_carry_is_given_up_at_once(kind: str, monkeypatch: Any) -> None:
    cycles = []
    original = leading.rayleigh_ritz
    monkeypatch.setattr(leading, "rayleigh_ritz", lambda *a: cycles.append(1) or original(*a))
    m = matrix(falling(D, 0.1) if kind == "flat" else torch.zeros(D, dtype=torch.float64))
    assert leading_spectrum(m, 8, share=0.9) is None
    assert len(cycles) == 1


def test_the_certificate_notices_a_missing_pair() -> None:
    m = matrix(falling(D, 1))
    values, vectors = torch.linalg.eigh(m)
    values, vectors = values.flip(0)[:8], vectors.flip(1)[:, :8]
    bound = float(values[-1])
    assert none_above(m, values, vectors, bound)
    for lost in range(7):
        others = [i for i in range(8) if i != lost]
        assert not none_above(m, values[others], vectors[:, others], bound)


@pytest.mark.parametrize("column", [0, 3, 7])
def test_the_certificate_notices_a_wrong_vector(column: int) -> None:
    m = matrix(falling(D, 1))
    values, vectors = torch.linalg.eigh(m)
    values, vectors = values.flip(0)[:8].clone(), vectors.flip(1)[:, :8].clone()
    bound = float(values[-1])
    twisted = vectors.clone()
    other = torch.linalg.eigh(m)[1][:, 100]
    twisted[:, column] = twisted[:, column] * 0.8 + other * 0.6
    if column < 7:
        assert not none_above(m, values, twisted, bound)
    doubled = vectors.clone()
    doubled[:, column] *= 1.001
    assert not none_above(m, values, doubled, bound)


def test_ritz_vectors_are_orthonormal_and_residuals_true() -> None:
    m = matrix(falling(D, 1))
    block = torch.linalg.qr(torch.randn(D, 20, dtype=torch.float64))[0]
    values, vectors, residuals = rayleigh_ritz(m, block)
    identity = torch.eye(20, dtype=torch.float64)
    torch.testing.assert_close(vectors.T @ vectors, identity, rtol=0, atol=1e-13)
    true = (m @ vectors - vectors * values).norm(dim=0)
    torch.testing.assert_close(residuals, true, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("mass", [0.5, 0.8, 0.9])
def test_the_kept_set_is_that_of_a_full_decomposition(mass: float) -> None:
    factors = measured()
    full, part = factors.eigh(), factors.eigh(mass=mass)
    assert not part["layer0"].complete
    assert part["layer0"].vectors_a.shape[1] < D // 10
    assert part["layer0"].vectors_a is part["layer1"].vectors_a
    for smaller in (mass, mass / 2):
        for name in factors:
            one, two = full.keep(mass=smaller)[name], part.keep(mass=smaller)[name]
            assert torch.equal(one.widths, two.widths)
            assert one.mass == pytest.approx(two.mass, abs=1e-9)


def test_a_factor_that_needs_more_is_decomposed_in_full() -> None:
    factors = Factors({"x": LayerFactors(matrix(falling(D, 0.5)), matrix(falling(48, 1)), 1, 1)})
    assert factors.eigh(mass=0.8)["x"].complete


def test_a_selection_beyond_the_leading_pairs_raises() -> None:
    basis = measured().eigh(mass=0.5)
    with pytest.raises(InputError, match="larger mass="):
        basis.keep(mass=0.9999)
    with pytest.raises(InputError, match="leading"):
        basis.keep(fraction=0.5)
    with pytest.raises(InputError, match="leading"):
        basis.keep_each([0.5, 1.0])
    assert basis.keep(pairs=3)["layer0"].pairs == 3


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer0, self.layer1 = nn.Linear(D, 48, bias=False), nn.Linear(D, 48, bias=False)


@pytest.mark.parametrize("stored", [False, True])
def test_an_edit_by_leading_pairs_is_the_full_one(stored: bool, tmp_path: Any) -> None:
    factors = measured()
    model = Model()
    before = model.layer0.weight.detach().clone()
    full, part = factors.eigh(), factors.eigh(mass=0.8, directory=tmp_path if stored else None)
    edited = []
    for basis in (full, part):
        with curvfast.edited(model, basis, mass=0.8) as report:
            edited.append(model.layer0.weight.detach().clone())
    torch.testing.assert_close(edited[1], edited[0], rtol=0, atol=1e-6)
    assert not torch.equal(edited[0], before)
    assert 0 < report.layers[0].work < 0.6
    with pytest.raises(InputError, match="leading"):
        curvfast.edit(model, part, fraction=0.5)
    assert torch.equal(model.layer0.weight, before)


def test_the_work_told_is_the_work_done() -> None:
    basis = measured().eigh(mass=0.8)
    name, own = next(iter(basis.items()))
    rows, columns = own.shape
    assert own.ranks[0] == rows
    assert own.ranks[1] < columns / 10
    kept = basis.keep(mass=0.8)[name]
    with FlopCounterMode(display=False) as counter:
        found = project(torch.randn(rows, columns), own, kept)
    dense = 4 * rows * columns * (rows + columns)
    assert found.work == pytest.approx(counter.get_total_flops() / dense)


@pytest.mark.parametrize("side", ["a_sum", "g_sum"])
def test_a_layer_without_curvature_stops_no_decomposition(side: str) -> None:
    factors = measured()
    own = factors["layer0"]
    dead = replace(own, **{side: torch.zeros_like(getattr(own, side))})
    part = Factors({"dead": dead, **factors}).eigh(mass=0.8)
    assert not torch.stack([part["dead"].values_a[0], part["dead"].values_g[0]]).all()
    kept, full = part.restricted(factors).keep(mass=0.8), factors.eigh().keep(mass=0.8)
    assert all(torch.equal(kept[name].widths, full[name].widths) for name in factors)


def test_an_earlier_basis_saves_products_and_changes_nothing(monkeypatch: Any) -> None:
    cycles: list[int] = []
    original = leading.rayleigh_ritz
    monkeypatch.setattr(leading, "rayleigh_ritz", lambda *a: cycles.append(1) or original(*a))
    earlier = measured().eigh(mass=0.8)
    later = measured(turn=1e-4)
    cycles.clear()
    cold = later.eigh(mass=0.8)
    in_cold = len(cycles)
    cycles.clear()
    warm = later.eigh(mass=0.8, start=earlier)
    assert len(cycles) < in_cold
    torch.testing.assert_close(
        warm["layer0"].vectors_a, cold["layer0"].vectors_a, rtol=0, atol=1e-6
    )
    assert torch.equal(warm.keep(mass=0.8)["layer0"].widths, cold.keep(mass=0.8)["layer0"].widths)


def test_workers_and_disk_find_the_same(tmp_path: Any) -> None:
    factors = measured()
    one, two = factors.eigh(mass=0.8), factors.eigh(mass=0.8, workers=2, directory=tmp_path)
    for name in factors:
        assert two[name].ranks == one[name].ranks
        assert torch.equal(two[name].vectors_a, one[name].vectors_a)
        assert torch.equal(two[name].values_g, one[name].values_g)
    again = Eigenbasis.from_pretrained(tmp_path)
    assert torch.equal(again["layer0"].vectors_a, one["layer0"].vectors_a)


def test_bad_arguments_are_refused() -> None:
    factors = measured()
    basis = factors.eigh(mass=0.5)
    with pytest.raises(InputError, match="mass"):
        factors.eigh(mass=1.5)
    with pytest.raises(InputError, match="float64"):
        factors.eigh(mass=0.5, dtype=torch.float32)
    with pytest.raises(InputError, match="mass= too"):
        factors.eigh(start=basis)
    with pytest.raises(BasisMismatch, match="another"):
        measured(d_in=576).eigh(mass=0.5, start=basis)
    broken = matrix(massive(D))
    broken[3, 4] = float("nan")
    with pytest.raises(NonFiniteError, match="'x'"):
        Factors({"x": LayerFactors(broken, torch.eye(4), 1, 1)}).eigh(mass=0.5)


def test_levels_rise_until_a_layer_is_content() -> None:
    search = leading.LeadingSearch({"a": 1024, "g": 64}, {"x": ("a", "g")}, 0.8)
    assert search.wanted() == ["a", "g"]
    counts = []
    while (count := search.count("a")) is not None:
        counts.append(count)
        search.note("a", None)
    assert counts == sorted(counts)
    assert len(counts) == 2
    assert search.count("g") is None


def test_small_factors_of_one_width_are_solved_together(monkeypatch: Any) -> None:
    factors = measured(d_in=40)
    alone = factors.eigh()
    shapes: list[torch.Size] = []
    original = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: shapes.append(m.shape) or original(m))
    monkeypatch.setattr(eigh, "_batches", lambda *_: [("g.layer0", "g.layer1"), ("a.layer0",)])
    together = factors.eigh()
    assert shapes == [(2, 48, 48), (40, 40)]
    for name in factors:
        torch.testing.assert_close(together[name].values_g, alone[name].values_g)
        torch.testing.assert_close(together[name].vectors_g, alone[name].vectors_g)


def test_a_failed_batch_is_solved_one_by_one(monkeypatch: Any) -> None:
    factors = measured(d_in=40)
    alone = factors.eigh()
    original = torch.linalg.eigh

    def fails(m: Tensor) -> Any:
        if m.dim() == 3:
            raise torch.linalg.LinAlgError("cusolver error")
        return original(m)

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    monkeypatch.setattr(eigh, "_batches", lambda *_: [("g.layer0", "g.layer1"), ("a.layer0",)])
    with pytest.warns(curvfast.errors.NumericalWarning, match="cusolver error"):
        together = factors.eigh()
    assert torch.equal(together["layer1"].vectors_g, alone["layer1"].vectors_g)


@pytest.mark.parametrize("mass", [None, 0.8])
def test_factors_may_be_decomposed_elsewhere(mass: float | None, monkeypatch: Any) -> None:
    moved = []
    original = Tensor.to
    monkeypatch.setattr(Tensor, "to", lambda t, *a, **k: moved.append(a) or original(t, *a, **k))
    here, there = measured().eigh(mass=mass), measured().eigh(mass=mass, device="cpu")
    assert (torch.device("cpu"),) in moved
    assert torch.equal(here["layer0"].vectors_a, there["layer0"].vectors_a)


def test_a_search_that_fails_is_followed_by_all(monkeypatch: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(eigh, "leading_spectrum", fail)
    with pytest.warns(NumericalWarning, match="A of layer 'layer0' .* failed to converge"):
        found = measured().eigh(mass=0.8)
    assert all(basis.complete for basis in found.values())


def test_a_tie_at_the_end_is_left_out() -> None:
    spectrum = falling(D, 1)
    spectrum[8] = spectrum[7]
    found = leading_spectrum(matrix(spectrum), 8, share=0.0)
    assert found is not None
    assert found.vectors.shape[1] == 7


def test_leading_pairs_that_do_not_suffice_are_followed_by_all() -> None:
    a, g = matrix(falling(D, 1)), matrix(falling(48, 1))
    assert leading_spectrum(a, 8, share=0.3) is not None
    factors = Factors({"x": LayerFactors(a, g, 1, 1)})
    full, part = factors.eigh(), factors.eigh(mass=0.3)
    assert full.keep(mass=0.3)["x"].widths[0] > 10
    assert part["x"].complete
    assert torch.equal(part.keep(mass=0.3)["x"].widths, full.keep(mass=0.3)["x"].widths)


def test_vectors_on_their_way_to_disk_are_not_kept(tmp_path: Any, monkeypatch: Any) -> None:
    held: list[int] = []
    original = leading.LeadingSearch.note

    def note(search: Any, key: str, spectrum: Any) -> None:
        held.append(spectrum.vectors.numel())
        original(search, key, spectrum)

    monkeypatch.setattr(leading.LeadingSearch, "note", note)
    measured(d_in=40).eigh(directory=tmp_path)
    assert held == [0, 0, 0]
