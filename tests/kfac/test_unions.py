"""Unions of corpora: a task's curvature in the general eigenbasis, added, weighed, taken away."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import curvfast
from curvfast import Eigenbasis, Factors, LayerFactors, Mask, Staircase
from curvfast.errors import InputError, LayerNotFound, ShapeError
from curvfast.kfac import layer_basis, task_curvature

pytestmark = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")
SHAPES = {"up": (9, 6), "gate": (9, 6), "down": (6, 9)}


def corpus(seed: int, scale: float = 1.0, shapes: dict[str, Any] = SHAPES) -> Factors:
    """Factors of data whose directions are the corpus's own; up and gate share their A."""
    generator = torch.Generator().manual_seed(seed)

    def moment(d: int) -> Tensor:
        mixing = torch.randn(d, d, generator=generator)
        rows = torch.randn(50, d, generator=generator) * torch.logspace(0, -1.5, d)
        x = rows @ mixing
        return x.T @ x * scale

    shared = moment(shapes.get("up", (9, 6))[1])
    return Factors(
        {
            name: LayerFactors(shared if name != "down" else moment(d_in), moment(d_out), 50, 50)
            for name, (d_out, d_in) in shapes.items()
        }
    )


@pytest.fixture
def general() -> Factors:
    return corpus(1)


@pytest.fixture
def task() -> Factors:
    return corpus(2, scale=1e-3)


def along(basis: Eigenbasis, factors: Factors, name: str) -> Tensor:
    """λᵗᵢ μᵗⱼ, direction by direction, in float64."""
    u, v = basis[name].vectors_g.double(), basis[name].vectors_a.double()
    g = torch.stack([x @ factors[name].G.double() @ x for x in u.T])
    a = torch.stack([x @ factors[name].A.double() @ x for x in v.T])
    return torch.outer(g, a)


def products(basis: Eigenbasis, name: str) -> Tensor:
    return torch.outer(basis[name].values_g, basis[name].values_a)


def by_sorting(scores: Tensor, pairs: int) -> Tensor:
    kept = torch.zeros(scores.numel(), dtype=torch.bool)
    kept[scores.flatten().argsort(descending=True, stable=True)[:pairs]] = True
    return kept.view_as(scores)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weight", [0.7, 1e6, -0.4])
def test_scores_are_of_both_corpora_in_the_general_eigenbasis(
    general: Factors, task: Factors, weight: float, normalize: bool
) -> None:
    basis = general.eigh()
    union = basis.with_task(task, weight, normalize=normalize)
    kept = union.keep(pairs=20)
    plain = basis.keep(pairs=20)
    changed = 0
    for name in SHAPES:
        own, other = products(basis, name), along(basis, task, name)
        scale = own.sum() / other.sum() if normalize else 1.0
        expected = by_sorting((own + weight * scale * other).clamp_min(0), 20)
        assert torch.equal(kept[name].dense(), expected)
        assert isinstance(kept[name], Mask)
        changed += int((expected != plain[name].dense()).sum())
    # The task's loss is a thousandth of the general one's: unweighed, it has little to say.
    assert changed > 0 or (not normalize and abs(weight) < 1)
    assert (kept.importance, kept.frame, kept.totals) == ("kfac", "curvature", plain.totals)


@given(st.integers(0, 50), st.integers(1, 16))
@settings(max_examples=30, deadline=None)
def test_mass_is_a_share_of_the_summed_scores(seed: int, parts: int) -> None:
    basis, other = corpus(seed).eigh(), corpus(seed + 100)
    mass = parts / 16
    for name, kept in basis.with_task(other, 0.5).keep(mass=mass).items():
        own, added = products(basis, name), along(basis, other, name)
        scores = own + 0.5 * own.sum() / added.sum() * added
        held = scores[kept.dense()]
        assert held.sum() >= mass * scores.sum() * (1 - 1e-5)
        assert held.sum() - held.min() <= mass * scores.sum() * (1 + 1e-5)
        assert held.min() >= scores[~kept.dense()].max() * (1 - 1e-5) if mass < 1 else True
        assert kept.mass == pytest.approx(float(held.sum() / scores.sum()), rel=1e-5)


@given(st.integers(0, 50), st.integers(1, 16))
@settings(max_examples=30, deadline=None)
def test_a_weight_of_zero_is_the_staircase_of_keep(seed: int, parts: int) -> None:
    basis = corpus(seed).eigh()
    for rule in ({"mass": parts / 16}, {"pairs": 3 * parts}, {"fraction": parts / 16}):
        found, plain = basis.with_task(corpus(seed + 100), 0).keep(**rule), basis.keep(**rule)
        for name, kept in plain.items():
            assert isinstance(found[name], Staircase)
            assert torch.equal(found[name].widths, kept.widths)


@given(st.integers(0, 50), st.integers(1, 15), st.floats(0.01, 100), st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_general_corpus_added_to_itself_keeps_what_it_kept(
    seed: int, parts: int, weight: float, normalize: bool
) -> None:
    factors = corpus(seed)
    basis = factors.eigh()
    union = basis.with_task(factors, weight, normalize=normalize)
    for rule in ({"mass": parts / 16}, {"pairs": 3 * parts}):
        found, plain = union.keep(**rule), basis.keep(**rule)
        for name, kept in plain.items():
            differs = found[name].dense() != kept.dense()
            # Neighbours closer than the rounding of float32 eigenvectors may swap.
            values = products(basis, name)[differs]
            assert ((values / kept.threshold - 1).abs() < 1e-4).all()
            assert differs.sum() <= 2


def test_normalised_scales_do_not_matter_and_others_do(general: Factors) -> None:
    basis = general.eigh()
    for normalize in (True, False):
        one, two = (
            basis.with_task(corpus(2, scale), 1.0, normalize=normalize).keep(pairs=20)
            for scale in (1.0, 1e-4)
        )
        same = all(torch.equal(one[name].dense(), two[name].dense()) for name in SHAPES)
        assert same == normalize


def test_tasks_add_up_and_leave_the_basis_as_it_was(general: Factors, task: Factors) -> None:
    basis = general.eigh()
    third = corpus(3)
    union = basis.with_task(task, 0.5).with_task(third, -0.2)
    swapped = basis.with_task(third, -0.2).with_task(task, 0.5)
    plain = basis.keep(pairs=20)
    for name in SHAPES:
        own = products(basis, name)
        parts = [along(basis, factors, name) for factors in (task, third)]
        added, taken = (own.sum() / part.sum() * part for part in parts)
        expected = by_sorting((own + 0.5 * added - 0.2 * taken).clamp_min(0), 20)
        assert torch.equal(union.keep(pairs=20)[name].dense(), expected)
        assert torch.equal(swapped.keep(pairs=20)[name].dense(), expected)
        assert torch.equal(basis.keep(pairs=20)[name].widths, plain[name].widths)
    assert (basis.tasks, len(union.tasks)) == ((), 2)


def test_a_union_holds_more_of_the_task(general: Factors, task: Factors) -> None:
    basis = general.eigh()
    shares = [
        [
            float(along(basis, task, name)[kept.dense()].sum() / along(basis, task, name).sum())
            for name, kept in (basis.with_task(task, weight) if weight else basis)
            .keep(pairs=10)
            .items()
        ]
        for weight in (-0.1, 0.0, 0.5, 5.0)
    ]
    for less, more in pairwise(shares):
        assert all(a <= b + 1e-12 for a, b in zip(less, more, strict=True))
        assert sum(less) < sum(more)


def test_what_bends_the_forget_set_most_goes_first(general: Factors) -> None:
    basis = general.eigh()
    union = basis.with_task(corpus(2), -1.0)
    everything = union.keep(mass=1.0)
    for name, kept in everything.items():
        own, other = products(basis, name), along(basis, corpus(2), name)
        scores = own - own.sum() / other.sum() * other
        # Scores below zero count as zero, and have no mass to keep.
        assert torch.equal(kept.dense(), scores > 0)
        assert 0 < kept.pairs < scores.numel()
        positive = int((scores > 0).sum())
        more = union.keep(pairs=positive + 3)
        assert more[name].dense()[scores > 0].all()


def test_several_masses_are_each_of_them(general: Factors, task: Factors) -> None:
    union = general.eigh().with_task(task)
    for mass, found in zip((0.3, 0.9), union.keep_each((0.3, 0.9)), strict=True):
        for name, kept in union.keep(mass=mass).items():
            assert torch.equal(found[name].dense(), kept.dense())


def test_a_common_threshold_is_of_all_layers(general: Factors, task: Factors) -> None:
    basis = general.eigh()
    found = basis.with_task(task, 0.5).keep(mass=0.6, globally=True)
    kept, lost = [], []
    for name in SHAPES:
        own, other = products(basis, name), along(basis, task, name)
        scores = own + 0.5 * own.sum() / other.sum() * other
        kept.append(scores[found[name].dense()])
        lost.append(scores[~found[name].dense()])
    least, most = torch.cat(kept), torch.cat(lost)
    assert least.min() >= most.max()
    total = least.sum() + most.sum()
    assert 0.6 * total <= least.sum() < 0.6 * total + least.min()


def model_of(shapes: dict[str, tuple[int, int]]) -> torch.nn.Module:
    layers = {name: torch.nn.Linear(d_in, d_out) for name, (d_out, d_in) in shapes.items()}
    return torch.nn.ModuleDict(layers)


def test_an_edit_takes_a_union(general: Factors, task: Factors) -> None:
    model = model_of(SHAPES)
    before = {name: model[name].weight.detach().clone() for name in SHAPES}
    basis = general.eigh()
    union = basis.with_task(task, 0.5)
    kept = union.keep(mass=0.7)
    curvfast.edit(model, union, mass=0.7, layers=["up", "down"])
    for name in ("up", "down"):
        own = basis[name]
        c = own.vectors_g.T @ before[name] @ own.vectors_a
        expected = own.vectors_g @ (c * kept[name].dense()) @ own.vectors_a.T
        assert (model[name].weight - expected).norm() <= 1e-5 * before[name].norm()
    assert torch.equal(model["gate"].weight, before["gate"])
    # Its pairs are of the general eigenbasis, so either takes it.
    with curvfast.edited(model, basis, selection=kept):
        pass


def test_importances_weigh_a_union_or_refuse_it(general: Factors, task: Factors) -> None:
    model = model_of(SHAPES)
    basis = general.eigh()
    union = basis.with_task(task, 0.5)
    found = curvfast.select(model, union, "kfac_saliency", pairs=20)
    for name in SHAPES:
        own, other = products(basis, name), along(basis, task, name)
        c = basis[name].vectors_g.T @ model[name].weight.detach() @ basis[name].vectors_a
        scores = (own + 0.5 * own.sum() / other.sum() * other) * c.double() ** 2
        assert torch.equal(found[name].dense(), by_sorting(scores, 20))
    drawn = curvfast.select(model, union, "random", mass=0.6)
    assert drawn.pairs == union.keep(mass=0.6).pairs
    corrections = {name: products(basis, name) for name in SHAPES}
    for importance in ("ekfac", "g_only", "a_only", "identity", "identity_saliency", "svd"):
        given = corrections if importance == "ekfac" else None
        with pytest.raises(InputError, match="with_task"):
            curvfast.select(model, union, importance, pairs=3, corrections=given)


def test_an_a_that_layers_share_is_read_once(
    general: Factors, task: Factors, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    widths: list[int] = []
    original = layer_basis.diagonal

    def watched(matrix: Tensor, vectors: Tensor) -> Tensor:
        widths.append(len(matrix))
        return original(matrix, vectors)

    monkeypatch.setattr(task_curvature, "diagonal", watched)
    general.eigh().with_task(task)
    assert sorted(widths) == [6, 6, 9, 9, 9]
    widths.clear()
    general.eigh(directory=tmp_path).with_task(task)
    assert sorted(widths) == [6, 6, 9, 9, 9]


def test_wide_factors_are_taken_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_basis, "_BAND", 4)
    vectors = torch.linalg.qr(torch.randn(11, 11))[0]
    x = torch.randn(30, 11)
    found = layer_basis.diagonal(x.T @ x, vectors)
    expected = (x.double() @ vectors.double()).square().sum(0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_saved_union_is_the_same(
    general: Factors, task: Factors, tmp_path: Any, lazy: bool
) -> None:
    basis = Factors(general.layers, {"tokens": 50}).eigh()
    union = basis.with_task(task, 0.5).with_task(corpus(3), -0.1, normalize=False)
    union.save_pretrained(tmp_path / "one")
    again = Eigenbasis.from_pretrained(tmp_path / "one", lazy=lazy)
    again.save_pretrained(tmp_path / "two")
    twice = Eigenbasis.from_pretrained(tmp_path / "two", lazy=lazy)
    assert again.provenance == twice.provenance == {"tokens": 50}
    for name, kept in union.keep(mass=0.7).items():
        for read in (again, twice):
            assert torch.equal(read.keep(mass=0.7)[name].kept, kept.kept)


def broken(factors: Factors, value: float) -> Factors:
    g = torch.full_like(factors["down"].g_sum, value)
    own = LayerFactors(factors["down"].a_sum, g, 50, 50)
    return Factors({**factors.layers, "down": own})


def test_tasks_that_do_not_fit_are_refused_by_name(general: Factors, task: Factors) -> None:
    basis = general.eigh()
    partly = Factors({"up": task["up"]})
    with pytest.raises(LayerNotFound, match="'gate', 'down'"):
        basis.with_task(partly)
    assert len(basis.restricted(["up"]).with_task(partly).keep(pairs=3)) == 1
    wider = corpus(2, shapes={**SHAPES, "down": (6, 8)})
    with pytest.raises(ShapeError, match=r"'down' is \(6, 8\) in the task and \(6, 9\)"):
        basis.with_task(wider)
    for value in (0.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="layer 'down'"):
            basis.with_task(broken(task, value))
    for weight in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="finite"):
            basis.with_task(task, weight)
    with pytest.raises(InputError, match="leading eigenpairs only"):
        short(basis).with_task(task)
    with pytest.raises(InputError, match="singular vectors"):
        Eigenbasis(basis.layers, frame="singular").with_task(task)


def test_marginals_come_before_tasks(general: Factors, task: Factors) -> None:
    weighted = Factors(
        {
            name: replace(own, a_weighted=own.a_sum * 2, g_weighted=own.g_sum * 3)
            for name, own in general.items()
        },
        {"tokens": 50},
    )
    basis = weighted.eigh()
    with pytest.raises(InputError, match=r"call with_marginals\(\) before with_task\(\)"):
        basis.with_task(task).with_marginals(weighted)
    union = basis.with_marginals(weighted).with_task(task, 0.5)
    assert union.provenance == basis.provenance == {"tokens": 50}
    for name, kept in union.keep(pairs=20).items():
        own, other = products(union, name), along(union, task, name)
        scores = own + 0.5 * own.sum() / other.sum() * other
        assert torch.equal(kept.dense(), by_sorting(scores, 20))


def test_what_rounds_below_zero_is_no_curvature() -> None:
    basis = Eigenbasis({"up": curvfast.LayerBasis(*(torch.ones(2), torch.eye(2)) * 2)})
    sums = torch.diag(torch.tensor([1.0, -1e-7]))
    union = basis.with_task(Factors({"up": LayerFactors(sums, sums, 1, 1)}))
    for values in union.tasks[0].spectra["up"]:
        assert values.tolist() == [1.0, 0.0]


def short(basis: Eigenbasis) -> Eigenbasis:
    own = basis["up"]
    cut = curvfast.LayerBasis(own.values_a, own.vectors_a[:, :2], own.values_g, own.vectors_g)
    return Eigenbasis({**basis.layers, "up": cut})


def test_layers_the_basis_lacks_are_no_matter(general: Factors, task: Factors) -> None:
    basis = general.eigh().restricted(["up", "down"])
    found, all_ = (b.with_task(task).keep(pairs=9) for b in (basis, general.eigh()))
    assert list(found) == ["up", "down"]
    assert torch.equal(found["down"].dense(), all_["down"].dense())
    with pytest.raises(LayerNotFound, match="'nowhere'"):
        basis.restricted(["nowhere"])
