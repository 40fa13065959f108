"""Λ against per-sample gradients in float64, on real architectures and through training idioms."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import CASES, VOCABULARY, Case, keep_tokens, llama, token_batches, token_loss
from families import dense, mixture
from oracle import brute_force
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import curvfast
from curvfast import Corrections, Eigenbasis, LayerBasis, LayerCorrection, ops
from curvfast.errors import (
    BasisMismatch,
    CoverageError,
    InputError,
    LayerNotFound,
    ShapeError,
    StorageError,
)
from curvfast.model.batch import Batch
from curvfast.model.layers import select
from curvfast.model.rows import ChosenRows, FirstRows

pytestmark = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")

READINGS = ("position", "sequence")
FAMILIES = [
    Case("gqa", lambda: dense("Qwen3"), token_batches, "attention", keep_tokens, token_loss),
    Case("mixture", lambda: mixture("Mixtral"), token_batches, "mlp", keep_tokens, token_loss),
    Case(
        "interleaved-mixture", lambda: mixture("GptOss", "eager"), token_batches, "*.experts.*",
        keep_tokens, token_loss,
    ),
]  # fmt: skip


def rotations(model: nn.Module, layers: Any, ranks: tuple[int, int] | None = None) -> Eigenbasis:
    """Return random orthonormal vectors, those of inputs shared by all layers of one width."""
    shared: dict[int, Tensor] = {}

    def vectors(d: int) -> Tensor:
        return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0].float()

    found = {}
    for name, layer in select(model, layers).items():
        right, left = shared.setdefault(layer.d_in, vectors(layer.d_in)), vectors(layer.d_out)
        if ranks:
            left, right = left[:, : ranks[0]], right[:, : ranks[1]]
        values = [torch.arange(d, 0, -1).double() for d in (layer.d_in, layer.d_out)]
        found[name] = LayerBasis(values[0], right, values[1], left)
    return Eigenbasis(found)


def by_position(case: Case, model: nn.Module, batches: Any, basis: Eigenbasis) -> dict[str, Any]:
    """Return Σ over rows of the squared, rotated outer product, and the number of rows."""
    records = brute_force(
        copy.deepcopy(model).double(), list(basis), [_double(b) for b in batches], case.keep,
        case.loss,
    )  # fmt: skip
    found = {}
    for name, record in records.items():
        total = torch.zeros(basis[name].ranks, dtype=torch.float64)
        for a, g in zip(torch.cat(record.a).double(), torch.cat(record.g).double(), strict=True):
            total += rotated(torch.outer(g, a), basis[name]).square()
        found[name] = LayerCorrection(total, record.rows)
    return found


def by_sequence(case: Case, model: nn.Module, batches: Any, basis: Eigenbasis) -> dict[str, Any]:
    """Return Σ over sequences of the squared, rotated gradient of the weight itself."""
    model = copy.deepcopy(model).double()
    if any(".experts." in name for name in basis):
        # Grouped products take no float64.
        model.set_experts_implementation("eager")
    layers = select(model, list(basis))
    found = {
        name: LayerCorrection(torch.zeros(basis[name].ranks, dtype=torch.float64), 0)
        for name in layers
    }
    for batch in map(_scored, map(_double, batches)):
        for row in range(len(batch["labels"])):
            one = {key: value[row : row + 1] for key, value in batch.items()}
            model.zero_grad()
            case.loss(model(**one), one).backward()
            for name, layer in layers.items():
                gradient = layer.parameter.grad
                gradient = gradient[layer.expert] if hasattr(layer, "expert") else gradient
                if not gradient.any():
                    continue
                gradient = gradient.T if layer.transposed else gradient.reshape(layer.d_out, -1)
                found[name].sum.add_(rotated(gradient, basis[name]).square())
                found[name] = LayerCorrection(found[name].sum, found[name].count + 1)
    return {name: each for name, each in found.items() if each.count}


def _scored(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the label that padding before the first token predicts."""
    if "attention_mask" not in batch:
        return batch
    labels, mask = batch["labels"].clone(), batch["attention_mask"].bool()
    labels[:, 1:].masked_fill_(~mask[:, :-1], -100)
    return {**batch, "labels": labels}


def rotated(gradient: Tensor, basis: LayerBasis) -> Tensor:
    return basis.vectors_g.double().T @ gradient @ basis.vectors_a.double()


def _double(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def truth(per: str, *given: Any) -> dict[str, LayerCorrection]:
    return by_position(*given) if per == "position" else by_sequence(*given)


def assert_equal(found: Corrections, expected: dict[str, LayerCorrection]) -> None:
    assert set(found) == set(expected)
    for name, exact in expected.items():
        assert found.layers[name].count == exact.count
        assert found[name].dtype == torch.float32
        scale = float(exact.mean.mean())
        torch.testing.assert_close(found[name].double(), exact.mean, rtol=1e-3, atol=1e-5 * scale)
        assert (found[name] - exact.mean).norm() <= 2e-5 * exact.mean.norm()
        assert (found[name] >= 0).all()


def same(one: Corrections, two: Corrections, tolerance: float = 1e-6) -> None:
    assert list(one) == list(two)
    for name in one:
        assert one.layers[name].count == two.layers[name].count
        assert (one[name] - two[name]).norm() <= tolerance * two[name].norm()


@pytest.mark.parametrize("per", READINGS)
@pytest.mark.parametrize("case", [*CASES, *FAMILIES], ids=str)
def test_correct_equals_per_sample_gradients(case: Case, per: str) -> None:
    model, batches = case.model().eval(), case.batches()
    basis = rotations(model, case.layers)
    found = curvfast.correct(model, basis, batches, labels="gold", per=per, progress=False)
    assert_equal(found, truth(per, case, model, batches, basis))


@pytest.mark.parametrize("per", READINGS)
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_loop_that_accumulates_and_checkpoints_gives_the_same(
    reentrant: bool | None, per: str
) -> None:
    """Two forwards before one backward: each recomputation uses the mask of its own batch."""
    case, model = CASES[0], llama().train()
    batches = token_batches("right", (9, 9)) + token_batches("left", (9,))
    basis = rotations(model, case.layers)
    expected = truth(per, case, model, batches, basis)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    with curvfast.collect_corrections(model, basis, per=per, loss_scale=1 / 3) as correction:
        sum(model(**batch).loss / 3 for batch in batches).backward()
    assert_equal(correction.corrections(), expected)


@pytest.mark.parametrize("keep_mode", [False, True])
def test_a_driven_pass_may_checkpoint(keep_mode: bool) -> None:
    case, model, batches = CASES[0], llama().train(), token_batches()
    basis = rotations(model, case.layers)
    expected = truth("sequence", case, model, batches, basis)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = curvfast.correct(
        model, basis, batches, labels="gold", per="sequence", keep_mode=keep_mode, progress=False
    )
    assert_equal(found, expected)


@pytest.mark.parametrize("per", READINGS)
def test_batch_size_order_and_padding_do_not_matter(per: str) -> None:
    model = llama()
    tokens = torch.randint(1, VOCABULARY, (6, 10))
    basis = rotations(model, "mlp")

    def measured(batches: Sequence[Any]) -> Corrections:
        return curvfast.correct(model, basis, batches, labels="gold", per=per, progress=False)

    whole = measured([{"input_ids": tokens}])
    assert {layer.count for layer in whole.layers.values()} == {54 if per == "position" else 6}
    padded = {
        "input_ids": nn.functional.pad(tokens, (0, 4), value=3),
        "attention_mask": nn.functional.pad(torch.ones_like(tokens), (0, 4)),
    }
    for batches in (
        [{"input_ids": part} for part in tokens.split(1)],
        [{"input_ids": tokens.flip(0)}],
        [padded],
        [tokens[:4], tokens[4:]],
    ):
        same(measured(batches), whole, 1e-5)


def test_bf16_models_are_measured_in_float32() -> None:
    model, batches = llama().bfloat16(), token_batches()
    basis = rotations(model, "mlp")
    found = curvfast.correct(model, basis, batches, labels="gold", progress=False)
    exact = curvfast.correct(model.float(), basis, batches, labels="gold", progress=False)
    for name in exact:
        assert found[name].dtype == torch.float32
        assert (found[name] - exact[name]).norm() <= 0.05 * exact[name].norm()


def test_independent_gradients_and_inputs_give_products_of_eigenvalues() -> None:
    """A head of zeros predicts every class alike, whatever comes in."""
    model = nn.Sequential(nn.Linear(5, 4, bias=False))
    nn.init.zeros_(model[0].weight)
    x = torch.randn(60_000, 5) * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.25])
    factors = curvfast.collect_from(model, [x], "*", seed=1, progress=False)
    basis = factors.eigh()
    found = curvfast.correct(model, basis, [x], seed=1, progress=False)["0"].double()
    product = torch.outer(basis["0"].values_g, basis["0"].values_a)
    # The last direction of G is that of all logits alike: nothing flows along it.
    torch.testing.assert_close(found[:3], product[:3], rtol=0.03, atol=0)
    assert found[3].max() <= 1e-10


def test_a_row_alone_is_its_own_sequence() -> None:
    model = nn.Sequential(nn.Linear(5, 4))
    batches = [torch.randn(30, 5), torch.randn(7, 5)]
    basis = rotations(model, "*")
    one, two = (
        curvfast.correct(model, basis, batches, per=per, progress=False) for per in READINGS
    )
    same(one, Corrections(two.layers, one.per), 1e-6)
    assert one.layers["0"].count == 37


def test_sampled_labels_have_their_own_seed() -> None:
    model, batches = llama(), token_batches()
    basis = rotations(model, "*.0.mlp.up_proj")
    one, again, other = (
        next(iter(curvfast.correct(model, basis, batches, seed=seed, progress=False).values()))
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert not torch.allclose(one, other, rtol=1e-3)


def test_training_with_and_without_is_bit_identical() -> None:
    model, batches = llama(attention_dropout=0.1).train(), token_batches()
    basis = rotations(model, "all")

    def trained(net: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        torch.manual_seed(7)
        for batch in batches:
            net(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return net.state_dict(), torch.get_rng_state()

    twin = copy.deepcopy(model)
    with curvfast.collect_corrections(model, basis, per="sequence"):
        weights, state = trained(model)
    expected, expected_state = trained(twin)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert torch.equal(state, expected_state)


def test_correct_leaves_the_model_as_it_was() -> None:
    model = llama(attention_dropout=0.1).train()
    model.lm_head.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    batches, state = token_batches(), torch.get_rng_state()
    basis = rotations(model, "mlp")
    state = torch.get_rng_state()
    curvfast.correct(model, basis, batches, progress=False)
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_overflowed_steps_of_amp_are_left_out() -> None:
    model, batches = llama(), token_batches()
    basis = rotations(model, "mlp")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with curvfast.collect_corrections(model, basis, grad_scaler=scaler) as correction:
        for i, batch in enumerate(batches):
            (scaler.scale(model(**batch).loss) * (float("inf") if i == 1 else 1.0)).backward()
    used = [batches[0], batches[2]]
    plain = curvfast.correct(model, basis, used, labels="gold", progress=False)
    same(correction.corrections(), plain, 1e-5)


class Watched(TorchDispatchMode):
    """Notes what float32 products are allowed to be while one runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            self.seen |= {matmul.fp32_precision for matmul in matmuls()}
        return func(*args, **(kwargs or {}))


def matmuls() -> tuple[Any, Any]:
    return torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


@pytest.mark.parametrize("allowed", ["highest", "high", "medium"])
def test_products_are_float32_whatever_training_allows_itself(allowed: str) -> None:
    before = torch.get_float32_matmul_precision()
    x = torch.randn(6, 4)
    try:
        torch.set_float32_matmul_precision(allowed)
        settings = [matmul.fp32_precision for matmul in matmuls()]
        for run in (
            lambda: ops.project_rows(x, torch.eye(4)),
            lambda: ops.add_by_position_(torch.zeros(4, 4), x, x),
            lambda: ops.add_by_sequence_(torch.zeros(4, 4), x, x, [4, 2]),
        ):
            with Watched() as watched:
                run()
            assert watched.seen == {"ieee"}
        assert [matmul.fp32_precision for matmul in matmuls()] == settings
        assert torch.get_float32_matmul_precision() == allowed
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_setting_made_for_all_of_torch_goes_on_being_followed() -> None:
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("this torch has no such setting")
    whole, own = torch.backends.fp32_precision, [each.fp32_precision for each in matmuls()]
    try:
        for each in matmuls():
            each.fp32_precision = "none"
        for setting in ("tf32", "ieee", "none"):
            torch.backends.fp32_precision = setting
            assert [each.fp32_precision for each in matmuls()] == [setting] * 2
            ops.project_rows(torch.randn(6, 4), torch.eye(4))
    finally:
        torch.backends.fp32_precision = whole
        for each, setting in zip(matmuls(), own, strict=True):
            each.fp32_precision = setting


def test_blocks_of_rows_and_columns_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = torch.randint(-3, 4, (50, 6)).double(), torch.randint(-3, 4, (50, 5)).double()
    lengths = [7, 1, 30, 12]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    exact = sum((p[a:b].T @ q[a:b]).square() for a, b in zip(starts, ends, strict=True))
    monkeypatch.setattr(ops.corrections, "_BLOCK_VALUES", 11)
    monkeypatch.setattr(ops.corrections, "chunk_rows", lambda d: 8)
    out = torch.ones(6, 5, dtype=torch.float64)
    ops.add_by_sequence_(out, p, q, lengths)
    assert torch.equal(out, exact + 1)
    out = torch.ones(6, 5, dtype=torch.float64)
    ops.add_by_position_(out, p, q)
    assert torch.equal(out, (p.square().T @ q.square()) + 1)
    assert torch.equal(ops.project_rows(p.float(), q[:6]), p @ q[:6])


@pytest.mark.parametrize("per", READINGS)
@pytest.mark.parametrize("size", [1, 4])
def test_passes_over_some_layers_are_one_over_all(size: int, per: str) -> None:
    model, batches = llama(), token_batches()
    basis = rotations(model, "mlp")
    whole = curvfast.correct(model, basis, batches, per=per, progress=False)
    parts = curvfast.correct(model, basis, batches, per=per, layers_per_pass=size, progress=False)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert len(parts.provenance["passes"]) == -(-9 // size)
    assert whole.provenance["labels"] == "sampled"
    assert whole.provenance["tokens"] == 108
    assert whole.provenance["per"] == per


@pytest.mark.parametrize("options", [{}, {"per": "sequence", "spill_every": 2}])
def test_a_run_cut_anywhere_goes_on_to_the_same_bits(tmp_path: Any, options: Any) -> None:
    model, batches = llama(), token_batches(sizes=(9, 10, 11, 12))
    basis = rotations(model, "mlp")
    options = {**options, "progress": False}
    expected = curvfast.correct(model, basis, batches, **options)

    def failing() -> Any:
        yield from batches[:2]
        raise KeyError("the data ends here")

    with pytest.raises(KeyError):
        curvfast.correct(model, basis, failing(), checkpoint=tmp_path, every=1, **options)
    found = curvfast.correct(model, basis, batches, checkpoint=tmp_path, every=1, **options)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert found.layers["model.layers.0.mlp.up_proj"].count == (
        expected.layers["model.layers.0.mlp.up_proj"].count
    )
    other = rotations(model, "mlp")
    other = Eigenbasis(
        {
            n: LayerBasis(b.values_a * 2, b.vectors_a, b.values_g, b.vectors_g)
            for n, b in other.items()
        }
    )
    with pytest.raises(StorageError, match="basis"):
        curvfast.correct(model, other, batches, checkpoint=tmp_path, every=1, **options)


def test_spilling_into_float64_changes_only_rounding() -> None:
    model, batches = llama(), token_batches()
    basis = rotations(model, "mlp")
    found = [
        curvfast.correct(model, basis, batches, spill_every=every, progress=False)
        for every in (None, 1, 2)
    ]
    same(found[1], found[0])
    same(found[2], found[0])


def test_what_is_spilled_no_longer_swallows_small_squares() -> None:
    from curvfast.collection.correction_sums import _Running

    running = _Running(torch.full((1, 1), 2.0**24))
    running.spill()
    for _ in range(4):
        ops.add_by_position_(running.sum, torch.ones(1, 1), torch.ones(1, 1))
    assert running.total().item() == 2**24 + 4


def test_a_snapshot_does_not_move_while_collecting_goes_on() -> None:
    model, batches = llama(), token_batches()
    with curvfast.collect_corrections(model, rotations(model, "mlp")) as correction:
        model(**batches[0]).loss.backward()
        early = correction.corrections()
        before = {name: early[name].clone() for name in early}
        model(**batches[1]).loss.backward()
        assert correction.coverage().sum_bytes == 4 * 9 * 24 * 40
    assert all(torch.equal(early[name], before[name]) for name in early)
    late = correction.corrections()
    assert late is correction.corrections()
    assert all(late.layers[n].count > early.layers[n].count for n in early)


def test_copied_sums_are_the_sums_and_go_their_own_way() -> None:
    model, batches = llama(), token_batches()
    with curvfast.collect_corrections(model, rotations(model, "mlp"), spill_every=2) as correction:
        for batch in batches:
            model(**batch).loss.backward()
        copy = correction._sums.copy()
        before = {name: each.sum.clone() for name, each in copy.corrections().items()}
        assert all(
            torch.equal(before[name], each.sum)
            for name, each in correction._sums.corrections().items()
        )
        model(**batches[0]).loss.backward()
        assert all(torch.equal(copy.corrections()[name].sum, before[name]) for name in before)


def test_a_part_of_the_rows_is_counted_for_both_sides() -> None:
    model, batches = llama(), token_batches("none")
    basis = rotations(model, "mlp")
    whole = curvfast.correct(model, basis, batches, labels="gold", progress=False)
    found = curvfast.correct(
        model, basis, batches, labels="gold", rows_per_step=0.5, progress=False
    )
    with curvfast.collect(
        model, loss_reduction="mean", rows_per_step=0.5, marginals=True
    ) as curvature:
        for batch in batches:
            model(**batch).loss.backward()
    factors = curvature.factors()
    for name in found:
        assert found.layers[name].count == factors[name].rows_g == whole.layers[name].count / 2
        total = float(found.layers[name].sum.double().sum())
        assert total == pytest.approx(float(factors[name].g_weighted.trace()), rel=1e-5)
        assert total == pytest.approx(float(factors[name].a_weighted.trace()), rel=1e-5)


def test_merging_adds_sums_and_counts() -> None:
    model, batches = llama(), token_batches()
    basis = rotations(model, "mlp")
    one, two, both = (
        curvfast.correct(model, basis, part, labels="gold", progress=False)
        for part in (batches[:1], batches[1:], batches)
    )
    same(one + two, both)
    with pytest.raises(InputError, match="per position, the other per sequence"):
        one + Corrections(two.layers, "sequence")
    with pytest.raises(InputError, match="same layers"):
        one + Corrections(dict(list(two.layers.items())[:3]), "position")
    small = {name: LayerCorrection(torch.ones(2, 3), 1) for name in one}
    with pytest.raises(ShapeError, match="different bases"):
        one + Corrections(small, "position")


def test_files_hold_sums_counts_and_what_was_measured(tmp_path: Any) -> None:
    model, batches = llama(), token_batches()
    basis = rotations(model, "mlp")
    found = curvfast.correct(model, basis, batches, per="sequence", progress=False)
    found.save_pretrained(tmp_path)
    again = Corrections.from_pretrained(tmp_path)
    assert list(again) == list(found)
    assert again.per == "sequence"
    assert again.provenance["coverage"] == found.provenance["coverage"]
    for name in found:
        assert torch.equal(again[name], found[name])
        assert again.layers[name].count == found.layers[name].count
    with pytest.raises(LayerNotFound, match="no correction of layer 'head'"):
        again["head"]


def test_leading_eigenvectors_give_the_leading_block(tmp_path: Any) -> None:
    model, batches = llama(), token_batches()
    whole = rotations(model, "mlp")
    some = Eigenbasis(
        {
            n: LayerBasis(b.values_a, b.vectors_a[:, :5], b.values_g, b.vectors_g[:, :3])
            for n, b in whole.items()
        }
    )
    some.save_pretrained(tmp_path)
    options: dict[str, Any] = {"labels": "gold", "progress": False}
    expected = curvfast.correct(model, whole, batches, **options)
    for basis in (some, Eigenbasis.from_pretrained(tmp_path, lazy=True)):
        found = curvfast.correct(model, basis, batches, **options)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name][:3, :5], rtol=1e-4, atol=1e-9)


def test_layers_that_share_an_input_project_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []
    project = ops.project_rows

    def counting(x: Tensor, vectors: Tensor) -> Tensor:
        widths.append(vectors.shape[0])
        return project(x, vectors)

    monkeypatch.setattr(ops, "project_rows", counting)
    model = llama(num_hidden_layers=1)
    curvfast.correct(model, rotations(model, "mlp"), token_batches()[:1], progress=False)
    # Inputs of gate and up together, and of down; three gradients.
    assert sorted(widths) == [24, 24, 40, 40, 40]
    with curvfast.collect_corrections(model, rotations(model, "mlp")) as correction:
        model(**token_batches()[0]).loss.backward()
        assert correction._sums._last is None, "what no layer has yet to read is held"


@pytest.mark.cpu_branches
def test_rows_are_the_same_whether_an_index_or_a_view_says_so() -> None:
    shape, x = torch.Size([3, 7]), torch.randn(3, 7, 4)
    calls = [Batch(skip_last=True).call_rows("layer", x, None) for _ in range(2)]
    view, index = (
        call.rows("layer", shape, torch.device(place))
        for call, place in zip(calls, ("meta", "cpu"), strict=True)
    )
    assert isinstance(view, FirstRows)
    assert isinstance(index, ChosenRows)
    assert torch.equal(view.take(x), index.take(x))
    cpu = torch.device("cpu")
    assert torch.equal(view.indices(cpu), index.indices(cpu))
    owners = calls[0].sequences(shape, view, cpu)
    assert owners.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert torch.equal(owners, calls[1].sequences(shape, index, cpu))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(torch.tanh(self.mlp(x)))


class TestErrors:
    def test_a_layer_called_twice_has_no_gradient_of_one_call(self) -> None:
        model, x = Twice(), torch.randn(4, 3, 6)
        basis = rotations(model, "mlp")
        found = curvfast.correct(model, basis, [x], progress=False)
        assert found.layers["mlp"].count == 24
        with pytest.raises(CoverageError, match=r"'mlp' was called twice .* per='position'"):
            curvfast.correct(model, basis, [x], per="sequence", progress=False)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"per": "token"}, "pass 'position'"),
            ({"per": "sequence", "rows_per_step": 0.5}, "leaves out positions"),
            ({"labels": "true"}, "pass 'sampled'"),
            ({"tokens": 0}, "positive number"),
            ({"layers_per_pass": 0}, "number of layers"),
        ],
    )
    def test_bad_arguments(self, options: dict[str, Any], message: str) -> None:
        model = llama()
        with pytest.raises(InputError, match=message):
            curvfast.correct(
                model, rotations(model, "mlp"), token_batches(), progress=False, **options
            )

    def test_a_basis_of_another_model_is_refused(self) -> None:
        model = llama()
        with pytest.raises(BasisMismatch, match="measured on another model"):
            curvfast.correct(
                model, rotations(llama(intermediate_size=32), "mlp"), token_batches(),
                progress=False,
            )  # fmt: skip
        with pytest.raises(LayerNotFound, match="matches none"):
            curvfast.correct(model, rotations(model, "mlp"), token_batches(), "*.q_proj")

    def test_a_layer_without_gradient_is_an_error_by_name(self) -> None:
        model, batch = llama(), token_batches()[0]
        with curvfast.collect_corrections(model, rotations(model, "mlp")) as correction:
            model(**batch)
        with pytest.raises(CoverageError, match=r"gate_proj': no gradient reached it"):
            correction.corrections()

    def test_empty_data_is_an_error(self) -> None:
        model = llama()
        with pytest.raises(InputError, match="empty"):
            curvfast.correct(model, rotations(model, "mlp"), [], progress=False)
