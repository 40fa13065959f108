"""Row and column sums of Λ, from the pass that measures A and G; and the basis ordered by them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import CASES, Case, keep_tokens, llama, token_batches, token_loss
from families import mixture
from torch import nn

import curvfast
from curvfast import Converged, Eigenbasis, Factors, LayerBasis, LayerFactors, ops, storage
from curvfast.collection.config import CollectConfig
from curvfast.collection.moment import Moment
from curvfast.errors import BasisMismatch, InputError
from curvfast.kfac.layer_basis import diagonal
from curvfast.kfac.marginals import marginals_of
from curvfast.model.batch import Batch
from curvfast.ops import TriangularSum

pytestmark = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")

MIXTURE = Case("mixture", lambda: mixture("Mixtral"), token_batches, "mlp", keep_tokens, token_loss)
SIZES = (9, 10, 11, 12, 13)


def run(model: nn.Module, batches: Any, layers: Any = "mlp", **options: Any) -> Factors:
    return curvfast.collect_from(
        model, batches, layers, **{"marginals": True, "progress": False, **options}
    )


def assert_sums_of(factors: Factors, corrections: curvfast.Corrections) -> None:
    basis = factors.eigh()
    assert set(factors) == set(corrections)
    for name, layer in factors.items():
        found = marginals_of(name, basis[name], layer)
        exact = corrections[name].double()
        assert (found.rows - exact.sum(1)).norm() <= 1e-6 * exact.sum(1).norm()
        assert (found.columns - exact.sum(0)).norm() <= 1e-6 * exact.sum(0).norm()


def assert_same(one: Factors, two: Factors, tolerance: float = 0.0) -> None:
    assert list(one) == list(two)
    for name in one:
        for side in ("a_sum", "g_sum", "a_weighted", "g_weighted"):
            mine, other = getattr(one[name], side), getattr(two[name], side)
            assert (mine - other).norm() <= tolerance * other.norm(), side
        assert one[name].rows_g == two[name].rows_g


@pytest.mark.parametrize("case", [*CASES, MIXTURE], ids=str)
def test_marginals_are_row_and_column_sums_of_the_correction(case: Case) -> None:
    model, batches = case.model().eval(), case.batches()
    factors = run(model, batches, case.layers, labels="gold")
    exact = curvfast.correct(model, factors.eigh(), batches, labels="gold", progress=False)
    assert_sums_of(factors, exact)
    assert all(torch.equal(f.a_weighted, f.a_weighted.T) for f in factors.values())


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_units_and_pairs_hold_in_a_loop_that_accumulates(reentrant: bool | None) -> None:
    model = llama().train()
    batches = token_batches("right", (9, 9)) + token_batches("left", (9,))
    expected = run(model, batches, labels="gold")
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    with curvfast.collect(model, marginals=True, loss_scale=1 / 3) as curvature:
        sum(model(**batch).loss / 3 for batch in batches).backward()
    assert_same(curvature.factors(), expected, 1e-5)


def test_a_and_g_are_the_same_bits_with_and_without() -> None:
    model, batches = llama(), token_batches()
    with_, without = (run(model, batches, "all", marginals=m) for m in (True, False))
    for name in without:
        assert torch.equal(with_[name].a_sum, without[name].a_sum)
        assert torch.equal(with_[name].g_sum, without[name].g_sum)
        assert without[name].a_weighted is None
        assert without[name].g_weighted is None
    prefix = "model.layers.0.mlp."
    gate, up = with_[f"{prefix}gate_proj"], with_[f"{prefix}up_proj"]
    assert gate.a_sum is up.a_sum
    assert not torch.allclose(gate.a_weighted, up.a_weighted, rtol=1e-2)
    assert len({id(layer.a_weighted) for layer in with_.values()}) == len(with_) == 21


def test_training_with_and_without_is_bit_identical() -> None:
    model, batches = llama(attention_dropout=0.1).train(), token_batches()
    twin = copy.deepcopy(model)
    weights = []
    for net, options in ((model, {"marginals": True, "every": 1}), (twin, {"every": 10**9})):
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        torch.manual_seed(7)
        with curvfast.collect(net, "all", **options):
            for batch in batches:
                net(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        weights.append((net.state_dict(), torch.get_rng_state()))
    assert all(torch.equal(weights[0][0][name], weights[1][0][name]) for name in weights[0][0])
    assert torch.equal(weights[0][1], weights[1][1])


@pytest.mark.parametrize(
    "options",
    [
        {"layers_per_pass": 4},
        {"sums_device": "cpu"},
        {"sums_device": "disk"},
    ],
    ids=str,
)
def test_what_is_cut_or_moved_changes_no_sum(options: dict[str, Any]) -> None:
    model, batches = llama(), token_batches(sizes=SIZES)
    assert_same(run(model, batches, **options), run(model, batches))


@pytest.mark.parametrize(
    "options", [{}, {"rows_per_step": 0.5}, {"until": Converged(shared_mass=0.999, first=2)}],
    ids=str,
)  # fmt: skip
def test_a_run_cut_anywhere_goes_on_to_the_same_factors(tmp_path: Any, options: Any) -> None:
    model, batches = llama(), token_batches(sizes=SIZES)
    expected = run(model, batches, **options)

    def failing() -> Any:
        yield from batches[:3]
        raise KeyError("the data ends here")

    with pytest.raises(KeyError):
        run(model, failing(), checkpoint=tmp_path, every=1, **options)
    assert_same(run(model, batches, checkpoint=tmp_path, every=1, **options), expected)


def test_halves_and_spilled_sums_add_up() -> None:
    model, batches = llama(), token_batches(sizes=SIZES)
    expected = run(model, batches, labels="gold")
    until = Converged(shared_mass=0.999999, first=2)
    assert_same(run(model, batches, labels="gold", until=until), expected, 1e-6)
    config = CollectConfig(layers="mlp", marginals=True)
    halved = curvfast.Curvature(model, config, "mlp", halves=True)
    model(**batches[0]).loss.backward()
    model(**batches[1]).loss.backward()
    for half in halved.halves():
        assert len(half) == 9
        assert all(f.a_weighted is None and f.g_sum.any() for f in half.values())
    halved.close()
    with curvfast.collect(model, marginals=True, spill_every=2) as curvature:
        for batch in batches:
            model(**batch).loss.backward()
    assert_same(curvature.factors(), expected, 1e-5)


@pytest.mark.parametrize("padding", ["none", "both"])
def test_a_part_of_the_rows_keeps_its_pairs(padding: str) -> None:
    """Both traces are Σ‖a‖²‖g‖², if the same rows are weighted by their own partners."""
    model, batches = llama(), token_batches(padding)
    factors = run(model, batches, rows_per_step=0.3)
    assert factors.rows < run(model, batches).rows
    for layer in factors.values():
        trace = float(layer.a_weighted.trace())
        assert trace == pytest.approx(float(layer.g_weighted.trace()), rel=1e-5)


def test_weights_follow_rows_that_a_view_chooses() -> None:
    """Off the CPU, unpadded sequences are a view without their last positions."""
    x = torch.randint(-3, 4, (3, 7, 4)).float()
    weights = torch.arange(21.0).view(3, 7)
    found = []
    for place in ("meta", "cpu"):
        call = Batch(skip_last=True).call_rows("layer", x, None)
        rows = call.rows("layer", x.shape[:-1], torch.device(place))
        moment = Moment(TriangularSum.zeros(4, 4))
        ops.second_moments_([moment.request(x, rows, 1.0, weights)])
        found.append(moment.dense())
    rows = x[:, :-1].flatten(0, 1)
    exact = rows.T @ (weights[:, :-1].reshape(-1, 1) * rows)
    for each in found:
        torch.testing.assert_close(each, exact)


def test_overflowed_steps_of_amp_are_left_out() -> None:
    model, batches = llama(), token_batches()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with curvfast.collect(model, marginals=True, grad_scaler=scaler) as curvature:
        for i, batch in enumerate(batches):
            (scaler.scale(model(**batch).loss) * (float("inf") if i == 1 else 1.0)).backward()
    assert_same(curvature.factors(), run(model, [batches[0], batches[2]], labels="gold"), 1e-5)


def test_merging_adds_the_weighted_moments() -> None:
    model, batches = llama(), token_batches()
    one, two, both = (run(model, b, labels="gold") for b in (batches[:1], batches[1:], batches))
    assert_same(one + two, both, 1e-6)
    with pytest.raises(InputError, match="marginals=True and the other has not"):
        one + run(model, batches, marginals=False)


def test_files_keep_them_and_files_of_before_are_read(tmp_path: Any) -> None:
    factors = run(llama(), token_batches())
    factors.save_pretrained(tmp_path / "new")
    assert_same(Factors.from_pretrained(tmp_path / "new"), factors)
    plain = LayerFactors(torch.eye(3), torch.eye(2), 5, 5)
    storage.write_folder(
        tmp_path / "old", kind="curvfast-factors",
        meta={
            "layers": {"up": {"a": "a.up", "g": "g.up", "rows_a": 5, "rows_g": 5}},
            "provenance": {},
        },
        tensors={"a.up": plain.a_sum, "g.up": plain.g_sum},
    )  # fmt: skip
    old = Factors.from_pretrained(tmp_path / "old")
    assert old["up"].a_weighted is None
    with pytest.raises(InputError, match="collect with marginals=True"):
        old.eigh().with_marginals(old)


@pytest.mark.cpu_branches
def test_the_bytes_said_before_are_those_of_all_sums() -> None:
    with curvfast.collect(llama(), marginals=True) as curvature:
        assert curvature.coverage().sum_bytes == 2 * 4 * 9 * (24**2 + 40**2)


class TestBasis:
    def test_it_is_the_old_one_in_the_order_of_marginals(self) -> None:
        model, batches = llama(), token_batches()
        factors = run(model, batches)
        basis = factors.eigh()
        found = basis.with_marginals(factors)
        for name, layer in found.items():
            for old, new, values in (
                (basis[name].vectors_g, layer.vectors_g, layer.values_g),
                (basis[name].vectors_a, layer.vectors_a, layer.values_a),
            ):
                order = (old.T @ new).abs().argmax(0)
                assert sorted(order.tolist()) == list(range(len(order)))
                assert torch.equal(old[:, order], new)
                assert (values.diff() <= 0).all()
                assert values.dtype == torch.float64
            own = marginals_of(name, layer, factors[name])
            total = own.rows.sum()
            estimate = torch.outer(own.rows, own.columns) / total
            product = torch.outer(layer.values_g, layer.values_a)
            torch.testing.assert_close(product, estimate, rtol=1e-5, atol=1e-12 * float(total))
        assert found["model.layers.0.mlp.up_proj"].vectors_a is not (
            found["model.layers.0.mlp.gate_proj"].vectors_a
        )

    def test_of_independent_gradients_and_inputs_it_is_the_old_one(self) -> None:
        a, g = torch.diag(torch.tensor([9.0, 4.0, 1.0])), torch.diag(torch.tensor([5.0, 2.0]))
        layer = LayerFactors(
            a * 10, g * 10, 10, 10, a_weighted=a * 10 * g.trace(), g_weighted=g * 10 * a.trace()
        )
        factors = Factors({"up": layer})
        basis = factors.eigh()
        found = basis.with_marginals(factors)["up"]
        torch.testing.assert_close(found.values_a, basis["up"].values_a)
        torch.testing.assert_close(found.values_g, basis["up"].values_g)
        assert torch.equal(found.vectors_a, basis["up"].vectors_a)

    def test_edits_take_it_as_any_other(self, tmp_path: Any) -> None:
        model, batches = llama(), token_batches()
        factors = run(model, batches)
        found = factors.eigh().with_marginals(factors)
        found.save_pretrained(tmp_path)
        weight = model.model.layers[0].mlp.up_proj.weight
        before = weight.detach().clone()
        with curvfast.edited(model, Eigenbasis.from_pretrained(tmp_path), mass=0.8) as report:
            assert 0.8 <= min(layer.mass for layer in report.layers)
            assert not torch.equal(weight, before)
        with curvfast.edited(model, found, fraction=1.0):
            torch.testing.assert_close(weight.detach(), before, rtol=0, atol=1e-5)

    def test_rounding_below_zero_is_zero(self) -> None:
        a, g = torch.eye(3), torch.diag(torch.tensor([2.0, 1.0]))
        weighted = torch.diag(torch.tensor([2.0, -1e-9]))
        factors = Factors({"up": LayerFactors(a, g, 4, 4, a * 2 / 3, weighted)})
        found = factors.eigh().with_marginals(factors)
        assert found["up"].values_g[1] == 0
        assert found.keep(mass=1.0)["up"].pairs == 3

    def test_no_curvature_at_all_is_zeros(self) -> None:
        zero = LayerFactors(
            torch.eye(3), torch.zeros(2, 2), 4, 4, torch.zeros(3, 3), torch.zeros(2, 2)
        )
        found = Factors({"up": zero}).eigh().with_marginals(Factors({"up": zero}))["up"]
        assert not found.values_a.any()
        assert not found.values_g.any()

    def test_leading_eigenvectors_do_not_suffice(self) -> None:
        factors = run(llama(), token_batches())
        whole = factors.eigh()
        some = Eigenbasis(
            {
                n: LayerBasis(b.values_a, b.vectors_a[:, :5], b.values_g, b.vectors_g)
                for n, b in whole.items()
            }
        )
        with pytest.raises(InputError, match="without mass="):
            some.with_marginals(factors)

    def test_factors_of_another_model_are_refused(self) -> None:
        factors = run(llama(), token_batches())
        other = run(llama(intermediate_size=32), token_batches())
        with pytest.raises(BasisMismatch, match="another model"):
            other.eigh().with_marginals(factors)


def test_a_diagonal_is_that_of_the_rotated_matrix() -> None:
    matrix, vectors = torch.randn(6, 6), torch.randn(6, 4)
    expected = (vectors.T.double() @ matrix.double() @ vectors.double()).diagonal()
    torch.testing.assert_close(diagonal(matrix, vectors), expected)


def test_the_marginals_select_nearly_what_the_correction_selects() -> None:
    """Of the Λ-mass that the best pairs of a trained model hold, as many by marginals hold .95."""
    model = trained()
    tokens = torch.randint(1, 24, (64, 16), generator=torch.Generator().manual_seed(5))
    batches = [sequences(part) for part in tokens.split(16)]
    factors = run(model, batches)
    basis = factors.eigh().with_marginals(factors)
    corrections = curvfast.correct(model, basis, batches, progress=False)
    for mass in (0.8, 0.9):
        kept = basis.keep(mass=mass)
        for name in basis:
            exact = corrections[name].double()
            best = exact.flatten().sort(descending=True).values[: kept[name].pairs].sum()
            assert exact[kept[name].dense()].sum() >= 0.95 * best


def sequences(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Repeat the first half: something to learn."""
    return {"input_ids": torch.cat([tokens[:, :8], tokens[:, :8]], 1)}


def trained() -> nn.Module:
    torch.manual_seed(0)
    model = llama(num_hidden_layers=2, vocab_size=24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        batch = sequences(torch.randint(1, 24, (16, 16)))
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
