"""Every importance against its formula, in the vectors it is of; and what does not go together."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import gpt2, llama, token_batches
from torch import Tensor

import curvfast
from curvfast import Eigenbasis, LayerBasis, Mask, Selection, Staircase
from curvfast.baselines.curvature_free import svd_basis
from curvfast.errors import BasisMismatch, InputError, LayerNotFound, ShapeError
from curvfast.kfac.importance import Importance, get_args, ranked
from curvfast.kfac.selection.rule import Rule

pytestmark = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")
STAIRS = ("kfac", "g_only", "a_only", "svd")
SCORED = [name for name in get_args(Importance) if name not in ("svd", "random")]


@pytest.fixture(scope="module", params=[llama, gpt2], ids=["llama", "gpt2"])
def measured(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, Eigenbasis]:
    torch.manual_seed(7)
    model = request.param()
    basis = curvfast.collect_from(model, token_batches(sizes=(40, 41)), progress=False).eigh()
    return model, basis


@pytest.fixture
def fresh(measured: Any) -> tuple[torch.nn.Module, Eigenbasis]:
    return copy.deepcopy(measured[0]), measured[1]


def matrix(model: torch.nn.Module, name: str) -> Tensor:
    return curvfast.model.layers.linear_layers(model)[name].matrix().clone()


def corrections(basis: Eigenbasis) -> dict[str, Tensor]:
    """Curvature that is no product of two lists, of the sizes that are measured."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: (torch.outer(own.values_g, own.values_a) * torch.rand(
            own.shape, generator=generator, dtype=torch.float64
        )).float()
        for name, own in basis.items()
    }  # fmt: skip


def scores(importance: str, own: LayerBasis, weight: Tensor, corrected: Tensor) -> Tensor:
    """The formulas, written down once more, in float64."""
    g, a = own.values_g, own.values_a
    u, v, w = own.vectors_g.double(), own.vectors_a.double(), weight.double()
    c = u.T @ w @ v
    curvature = g[:, None] * a
    diagonal = torch.outer((u * g @ u.T).diagonal(), (v * a @ v.T).diagonal())
    return {
        "kfac": curvature,
        "ekfac": corrected.double(),
        "kfac_saliency": curvature * c**2,
        "ekfac_saliency": corrected.double() * c**2,
        "g_only": g[:, None].expand_as(w),
        "a_only": a.expand_as(w),
        "identity": w**2,
        "identity_saliency": diagonal * w**2,
    }[importance]


def largest(values: Tensor, rule: Rule) -> Tensor:
    """Return what sorting keeps: by mass with all ties, by pairs with the first of them."""
    ordered, order = values.flatten().sort(descending=True, stable=True)
    if rule.mass is not None:
        reached = (ordered.cumsum(0) < rule.mass * ordered.sum()).sum()
        return values >= ordered[reached]
    kept = torch.zeros(values.numel(), dtype=torch.bool)
    kept[order[: rule.pairs]] = True
    return kept.view_as(values)


@pytest.mark.parametrize("rule", [Rule(mass=0.7), Rule(pairs=301)], ids=["mass", "pairs"])
@pytest.mark.parametrize("importance", SCORED)
def test_what_is_kept_has_the_largest_scores(measured: Any, importance: Any, rule: Rule) -> None:
    model, basis = measured
    given = corrections(basis) if importance.startswith("ekfac") else None
    found = curvfast.select(
        model, basis, importance, mass=rule.mass, pairs=rule.pairs, corrections=given
    )
    assert found.importance == importance
    assert found.frame == ("standard" if importance.startswith("identity") else "curvature")
    for name, kept in found.items():
        assert isinstance(kept, Staircase if importance in STAIRS else Mask)
        values = scores(importance, basis[name], matrix(model, name), corrections(basis)[name])
        expected = largest(values, rule)
        edge = values[expected].min()
        differs = kept.dense() != expected
        # Scores are rounded to float32, rotations computed in it: pairs at the edge may swap.
        assert ((values[differs] / edge - 1).abs() < 1e-3).all()
        assert differs.sum() <= 4
        share = float(values[expected].sum() / values.sum())
        assert kept.mass == pytest.approx(share, rel=1e-3)


@pytest.mark.parametrize("importance", get_args(Importance))
def test_an_edit_keeps_that_part_in_its_own_vectors(fresh: Any, importance: Any) -> None:
    model, basis = fresh
    given = corrections(basis) if importance.startswith("ekfac") else None
    found = curvfast.select(model, basis, importance, fraction=0.4, corrections=given)
    before = {name: matrix(model, name).double() for name in basis}
    report = curvfast.edit(model, basis, selection=found)
    for line, (name, kept) in zip(report.layers, found.items(), strict=True):
        weight, own = before[name], basis[name]
        u, v = own.vectors_g.double(), own.vectors_a.double()
        if importance.startswith("identity"):
            u, v = torch.eye(len(u), dtype=u.dtype), torch.eye(len(v), dtype=v.dtype)
        elif importance == "svd":
            u, _, vh = torch.linalg.svd(weight)
            v = vh.T
        expected = u @ (kept.dense() * (u.T @ weight @ v)) @ v.T
        found_weight = matrix(model, name).double()
        assert (found_weight - expected).norm() <= 1e-5 * weight.norm()
        assert (expected - weight).norm() > 0.05 * weight.norm()
        assert line.pairs == kept.pairs


@pytest.mark.parametrize("importance", get_args(Importance))
def test_edit_by_importance_is_edit_by_its_selection(fresh: Any, importance: Any) -> None:
    model, basis = fresh
    twin = copy.deepcopy(model)
    given = corrections(basis) if importance.startswith("ekfac") else None
    found = curvfast.select(model, basis, importance, mass=0.6, corrections=given)
    curvfast.edit(model, basis, selection=found)
    before = {name: matrix(twin, name) for name in basis}
    # 0.6 is the mass of an edit that names none.
    with curvfast.edited(twin, basis, importance=importance, corrections=given):
        for one, two in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(one, two)
    assert all(torch.equal(matrix(twin, name), before[name]) for name in basis)


def test_without_an_importance_nothing_has_changed(fresh: Any) -> None:
    model, basis = fresh
    kept = basis.keep(mass=0.6)
    found = curvfast.select(model, basis, mass=0.6)
    for name in basis:
        assert torch.equal(found[name].widths, kept[name].widths)
        assert found[name] is not kept[name]
    assert (found.importance, found.frame) == (kept.importance, kept.frame) == ("kfac", "curvature")
    twin = copy.deepcopy(model)
    curvfast.edit(model, basis, 0.6)
    curvfast.edit(twin, basis, selection=kept)
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)


def test_one_sided_selections_are_whole_rows_or_columns(measured: Any) -> None:
    model, basis = measured
    rows = curvfast.select(model, basis, "g_only", mass=0.8)
    columns = curvfast.select(model, basis, "a_only", mass=0.8)
    for name, own in basis.items():
        widths = rows[name].widths
        used = int((widths > 0).sum())
        assert set(widths.tolist()) <= {0, own.shape[1]}
        assert float(own.values_g[:used].sum()) >= 0.8 * float(own.values_g.sum())
        assert float(own.values_g[: used - 1].sum()) < 0.8 * float(own.values_g.sum())
        assert len(set(columns[name].widths.tolist())) == 1
        reach = int(columns[name].widths[0])
        assert float(own.values_a[:reach].sum()) >= 0.8 * float(own.values_a.sum())
        assert float(own.values_a[: reach - 1].sum()) < 0.8 * float(own.values_a.sum())


def test_corrections_that_are_products_change_nothing(measured: Any) -> None:
    model, basis = measured
    products = {n: torch.outer(own.values_g, own.values_a) for n, own in basis.items()}
    for plain, corrected in (("kfac", "ekfac"), ("kfac_saliency", "ekfac_saliency")):
        one = curvfast.select(model, basis, plain, pairs=300)
        two = curvfast.select(model, basis, corrected, pairs=300, corrections=products)
        for name in basis:
            assert torch.equal(one[name].dense(), two[name].dense())


@pytest.mark.parametrize("per", ["position", "sequence"])
def test_measured_corrections_are_taken_as_they_are(measured: Any, per: str) -> None:
    model, basis = measured
    batches = token_batches(sizes=(12,))
    found = curvfast.correct(model, basis, batches, per=per, progress=False)
    one = curvfast.select(model, basis, "ekfac", pairs=200, corrections=found)
    for name, kept in one.items():
        expected = largest(found[name].double(), Rule(pairs=200))
        assert torch.equal(kept.dense(), expected)
    some = list(basis)[:2]
    fewer = curvfast.correct(model, basis, batches, some, per=per, progress=False)
    with pytest.raises(LayerNotFound, match="collect them for the same layers"):
        curvfast.select(model, basis, "ekfac", pairs=200, corrections=fewer)
    two = curvfast.select(model, basis, "ekfac", pairs=200, corrections=fewer, layers=some)
    for name in some:
        assert torch.equal(two[name].dense(), one[name].dense())


@pytest.mark.parametrize("importance", get_args(Importance))
def test_patches_and_factors_are_of_the_same_edit(fresh: Any, importance: Any) -> None:
    model, basis = fresh
    given = corrections(basis) if importance.startswith("ekfac") else None
    options = {"fraction": 0.05, "importance": importance, "corrections": given}
    patched, factored = copy.deepcopy(model), copy.deepcopy(model)
    before = {name: matrix(model, name) for name in basis}
    curvfast.make_patch(model, basis, **options).apply(patched)
    assert all(torch.equal(matrix(model, name), before[name]) for name in basis)
    forms = curvfast.factorize(factored, basis, **options)
    report = curvfast.edit(model, basis, **options)
    assert report.provenance["rule"] == {
        "fraction": 0.05, "importance": importance, **({"corrections": "given"} if given else {})
    }  # fmt: skip
    there = dict(factored.named_modules())
    for form in forms.layers:
        edited = matrix(model, form.name)
        assert torch.equal(matrix(patched, form.name), edited)
        new = there[form.name].weight.detach()
        new = new if new.shape == edited.shape else new.T
        assert (new - edited).norm() <= 1e-5 * before[form.name].norm()
    if importance == "svd":
        assert {form.form for form in forms.layers} == {"low rank"}
    if importance == "identity":
        assert {form.form for form in forms.layers} == {"dense"}


def test_rows_of_the_weight_itself_are_edited_in_place_not_factored() -> None:
    model, basis = bare()
    few = torch.zeros(5, 4, dtype=torch.bool)
    few[2] = True
    before = model[0].weight.detach().clone()
    kept = Selection({"0": Mask.pack(few)}, "identity", "standard")
    assert curvfast.factorize(model, basis, selection=kept).layers[0].form == "dense"
    assert torch.equal(model[0].weight, before * few)


@pytest.mark.parametrize("known", [False, True], ids=["found anew", "given"])
def test_singular_directions_are_the_best_of_their_number(fresh: Any, known: bool) -> None:
    model, basis = fresh
    given = svd_basis(model, basis) if known else basis
    before = {name: matrix(model, name).double() for name in basis}
    curvfast.edit(model, given, pairs=5, importance="svd")
    for name, weight in before.items():
        u, s, vh = torch.linalg.svd(weight)
        best = (u[:, :5] * s[:5]) @ vh[:5]
        assert (matrix(model, name) - best).norm() <= 1e-5 * weight.norm()
    for name, weight in before.items():
        energies = torch.linalg.svdvals(weight).square()
        shares = energies.cumsum(0) / energies.sum()
        model = copy.deepcopy(fresh[0])
        curvfast.model.layers.linear_layers(model)[name].write(weight.float())
        kept = curvfast.select(model, basis, "svd", mass=0.5, layers=name)[name]
        rank = int((shares < 0.5).sum()) + 1
        assert used(kept) == (rank, rank)
        assert kept.mass == pytest.approx(float(shares[rank - 1]))


def used(kept: Staircase) -> tuple[int, int]:
    return int((kept.widths > 0).sum()), int(kept.widths[0])


def test_a_common_threshold_weighs_layers_against_each_other(measured: Any) -> None:
    model, basis = measured
    for importance in ("kfac_saliency", "identity", "g_only", "svd"):
        found = curvfast.select(model, basis, importance, mass=0.5, globally=True)
        if importance == "svd":
            values = {n: torch.linalg.svdvals(matrix(model, n).double()).square() for n in basis}
            kept = {n: v[: used(found[n])[0]] for n, v in values.items()}
            lost = {n: v[used(found[n])[0] :] for n, v in values.items()}
        else:
            dense = {n: found[n].dense() for n in basis}
            values = {
                n: scores(importance, basis[n], matrix(model, n), matrix(model, n)) for n in basis
            }
            kept = {n: v[dense[n]] for n, v in values.items()}
            lost = {n: v[~dense[n]] for n, v in values.items()}
        least, most = (torch.cat([*part.values()]) for part in (kept, lost))
        assert least.min() >= most.max() * (1 - 1e-4)
        total = float(sum(v.sum() for v in values.values()))
        assert least.sum() >= 0.5 * total * (1 - 1e-5)
        assert least[least > least.min() * (1 + 1e-9)].sum() < 0.5 * total * (1 + 1e-5)
        for name, kept_values in kept.items():
            share = float(kept_values.sum() / values[name].sum())
            assert found[name].mass == pytest.approx(share, rel=1e-3)


def test_random_pairs_are_as_many_seeded_and_leave_the_global_state(measured: Any) -> None:
    model, basis = measured
    state = torch.get_rng_state()
    kept = basis.keep(mass=0.7)
    one, two, other = (
        curvfast.select(model, basis, "random", mass=0.7, seed=seed) for seed in (1, 1, 2)
    )
    assert one.pairs == kept.pairs
    for name in basis:
        assert torch.equal(one[name].kept, two[name].kept)
        assert not torch.equal(one[name].kept, other[name].kept)
    alike = curvfast.select(model, basis, "random", pairs=200)
    first, second = [n for n in basis if basis[n].shape == basis[next(iter(basis))].shape][:2]
    assert not torch.equal(alike[first].kept, alike[second].kept)
    # Nor are one layer's pairs another's by the next seed: seeds are to be averaged over.
    after = curvfast.select(model, basis, "random", pairs=200, seed=1)
    assert not torch.equal(after[first].kept, alike[second].kept)
    assert torch.equal(torch.get_rng_state(), state)


def test_another_selection_can_be_as_large(measured: Any) -> None:
    model, basis = measured
    kept = basis.keep(mass=0.7)
    found = curvfast.select(model, basis, "kfac_saliency", pairs=kept.pairs)
    assert found.pairs == kept.pairs
    assert len(set(found.pairs.values())) > 1
    again = curvfast.select(model, basis, "identity", fraction=kept.fractions)
    assert again.pairs == kept.pairs


def test_the_complement_drops_the_top(fresh: Any) -> None:
    model, basis = fresh
    top = curvfast.select(model, basis, "kfac_saliency", mass=0.1)
    rest = top.complement()
    assert rest.importance == "complement of kfac_saliency"
    assert rest.complement().importance == "kfac_saliency"
    assert (rest.frame, rest.totals) == (top.frame, top.totals)
    twin = copy.deepcopy(model)
    before = {name: matrix(model, name) for name in basis}
    curvfast.edit(model, basis, selection=top)
    curvfast.edit(twin, basis, selection=rest)
    for name, weight in before.items():
        assert rest[name].mass == pytest.approx(1 - top[name].mass)
        both = matrix(model, name) + matrix(twin, name)
        assert (both - weight).norm() <= 3e-6 * weight.norm()
        assert torch.equal(rest.complement()[name].dense(), top[name].dense())


def scaled(basis: Eigenbasis, exponent: int) -> Eigenbasis:
    scale = 2.0**exponent
    return Eigenbasis(
        {
            name: replace(own, values_g=own.values_g * scale, values_a=own.values_a * scale)
            for name, own in basis.items()
        }
    )


@pytest.mark.parametrize("exponent", [-120, -400, 90])
def test_curvature_beyond_the_range_of_float32_ranks_as_it_did(
    measured: Any, exponent: int
) -> None:
    model, basis = measured
    for importance in ("kfac_saliency", "identity_saliency", "g_only"):
        for rule in ({"mass": 0.9}, {"fraction": 0.99}):
            one = curvfast.select(model, basis, importance, **rule)
            two = curvfast.select(model, scaled(basis, exponent), importance, **rule)
            for name in basis:
                assert torch.equal(one[name].dense(), two[name].dense())


def test_only_chosen_layers_are_selected_and_read() -> None:
    basis = Eigenbasis({name: layer(5, 4) for name in ("x", "y")})
    asked: list[str] = []

    def weights(name: str) -> Tensor:
        asked.append(name)
        return torch.ones(5, 4)

    for importance, reads in (("kfac", 0), ("g_only", 0), ("random", 0), ("kfac_saliency", 2)):
        asked.clear()
        assert list(ranked(importance, basis, weights, Rule(mass=0.5))) == ["x", "y"]
        assert len(asked) == reads


def test_layers_restrict_what_is_selected(measured: Any) -> None:
    model, basis = measured
    chosen = list(basis)[1]
    found = curvfast.select(model, basis, "identity", mass=0.5, layers=chosen)
    assert list(found) == [chosen]


def test_low_precision_weights_are_ranked_in_float32(fresh: Any) -> None:
    model, basis = fresh
    model.to(torch.bfloat16)
    twin = copy.deepcopy(model).float()
    for importance in ("identity", "kfac_saliency"):
        one = curvfast.select(model, basis, importance, pairs=200)
        two = curvfast.select(twin, basis, importance, pairs=200)
        for name in basis:
            assert torch.equal(one[name].dense(), two[name].dense())


def layer(rows: int, columns: int, known: int | None = None) -> LayerBasis:
    g, a = (1 / torch.arange(1, d + 1, dtype=torch.float64) for d in (rows, columns))
    return LayerBasis(a, torch.eye(columns)[:, :known], g, torch.eye(rows)[:, :known])


def bare(rows: int = 5, columns: int = 4) -> tuple[torch.nn.Module, Eigenbasis]:
    model = torch.nn.Sequential(torch.nn.Linear(columns, rows))
    return model, Eigenbasis({"0": layer(rows, columns)})


def zeroed(rows: int = 5, columns: int = 4) -> tuple[torch.nn.Module, Eigenbasis]:
    model, basis = bare(rows, columns)
    torch.nn.init.zeros_(model[0].weight)
    return model, basis


def leading(rows: int = 5, columns: int = 4) -> tuple[torch.nn.Module, Eigenbasis]:
    model, _ = bare(rows, columns)
    return model, Eigenbasis({"0": layer(rows, columns, known=2)})


OK = {"0": torch.ones(5, 4)}


@pytest.mark.parametrize(
    ("make", "options", "error", "match"),
    [
        (bare, {"importance": "best"}, InputError, "pass one of kfac, ekfac"),
        (bare, {"importance": "ekfac"}, InputError, "needs corrections="),
        (bare, {"importance": "ekfac_saliency"}, InputError, "needs corrections="),
        (bare, {"importance": "kfac", "corrections": OK}, InputError, "takes no corrections="),
        (bare, {"importance": "svd", "corrections": {}}, InputError, "takes no corrections="),
        (bare, {"importance": "ekfac", "corrections": {}}, LayerNotFound, "nothing for '0'"),
        (bare, {"importance": "ekfac", "corrections": {"0": torch.ones(4, 5)}}, ShapeError, "4, 5"),
        (bare, {"importance": "ekfac", "corrections": {"0": -OK["0"]}}, InputError, "'0' must be"),
        (
            bare,
            {"importance": "ekfac", "corrections": {"0": OK["0"] / 0}},
            InputError,
            "NaN or inf",
        ),
        (bare, {"importance": "ekfac", "corrections": {"0": 0 * OK["0"]}}, InputError, "is zero"),
        (zeroed, {"importance": "identity"}, InputError, "score of layer '0' is zero"),
        (zeroed, {"importance": "kfac_saliency"}, InputError, "score of layer '0' is zero"),
        (zeroed, {"importance": "svd"}, InputError, "weight of layer '0' is zero"),
        (leading, {"importance": "kfac_saliency"}, InputError, "needs all eigenvectors"),
        (leading, {"importance": "identity_saliency"}, InputError, "needs all eigenvectors"),
        (
            leading,
            {"importance": "ekfac_saliency", "corrections": OK},
            InputError,
            "needs all eigenvectors",
        ),
        (leading, {"importance": "ekfac", "corrections": OK}, InputError, "leading 2 of 5"),
        (
            leading,
            {"importance": "ekfac", "corrections": {"0": torch.ones(2, 2)}},
            ShapeError,
            "without mass=",
        ),
        (leading, {"importance": "g_only"}, InputError, "leading 2 of 5"),
        (bare, {"selection": {}, "importance": "kfac"}, InputError, "has made the choice"),
        (bare, {"selection": {}, "corrections": OK}, InputError, "has made the choice"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_written(
    make: Callable[..., Any], options: Any, error: type[Exception], match: str
) -> None:
    model, basis = make()
    before = model[0].weight.clone()
    with pytest.raises(error, match=match):
        curvfast.edit(model, basis, **options)
    if "selection" not in options:
        with pytest.raises(error, match=match):
            curvfast.select(model, basis, mass=0.6, **options)
    assert torch.equal(model[0].weight, before)


def test_leading_eigenpairs_suffice_where_no_more_is_kept() -> None:
    model, basis = leading()
    for importance, given in (("kfac", None), ("ekfac", {"0": torch.outer(*_steep())})):
        found = curvfast.select(model, basis, importance, pairs=1, corrections=given)
        before = model[0].weight.clone()
        with curvfast.edited(model, basis, selection=found):
            expected = torch.zeros_like(before)
            expected[0, 0] = before[0, 0]
            assert torch.equal(model[0].weight, expected)
    whole = {"0": Mask.pack(torch.ones(5, 4, dtype=torch.bool))}
    with pytest.raises(InputError, match="leading 2 of 5"):
        curvfast.edit(model, basis, selection=whole)
    # A selection of rows and columns needs no eigenvector at all.
    curvfast.edit(model, basis, importance="identity", fraction=0.5)
    assert (model[0].weight != 0).sum() == 10


def _steep() -> tuple[Tensor, Tensor]:
    return 10.0 ** -torch.arange(5.0), 10.0 ** -torch.arange(4.0)


class TestWrongBases:
    def test_a_selection_of_another_eigenbasis(self, fresh: Any) -> None:
        model, basis = fresh
        other = curvfast.collect_from(
            model, token_batches(sizes=(23,)), seed=5, progress=False
        ).eigh()
        for importance in ("kfac", "kfac_saliency", "random"):
            found = curvfast.select(model, basis, importance, fraction=0.5)
            before = copy.deepcopy(model.state_dict())
            with pytest.raises(BasisMismatch, match="pass the basis it was made with"):
                curvfast.edit(model, other, selection=found)
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        # Rows and columns of the weight itself are the same in every basis.
        found = curvfast.select(model, basis, "identity", fraction=0.5)
        curvfast.edit(model, other, selection=found)

    def test_the_same_basis_found_in_another_precision_is_the_same(self, fresh: Any) -> None:
        model, _ = fresh
        factors = curvfast.collect_from(model, token_batches(sizes=(40,)), progress=False)
        found = factors.eigh().keep(mass=0.5)
        curvfast.edit(model, factors.eigh(dtype=torch.float32), selection=found)

    def test_curvature_in_singular_vectors(self, fresh: Any) -> None:
        model, basis = fresh
        singular = svd_basis(model, basis)
        with pytest.raises(BasisMismatch, match="eigenvectors of curvature"):
            curvfast.edit(model, singular, selection=basis.keep(mass=0.5))
        for importance in ("kfac", "g_only", "kfac_saliency", "identity_saliency", "random"):
            with pytest.raises(InputError, match="no curvature to rank by"):
                curvfast.select(model, singular, importance, mass=0.5)
        for call in (lambda: singular.keep(mass=0.5), lambda: singular.keep_each([0.5])):
            with pytest.raises(InputError, match="no curvature to rank by"):
                call()

    def test_singular_vectors_of_another_weight(self, fresh: Any) -> None:
        model, basis = fresh
        singular = svd_basis(model, basis)
        found = curvfast.select(model, singular, "svd", fraction=0.5)
        other = copy.deepcopy(model)
        for name in basis:
            own = curvfast.model.layers.linear_layers(other)[name]
            own.write(2 * own.matrix())
        with pytest.raises(BasisMismatch, match="pass the basis it was made with"):
            curvfast.edit(model, svd_basis(other, basis), selection=found)
        # What was found of the weights goes with their singular vectors, given or found again.
        anew = curvfast.select(model, basis, "svd", fraction=0.5)
        twin = copy.deepcopy(model)
        curvfast.edit(model, singular, selection=anew)
        curvfast.edit(twin, basis, selection=found)
        for one, two in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(one, two)

    def test_a_plain_mapping_is_of_the_basis_it_comes_with(self, fresh: Any) -> None:
        model, basis = fresh
        singular = svd_basis(model, basis)
        found = curvfast.select(model, singular, "svd", fraction=0.5)
        twin = copy.deepcopy(model)
        curvfast.edit(model, singular, selection=found)
        curvfast.edit(twin, singular, selection=dict(found))
        for one, two in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(one, two)


def test_a_saved_selection_edits_alike(fresh: Any, tmp_path: Any) -> None:
    model, basis = fresh
    twin = copy.deepcopy(model)
    for importance in ("kfac", "kfac_saliency", "identity", "svd"):
        found = curvfast.select(model, basis, importance, fraction=0.5)
        found.save_pretrained(tmp_path / importance)
        again = Selection.from_pretrained(tmp_path / importance)
        with curvfast.edited(model, basis, selection=found):
            with curvfast.edited(twin, basis, selection=again):
                for one, two in zip(model.parameters(), twin.parameters(), strict=True):
                    assert torch.equal(one, two)


def test_a_saved_basis_of_singular_vectors_says_so(fresh: Any, tmp_path: Any) -> None:
    model, basis = fresh
    svd_basis(model, basis).save_pretrained(tmp_path)
    assert Eigenbasis.from_pretrained(tmp_path).frame == "singular"
    assert Eigenbasis.from_pretrained(tmp_path, lazy=True).frame == "singular"
