"""The edit: an orthogonal projection of each weight, nothing else touched, undone bit for bit."""

from __future__ import annotations

import copy
import json
import weakref
from typing import Any

import pytest
import torch
from cases import gpt2, llama, token_batches
from transformers import GPT2LMHeadModel

import curvfast
from curvfast import storage
from curvfast.baselines.svd import svd_basis
from curvfast.core.eigenbasis import Eigenbasis, LayerBasis
from curvfast.core.mask import random_mask
from curvfast.core.projection import drop_, project, rotate, rotate_back, sweep
from curvfast.core.selection import Selection
from curvfast.core.staircase import staircase_by_mass
from curvfast.errors import BasisMismatch, InputError, LayerNotFound
from curvfast.ops import registry

pytestmark = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")


@pytest.fixture(params=[llama, gpt2], ids=["llama", "gpt2"])
def measured(request: pytest.FixtureRequest):
    model = request.param()
    # Biases that are not zero, or leaving them untouched would not show.
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    basis = curvfast.collect_from(model, token_batches(sizes=(40, 41)), progress=False).eigh()
    return model, basis


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def matrix(model, name):
    return curvfast.layers.linear_layers(model)[name].matrix().clone()


def test_the_edit_is_its_definition(measured) -> None:
    """W' = Σ over kept pairs of u_i (u_iᵀ W v_j) v_jᵀ, summed pair by pair in float64."""
    model, basis = measured
    name = next(iter(basis))
    before = matrix(model, name).double()
    kept = basis.keep(mass=0.7)[name].dense()
    u, v = basis[name].vectors_g.double(), basis[name].vectors_a.double()
    expected = torch.zeros_like(before)
    for i, j in kept.nonzero().tolist():
        expected += (u[:, i] @ before @ v[:, j]) * torch.outer(u[:, i], v[:, j])
    report = curvfast.edit(model, basis, mass=0.7)
    assert (matrix(model, name).double() - expected).norm() <= 1e-5 * before.norm()
    assert report.layers[0].pairs == kept.sum()
    change = (expected - before).norm() / before.norm()
    assert report.layers[0].relative_change == pytest.approx(float(change), rel=1e-4)


def test_only_the_chosen_weights_change(measured) -> None:
    model, basis = measured
    before = weights(model)
    chosen = next(iter(basis))
    curvfast.edit(model, basis, 0.5, chosen)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {f"{chosen}.weight"}


def test_keeping_everything_is_the_identity_to_rounding(measured) -> None:
    model, basis = measured
    before = weights(model)
    curvfast.edit(model, basis, fraction=1.0)
    for name, parameter in model.named_parameters():
        assert (parameter - before[name]).norm() <= 2e-6 * before[name].norm().clamp_min(1)


def test_kept_and_removed_add_up_and_are_orthogonal(measured) -> None:
    model, basis = measured
    for name, kept in basis.keep(mass=0.6).items():
        weight = matrix(model, name)
        stays = project(weight, basis[name], kept).weight
        goes = project(weight, basis[name], kept.complement()).weight
        assert (stays + goes - weight).norm() <= 3e-6 * weight.norm()
        assert (stays * goes).sum().abs() <= 1e-6 * weight.norm() ** 2


def test_editing_twice_is_editing_once(measured) -> None:
    model, basis = measured
    curvfast.edit(model, basis, mass=0.6)
    once = weights(model)
    curvfast.edit(model, basis, mass=0.6)
    for name, parameter in model.named_parameters():
        assert (parameter - once[name]).norm() <= 3e-6 * once[name].norm().clamp_min(1)


def test_full_strength_is_the_edit_and_none_leaves_every_bit(
    measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, basis = measured
    # The zero that is negative: adding a multiple of nothing would make it positive.
    curvfast.layers.linear_layers(model)[next(iter(basis))].parameter.data[0] = -0.0
    before, twin = weights(model), copy.deepcopy(model)
    report = curvfast.edit(model, basis, mass=0.6, strength=0)
    assert all(layer.relative_change == 0 for layer in report.layers)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.view(torch.int32), before[name].view(torch.int32))
    curvfast.edit(model, basis, mass=0.6, strength=0.5)
    with monkeypatch.context() as patch:
        # Nothing is mixed: the weight is the projection, whatever rounding a mixture has.
        patch.setattr(torch, "lerp", None)
        curvfast.edit(twin, basis, mass=0.6, strength=1)
    for name, kept in basis.keep(mass=0.6).items():
        weight = before[f"{name}.weight"]
        weight = weight.T if isinstance(model, GPT2LMHeadModel) else weight
        assert torch.equal(matrix(twin, name), project(weight, basis[name], kept).weight)
        assert not torch.equal(matrix(twin, name), matrix(model, name))


@pytest.mark.parametrize("strength", [0.3, -0.5, 1.7])
def test_strength_goes_along_the_line_through_weight_and_edit(measured, strength: float) -> None:
    """W + α (W' − W): between, before and beyond; kept pairs stay, removed ones scale by 1 − α."""
    model, basis = measured
    before = {name: matrix(model, name) for name in basis}
    with curvfast.edited(model, basis, mass=0.6, strength=strength) as report:
        assert report.strength == strength
        assert f"strength {strength}" in str(report)
        for entry in report.layers:
            name, weight = entry.name, before[entry.name]
            kept = basis.keep(mass=0.6)[name].dense()
            found = rotate(matrix(model, name), basis[name])
            was = rotate(weight, basis[name])
            expected = was * torch.where(kept, 1.0, 1 - strength)
            assert (found - expected).norm() <= 3e-6 * weight.norm() * max(1, abs(strength))
            change = (matrix(model, name) - weight).norm() / weight.norm()
            assert entry.relative_change == pytest.approx(float(change), rel=1e-3)
    assert all(torch.equal(matrix(model, name), before[name]) for name in basis)


def test_the_report_says_what_it_was_made_from(measured, tmp_path) -> None:
    model, basis = measured
    report = curvfast.edit(model, basis, mass=0.7, strength=0.5)
    assert report.provenance["rule"] == {"mass": 0.7}
    assert report.provenance["factors"]["tokens"] > 0
    assert report.provenance["model"]["class"] == type(model).__name__
    basis.save_pretrained(tmp_path)
    for lazy in (False, True):
        stored = Eigenbasis.from_pretrained(tmp_path, lazy=lazy)
        assert stored.provenance == basis.provenance
    again = curvfast.EditReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again == report


def test_undo_is_bitwise_even_after_an_exception(measured) -> None:
    model, basis = measured
    before = weights(model)

    def interrupted():
        with curvfast.edited(model, basis, mass=0.3) as report:
            assert report.kept_fraction < 1
            assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    model = llama()
    basis = curvfast.collect_from(model, token_batches(), progress=False).eigh()
    model.to(dtype)
    exact = {n: matrix(model, n).double() for n in basis}
    curvfast.edit(model, basis, mass=0.8)
    kept = basis.keep(mass=0.8)
    for name in basis:
        assert matrix(model, name).dtype == dtype
        expected = project(exact[name], basis[name], kept[name]).weight
        tolerance = 5e-3 if dtype == torch.bfloat16 else 1e-6
        assert (matrix(model, name).double() - expected).norm() <= tolerance * exact[name].norm()


def test_rotating_there_and_back_is_the_identity() -> None:
    model = llama()
    basis = curvfast.collect_from(model, token_batches(), progress=False).eigh()
    name = next(iter(basis))
    weight = matrix(model, name)
    assert (
        rotate_back(rotate(weight, basis[name]), basis[name]) - weight
    ).norm() <= 3e-6 * weight.norm()


def test_dropping_is_multiplying_by_the_mask() -> None:
    c = torch.randn(4, 3)
    stairs = staircase_by_mass([4.0, 2, 1, 0.5], [3.0, 1, 0.2], 0.8)
    assert torch.equal(drop_(c.clone(), stairs), c * stairs.dense())
    assert torch.equal(drop_(c.clone(), stairs.complement()), c * ~stairs.dense())


def test_the_report_prints_and_serialises(measured) -> None:
    model, basis = measured
    report = curvfast.edit(model, basis)
    assert all(layer.mass >= 0.6 for layer in report.layers)
    assert len(str(report).splitlines()) == 1 + len(basis)
    assert report.to_dict()["layers"][0]["name"] == next(iter(basis))
    assert 0 < report.kept_fraction < 1


def test_truncated_svd_is_the_best_approximation_of_its_rank() -> None:
    model = llama()
    name = "model.layers.0.mlp.up_proj"
    before = matrix(model, name)
    basis = svd_basis(model, [name])
    rank = round(0.5 * 24)
    curvfast.edit(model, basis, fraction=0.5, importance="svd")
    u, s, vh = torch.linalg.svd(before)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    assert (matrix(model, name) - best).norm() <= 1e-5 * before.norm()


def test_random_pairs_are_as_many_as_the_staircase_keeps(measured) -> None:
    model, basis = measured
    kept = basis.keep(mass=0.7)
    chosen = curvfast.select(model, basis, "random", mass=0.7)
    assert chosen.pairs == kept.pairs


class TestNothingIsWrittenOnAnError:
    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            ({"mass": 0.0}, InputError, "in \\(0, 1\\]"),
            ({"mass": 1.5}, InputError, "in \\(0, 1\\]"),
            ({"fraction": -0.1}, InputError, "in \\[0, 1\\]"),
            ({"mass": 0.5, "fraction": 0.5}, InputError, "only one"),
            ({"layers": "*.q_proj"}, LayerNotFound, "matches none"),
            ({"selection": {}}, LayerNotFound, "says nothing"),
            ({"strength": float("nan")}, InputError, "α"),
            ({"strength": float("inf")}, InputError, "α"),
        ],
    )
    def test_bad_requests(self, measured, options, error, match) -> None:
        model, basis = measured
        before = weights(model)
        with pytest.raises(error, match=match):
            curvfast.edit(model, basis, **options)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())

    def test_a_basis_of_another_model(self, measured) -> None:
        _, basis = measured
        with pytest.raises(BasisMismatch, match="another model"):
            curvfast.edit(llama(hidden_size=32, num_hidden_layers=3), basis)
        with pytest.raises(BasisMismatch, match="another model"):
            curvfast.edit(torch.nn.Linear(3, 3), basis)

    def test_weights_that_are_shared_here_and_were_not_there(self, measured) -> None:
        """Each edit would be made of what the other one left."""
        model, basis = measured
        one, *others = (curvfast.layers.linear_layers(model)[n].module for n in basis)
        other = next(m for m in others if m.weight.shape == one.weight.shape)
        one.weight = other.weight
        before = weights(model)
        with pytest.raises(LayerNotFound, match=r"shares its weight.*layers="):
            curvfast.edit(model, basis)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())

    def test_a_selection_of_another_shape(self, measured) -> None:
        model, basis = measured
        name = next(iter(basis))
        wrong = Selection({n: staircase_by_mass([1.0], [1.0], 1.0) for n in basis})
        with pytest.raises(BasisMismatch, match=name):
            curvfast.edit(model, basis, selection=wrong)


def test_an_edit_plans_each_projection_once(measured, monkeypatch: pytest.MonkeyPatch) -> None:
    model, basis = measured
    searched = []
    resolve = registry.resolve

    def noted(operation: str, *arguments: Any) -> Any:
        searched.append(operation)
        return resolve(operation, *arguments)

    monkeypatch.setattr(registry, "resolve", noted)
    report = curvfast.edit(model, basis, mass=0.7)
    assert searched.count("cheapest_split") == searched.count("project") == len(report.layers)
    assert searched.count("staircases_by_mass") == 1


def test_a_sweep_rotates_once_and_gives_each_projection() -> None:
    basis = LayerBasis(
        torch.rand(6, dtype=torch.float64).sort(descending=True).values,
        torch.linalg.qr(torch.randn(6, 6))[0],
        torch.rand(9, dtype=torch.float64).sort(descending=True).values,
        torch.linalg.qr(torch.randn(9, 9))[0],
    )
    weight = torch.randn(9, 6)
    kept = [Eigenbasis({"w": basis}).keep(mass=mass)["w"] for mass in (0.3, 0.7, 1.0)]
    kept.append(random_mask(9, 6, 20, torch.Generator()))
    for found, selection in zip(sweep(weight, basis, kept), kept, strict=True):
        alone = project(weight, basis, selection)
        torch.testing.assert_close(found, alone.weight, rtol=0, atol=1e-5)
        assert 0 <= alone.work <= 1


def test_editing_with_a_streamed_basis_holds_one_layer_at_a_time(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Wide enough that eigenvalues, which are read for every layer, weigh little beside vectors.
    model = llama(num_hidden_layers=12, hidden_size=96, intermediate_size=160)
    twin = copy.deepcopy(model)
    factors = curvfast.collect_from(model, token_batches(sizes=(40,)), progress=False)
    basis = factors.eigh(directory=tmp_path)
    alive: dict[int, int] = {}
    peaks = []
    original = storage.StoredTensors.__getitem__

    def read(self: Any, key: str) -> torch.Tensor:
        tensor = original(self, key)
        alive[id(tensor)] = tensor.numel() * tensor.element_size()
        weakref.finalize(tensor, alive.pop, id(tensor))
        peaks.append(sum(alive.values()))
        return tensor

    monkeypatch.setattr(storage.StoredTensors, "__getitem__", read)
    report = curvfast.edit(model, basis, mass=0.8)
    monkeypatch.undo()
    largest = max(4 * (len(f.a_sum) ** 2 + len(f.g_sum) ** 2) for f in factors.values())
    assert len(report.layers) == 36
    assert 0 < max(peaks) < 2 * largest
    curvfast.edit(twin, factors.eigh(), mass=0.8)
    for (name, found), exact in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(found, exact), name
