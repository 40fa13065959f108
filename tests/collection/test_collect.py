"""Collecting changes nothing, hides nothing, and does not depend on how data is cut."""

from __future__ import annotations

import copy
import logging
import warnings

import pytest
import torch
from cases import VOCABULARY, gpt2, llama, token_batches, vit
from torch import nn

import curvfast
from curvfast.collection import placement
from curvfast.collection.accumulator import Accumulator
from curvfast.collection.hooks import SharedInput
from curvfast.collection.moment import Moment
from curvfast.errors import (
    CoverageError,
    EvidenceError,
    InputError,
    LayerNotFound,
    NumericalWarning,
    ShapeError,
)
from curvfast.model.batch import Batch
from curvfast.model.families import LinearLayer
from curvfast.model.rows import AllRows, ChosenRows, FirstRows
from curvfast.ops import MomentRequest, TriangularSum, devices

quiet = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")


def train(model, batches, collecting: bool):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(7)
    context = curvfast.collect(model, "all") if collecting else None
    if context:
        context.__enter__()
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if context:
        context.__exit__(None, None, None)
    return model.state_dict(), torch.get_rng_state()


@quiet
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_training_with_and_without_collect_is_bit_identical(reentrant: bool | None) -> None:
    model, batches = llama(attention_dropout=0.1).train(), token_batches()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    twin = copy.deepcopy(model)
    weights, state = train(model, batches, collecting=True)
    expected, expected_state = train(twin, batches, collecting=False)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert torch.equal(state, expected_state)


@quiet
def test_nothing_stays_on_the_model_even_after_an_exception() -> None:
    model, batch = llama(), token_batches()[0]

    def traces():
        return {
            name: (
                sorted(vars(m)),
                len(m._forward_hooks),
                len(m._forward_pre_hooks),
                len(m._backward_hooks),
                m.training,
                type(m),
            )
            for name, m in model.named_modules()
        }

    before = traces()

    def interrupted():
        with curvfast.collect(model) as curvature:
            model(**batch).loss.backward()
            found.append(curvature)
            raise ZeroDivisionError

    found: list[curvfast.Curvature] = []
    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert traces() == before
    assert len(found[0].factors()) == 9


@quiet
def test_collect_from_restores_modes_gradients_and_the_random_state() -> None:
    model = llama(attention_dropout=0.1).train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    batches = token_batches()
    state = torch.get_rng_state()
    curvfast.collect_from(model, batches, progress=False)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


@quiet
def test_batch_size_order_and_padding_do_not_matter() -> None:
    model = llama()
    tokens = torch.randint(1, VOCABULARY, (6, 10))

    def factors(batches):
        return curvfast.collect_from(model, batches, labels="gold", progress=False)

    whole = factors([{"input_ids": tokens}])
    padded = {
        "input_ids": nn.functional.pad(tokens, (0, 4), value=3),
        "attention_mask": nn.functional.pad(torch.ones_like(tokens), (0, 4)),
    }
    others = (
        [{"input_ids": part} for part in tokens.split(1)],
        [{"input_ids": tokens.flip(0)}],
        [padded],
        [tokens[:4], tokens[4:]],
    )
    for batches in others:
        other = factors(batches)
        for name in whole:
            assert other[name].rows_a == other[name].rows_g == whole[name].rows_a == 54
            for mine, one in zip(
                (other[name].a_sum, other[name].g_sum), (whole[name].a_sum, whole[name].g_sum),
                strict=True,
            ):  # fmt: skip
                assert (mine - one).norm() <= 1e-5 * one.norm()


@quiet
def test_shards_add_up() -> None:
    model, batches = llama(), token_batches()
    whole = curvfast.collect_from(model, batches, labels="gold", progress=False)
    parts = [curvfast.collect_from(model, [b], labels="gold", progress=False) for b in batches]
    merged = parts[0] + parts[1] + parts[2]
    for name in whole:
        assert merged[name].rows_g == whole[name].rows_g
        torch.testing.assert_close(merged[name].G, whole[name].G, rtol=1e-5, atol=1e-6)
    gate, up = (merged[f"model.layers.0.mlp.{n}_proj"] for n in ("gate", "up"))
    assert gate.a_sum is up.a_sum


@quiet
def test_layers_fed_by_one_tensor_share_one_a() -> None:
    model = llama()
    factors = curvfast.collect_from(model, token_batches(), "all", progress=False)
    prefix = "model.layers.1."
    q, k, v, o = (factors[f"{prefix}self_attn.{n}_proj"].a_sum for n in "qkvo")
    gate, up, down = (factors[f"{prefix}mlp.{n}_proj"].a_sum for n in ("gate", "up", "down"))
    assert q is k is v
    assert gate is up
    assert len({id(q), id(o), id(gate), id(down)}) == 4
    with curvfast.collect(model, share_inputs=False) as curvature:
        for batch in token_batches():
            model(**batch).loss.backward()
    mine = curvature.factors()
    assert mine[f"{prefix}mlp.gate_proj"].a_sum is not mine[f"{prefix}mlp.up_proj"].a_sum


class Switch(nn.Module):
    """Two layers that read one tensor, or two, or of which one rests: routing as experts do it."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp_one, self.mlp_two = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor, mode: str) -> torch.Tensor:
        if mode == "one":
            return self.mlp_one(x)
        return self.mlp_one(x) + self.mlp_two(x if mode == "shared" else 2 * x)


@quiet
@pytest.mark.parametrize("checkpointed", [False, True])
def test_layers_that_stop_sharing_part_exactly(checkpointed: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    model = Switch()
    modes = ["shared", "apart", "one", "shared", "one"]
    inputs = [torch.randn(7, 5) for _ in modes]
    with curvfast.collect(model, loss_reduction="sum") as curvature:
        for mode, x in zip(modes, inputs, strict=True):
            y = checkpoint(model, x, mode, use_reentrant=False) if checkpointed else model(x, mode)
            y.square().sum().backward()
    factors = curvature.factors()
    one = torch.cat(inputs)
    two = torch.cat([inputs[0], 2 * inputs[1], inputs[3]])
    torch.testing.assert_close(factors["mlp_one"].a_sum, one.T @ one, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(factors["mlp_two"].a_sum, two.T @ two, rtol=1e-5, atol=1e-5)
    assert (factors["mlp_one"].rows_a, factors["mlp_two"].rows_a) == (35, 21)
    assert (factors["mlp_one"].rows_g, factors["mlp_two"].rows_g) == (35, 21)


@quiet
def test_a_forward_without_backward_counts_nothing() -> None:
    model, batches = llama(), token_batches()
    with curvfast.collect(model) as curvature:
        for batch in batches:
            model(**batch)
            with torch.no_grad():
                model(**batch)
            model(**batch).loss.backward()
    plain = curvfast.collect_from(model, batches, labels="gold", progress=False)
    for name, factors in curvature.factors().items():
        assert factors.rows_a == factors.rows_g == plain[name].rows_a


@quiet
def test_a_snapshot_does_not_move_while_collecting_goes_on() -> None:
    model, batches = llama(), token_batches()
    with curvfast.collect(model) as curvature:
        model(**batches[0]).loss.backward()
        early = curvature.factors()
        before = {name: f.a_sum.clone() for name, f in early.items()}
        model(**batches[1]).loss.backward()
    assert all(torch.equal(early[name].a_sum, before[name]) for name in early)
    assert curvature.factors().rows > early.rows


@quiet
def test_sampled_labels_have_their_own_seed() -> None:
    model, batches = llama(), token_batches()

    def g(seed: int):
        factors = curvfast.collect_from(model, batches, seed=seed, progress=False)
        return factors["model.layers.0.mlp.up_proj"].g_sum

    assert torch.equal(g(0), g(0))
    assert not torch.equal(g(0), g(1))


@quiet
def test_sampled_labels_give_the_exact_fisher_in_expectation() -> None:
    """Over many draws, Σ g gᵀ of a linear softmax model tends to Σ diag(p) - p pᵀ."""
    model = nn.Sequential(nn.Linear(4, 3))
    x = torch.randn(5, 4)
    draws = 4000
    factors = curvfast.collect_from(
        model, [x.repeat(draws, 1)], lambda name, module: True, seed=3, progress=False
    )
    p = model(x).softmax(-1)
    exact = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)
    torch.testing.assert_close(
        factors["0"].G, exact.detach(), rtol=0, atol=4 * 0.5 / (5 * draws) ** 0.5
    )


@quiet
def test_token_limit_stops_and_is_recorded() -> None:
    factors = curvfast.collect_from(llama(), token_batches("none"), tokens=45, progress=False)
    assert factors.rows == 40 + 44
    assert factors.provenance["tokens"] == 84
    assert factors.provenance["labels"] == "sampled"
    assert factors.provenance["collect"]["skip_last"] is True


@quiet
@pytest.mark.parametrize("skip", [False, True])
def test_amp_scale_is_divided_out_and_overflow_left_out(skip: bool) -> None:
    model, batches = llama(), token_batches()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with curvfast.collect(model, grad_scaler=scaler) as curvature:
        for i, batch in enumerate(batches):
            factor = float("inf") if skip and i == 1 else 1.0
            (scaler.scale(model(**batch).loss) * factor).backward()
    used = [b for i, b in enumerate(batches) if not (skip and i == 1)]
    plain = curvfast.collect_from(model, used, labels="gold", progress=False)
    for name, factors in curvature.factors().items():
        assert factors.rows_a == factors.rows_g == plain[name].rows_g
        assert (factors.g_sum - plain[name].g_sum).norm() <= 1e-5 * plain[name].g_sum.norm()
        assert (factors.a_sum - plain[name].a_sum).norm() <= 1e-5 * plain[name].a_sum.norm()


@quiet
def test_bf16_models_keep_float32_sums() -> None:
    model, batches = llama().bfloat16(), token_batches()
    factors = curvfast.collect_from(model, batches, labels="gold", progress=False)
    for layer in factors.values():
        assert layer.a_sum.dtype == layer.g_sum.dtype == torch.float32
        assert torch.equal(layer.a_sum, layer.a_sum.T)
    exact = curvfast.collect_from(model.float(), batches, labels="gold", progress=False)
    name = "model.layers.0.mlp.up_proj"
    assert (factors[name].A - exact[name].A).norm() <= 0.02 * exact[name].A.norm()


@quiet
@pytest.mark.cpu_branches
def test_the_sums_bytes_are_said_before_they_are_allocated(caplog) -> None:
    with caplog.at_level(logging.INFO, "curvfast"), curvfast.collect(llama()) as curvature:
        assert "MB" in caplog.text
        assert curvature.coverage().sum_bytes == 4 * 9 * (24**2 + 40**2)


@quiet
@pytest.mark.parametrize("model", [llama, gpt2, vit])
def test_coverage_names_every_parameter_once(model) -> None:
    net = model()
    with curvfast.collect(net) as curvature:
        coverage = curvature.coverage()
    names = {name for name, _ in net.named_parameters()}
    assert set(coverage.covered) | set(coverage.uncovered) == names
    assert not set(coverage.covered) & set(coverage.uncovered)
    assert 0 < coverage.fraction < 1
    assert "covered" in str(coverage)


def test_factors_files_keep_the_coverage(tmp_path) -> None:
    with pytest.warns(NumericalWarning, match="fewer rows than they are wide"):
        factors = curvfast.collect_from(llama(), token_batches()[:1], progress=False)
    factors.save_pretrained(tmp_path)
    again = curvfast.Factors.from_pretrained(tmp_path)
    assert again.provenance["coverage"]["uncovered"]["lm_head.weight"].startswith("output head")


class TestLayerChoice:
    @pytest.mark.parametrize(
        ("spec", "count"),
        [
            ("mlp", 9),
            ("attention", 12),
            ("all", 21),
            ("*.up_proj", 3),
            (["*.up_proj", "*.q_proj"], 6),
        ],
    )
    def test_kinds_and_globs(self, spec, count: int) -> None:
        with curvfast.collect(llama(), spec) as curvature:
            assert len(curvature.coverage().covered) == count

    def test_a_predicate(self) -> None:
        with curvfast.collect(llama(), lambda n, m: m.in_features == 40) as curvature:
            assert len(curvature.coverage().covered) == 3

    @pytest.mark.parametrize(
        ("family", "mlp", "attention"),
        [
            ("Bert", ["encoder.layer.0.intermediate.dense", "encoder.layer.0.output.dense"],
             "encoder.layer.0.attention.output.dense"),
            ("OPT", ["decoder.layers.0.fc1", "decoder.layers.0.fc2"],
             "decoder.layers.0.self_attn.out_proj"),
            ("GPTNeoX", ["layers.0.mlp.dense_h_to_4h", "layers.0.mlp.dense_4h_to_h"],
             "layers.0.attention.dense"),
        ],
    )  # fmt: skip
    def test_model_families(self, family, mlp, attention) -> None:
        import transformers

        config = getattr(transformers, f"{family}Config")(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=40,
            intermediate_size=24, ffn_dim=24, word_embed_proj_dim=16,
        )  # fmt: skip
        model = getattr(transformers, f"{family}Model")(config)
        assert list(curvfast.model.layers.select(model, "mlp")) == mlp
        assert attention in curvfast.model.layers.select(model, "attention")

    def test_no_match_lists_what_there_is(self) -> None:
        with pytest.raises(LayerNotFound, match=r"model\.layers\.0\.mlp\.gate_proj"):
            with curvfast.collect(llama(), "*.experts.*"):
                pass

    def test_tied_weights_are_refused_by_name(self) -> None:
        with pytest.raises(
            LayerNotFound, match=r"'lm_head' shares its weight with 'transformer.wte'"
        ):
            with curvfast.collect(gpt2(), "lm_head"):
                pass

    def test_names_do_not_depend_on_wrappers(self) -> None:
        class Wrapped(nn.Module):
            def __init__(self, module: nn.Module) -> None:
                super().__init__()
                self.module = module

            def forward(self, **kwargs):
                return self.module(**kwargs)

        with curvfast.collect(Wrapped(llama())) as curvature:
            assert "model.layers.0.mlp.gate_proj.weight" in curvature.coverage().covered


class TestErrors:
    @pytest.mark.parametrize("options", [{"loss_reduction": "avg"}, {"loss_scale": 0.0}])
    def test_bad_arguments(self, options) -> None:
        with pytest.raises(InputError, match="pass"), curvfast.collect(llama(), **options):
            pass

    def test_a_layer_without_gradient_is_an_error_by_name(self) -> None:
        model, batch = llama(), token_batches()[0]
        with curvfast.collect(model) as curvature:
            model(**batch)
        with pytest.raises(CoverageError, match=r"gate_proj': no gradient reached it"):
            curvature.factors()

    def test_a_frozen_prefix_is_explained(self) -> None:
        model, batch = llama(), token_batches()[0]
        for parameter in [*model.model.embed_tokens.parameters(), *model.model.layers.parameters()]:
            parameter.requires_grad_(False)
        with curvfast.collect(model) as curvature:
            model(**batch).loss.backward()
        with pytest.raises(CoverageError, match="use collect_from"):
            curvature.factors()

    @pytest.mark.cpu_branches
    def test_a_model_compiled_before_is_an_error_by_name(self) -> None:
        model = llama(num_hidden_layers=1)
        batch = token_batches("none")[0]
        compiled = torch.compile(model, backend="aot_eager")
        compiled(**batch).loss.backward()
        error = pytest.raises(CoverageError, match="compiled before collect")
        with curvfast.collect(compiled), error:
            compiled(**batch)
        torch._dynamo.reset()

    @quiet
    @pytest.mark.cpu_branches
    def test_a_model_compiled_but_not_yet_run_is_measured(self) -> None:
        model = llama(num_hidden_layers=1)
        batch = token_batches("none")[0]
        compiled = torch.compile(model, backend="aot_eager")
        with curvfast.collect(compiled) as curvature:
            compiled(**batch).loss.backward()
        plain = curvfast.collect_from(model, [batch], labels="gold", progress=False)
        for name, factors in curvature.factors().items():
            assert (factors.G - plain[name].G).norm() <= 1e-4 * plain[name].G.norm()
        torch._dynamo.reset()

    def test_a_second_backward_is_refused(self) -> None:
        model, batch = llama(), token_batches()[0]
        with curvfast.collect(model):
            loss = model(**batch).loss
            loss.backward(retain_graph=True)
            with pytest.raises(CoverageError, match="retain_graph"):
                loss.backward()

    def test_a_mask_of_another_shape_is_refused(self) -> None:
        model, batch = llama(), token_batches("none")[0]
        with curvfast.collect(model) as curvature:
            curvature.mask(torch.ones(2, 3))
            with pytest.raises(ShapeError, match="does not describe"):
                model(**batch).loss.backward()

    def test_a_mean_loss_over_unknown_labels_is_refused(self) -> None:
        class Scalar(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.mlp = nn.Linear(3, 3)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.mlp(x).square().mean()

        model = Scalar()
        with curvfast.collect(model) as curvature:
            model(torch.randn(4, 3)).backward()
        with pytest.raises(EvidenceError, match="labels"):
            curvature.factors()

    def test_empty_data_is_an_error(self) -> None:
        with pytest.raises(InputError, match="empty"):
            curvfast.collect_from(llama(), iter(()), progress=False)

    @pytest.mark.parametrize("options", [{"labels": "true"}, {"tokens": 0}])
    def test_bad_driver_arguments(self, options) -> None:
        with pytest.raises(InputError, match="pass"):
            curvfast.collect_from(llama(), token_batches(), progress=False, **options)

    def test_a_model_without_logits_is_refused(self) -> None:
        with pytest.raises(InputError, match="without logits"):
            curvfast.collect_from(llama().model, token_batches(), progress=False)


class TestInPlace:
    """Two layers read one tensor, which is changed between the two."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, scale: float = 3.0) -> torch.Tensor:
            h = x + 0
            y = self.first(h)
            if scale != 1:
                h.mul_(scale)
            return y + self.second(h)

    def test_a_loop_that_would_count_the_changed_tensor_refuses(self) -> None:
        model = self.Model().requires_grad_(False)
        with (
            curvfast.collect(model, "all", loss_reduction="sum"),
            pytest.raises(CoverageError, match=r"'first' is gone .*in-place"),
        ):
            model(torch.randn(30, 4, requires_grad=True)).sum().backward()

    def test_a_driver_that_would_count_the_changed_tensor_refuses(self) -> None:
        with pytest.raises(CoverageError, match=r"'first' was modified in place"):
            curvfast.collect_from(self.Model(), [torch.randn(30, 4)], "all", progress=False)


@pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")
@pytest.mark.parametrize("share", [True, False])
def test_a_shared_input_counts_for_those_whose_gradient_came(share: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.one(x), self.two(x)

    model, inputs = Model(), [torch.randn(8, 3) for _ in range(3)]
    with curvfast.collect(model, "all", loss_reduction="sum", share_inputs=share) as curvature:
        for x, use_both in zip(inputs, (True, False, True), strict=True):
            one, two = model(x)
            (one.sum() + (two.sum() if use_both else 0)).backward()
    factors = curvature.factors()
    for name, seen in (("one", inputs), ("two", [inputs[0], inputs[2]])):
        rows = torch.cat(seen)
        assert factors[name].rows_a == factors[name].rows_g == len(rows)
        torch.testing.assert_close(factors[name].a_sum, rows.T @ rows)


def test_merging_adds_sums_and_rows() -> None:
    model, batches = llama(), token_batches()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)
        one, two, both = (
            curvfast.collect_from(model, part, labels="gold", progress=False)
            for part in (batches[:1], batches[1:], batches)
        )
    merged = one + two
    assert merged.rows == both.rows
    for name, layer in both.items():
        for found, expected in ((merged[name].A, layer.A), (merged[name].G, layer.G)):
            assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert merged["model.layers.0.mlp.gate_proj"].a_sum is (
        merged["model.layers.0.mlp.up_proj"].a_sum
    )


@quiet
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_that_wait_for_company_are_the_same(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    model, batches = llama().to(dtype), token_batches()
    plain = curvfast.collect_from(model, batches, "all", labels="gold", progress=False)
    monkeypatch.setattr(devices, "takes_kernels", lambda device: True)
    monkeypatch.setattr(placement, "MOST_CALLS", 5)
    waiting = curvfast.collect_from(model, batches, "all", labels="gold", progress=False)
    for name, layer in plain.items():
        assert torch.equal(waiting[name].a_sum, layer.a_sum)
        assert torch.equal(waiting[name].g_sum, layer.g_sum)


def test_a_tensor_changed_while_it_waits_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "takes_kernels", lambda device: True)
    queue = placement.LaunchBatch()
    x = torch.ones(3, 4, dtype=torch.bfloat16)
    queue.add(MomentRequest(TriangularSum.zeros(4, 16), x))
    x.zero_()
    with pytest.raises(CoverageError, match="modified in place"):
        queue.flush()


@quiet
def test_spilling_into_float64_changes_only_rounding() -> None:
    model, batches = llama(), token_batches()
    found = {}
    for every in (None, 1, 2):
        with curvfast.collect(model, spill_every=every) as curvature:
            for batch in batches:
                model(**batch).loss.backward()
                curvature.factors()
        found[every] = curvature.factors()
    for name, layer in found[None].items():
        for every in (1, 2):
            assert found[every][name].rows_g == layer.rows_g
            torch.testing.assert_close(found[every][name].a_sum, layer.a_sum, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found[every][name].g_sum, layer.g_sum, rtol=1e-5, atol=1e-8)


def test_what_is_spilled_no_longer_swallows_small_rows() -> None:
    """Added to 2^24, a float32 1 is lost."""
    moments = [Moment(TriangularSum.zeros(1, 1)) for _ in range(2)]
    for moment in moments:
        moment.sum.tiles.fill_(2.0**24)
    moments[0].spill()
    for _ in range(4):
        for moment in moments:
            placement.LaunchBatch().add(moment.request(torch.ones(1, 1), AllRows(1), 1.0))
    assert moments[0].dense().item() == 2**24 + 4
    assert moments[1].dense().item() == 2**24


@pytest.mark.cpu_branches
def test_unpadded_sequences_need_no_index_off_the_cpu() -> None:
    x = torch.randint(-3, 4, (3, 7, 4)).float()
    rows, indexed = (
        Batch(skip_last=True).call_rows("layer", x, None).rows("layer", x.shape[:-1], device)
        for device in (torch.device("meta"), torch.device("cpu"))
    )
    assert isinstance(rows, FirstRows)
    assert isinstance(indexed, ChosenRows)
    moments = []
    for kind in (rows, indexed):
        moments.append(Moment(TriangularSum.zeros(4, 4)))
        placement.LaunchBatch().add(moments[-1].request(x, kind, 1.0))
    assert torch.equal(moments[0].dense(), moments[1].dense())
    assert moments[0].rows == moments[1].rows == 18


def test_sums_part_only_when_nothing_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "takes_kernels", lambda device: True)
    layers = {name: LinearLayer(name, nn.Linear(4, 4), 4, 4, transposed=False) for name in "ab"}
    sums = Accumulator(layers)
    x = torch.ones(3, 4, dtype=torch.bfloat16)
    rows = Batch(skip_last=False).call_rows("a", x, None)
    sums.add_input("a", rows, SharedInput({"a", "b"}), x)
    sums.add_input("a", rows, SharedInput({"a"}), x)
    sums.flush()
    assert sums.inputs["a"].dense()[0, 0] == 6
    assert sums.inputs["b"].dense()[0, 0] == 3


def test_logits_that_the_backward_needs_are_not_overwritten() -> None:
    class Capped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.mlp(x))

    factors = curvfast.collect_from(Capped(), [torch.randn(90, 4)], "all", progress=False)
    assert factors["mlp"].rows_g == 90
    assert factors["mlp"].G.trace() > 0
