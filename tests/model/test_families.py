"""Every family of models against brute force: fused projections, mixtures, patches, wrappers."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from cases import gpt2, image_batches, image_loss, keep_tokens, token_batches, token_loss, vit
from families import DENSE, IMPLEMENTATIONS, MIXTURES, dense, mixture
from oracle import assert_equal_factors, brute_force
from torch import nn
from torch.overrides import _get_current_function_mode_stack as modes

import curvfast
from curvfast.errors import CoverageError, InputError, LayerNotFound, NumericalWarning
from curvfast.model.families import unsupported_reason
from curvfast.model.layers import linear_layers, select

quiet = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def truth(model, spec, batches, keep=keep_tokens, loss=token_loss, find=None):
    exact = copy.deepcopy(model).double().requires_grad_()
    doubled = [
        {k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in batches
    ]
    return brute_force(exact, list(select(model, spec)), doubled, keep, loss, find and find(exact))


def collected(model, batches, spec, **options):
    with curvfast.collect(model, spec, **options) as curvature:
        for batch in batches:
            model(**batch).loss.backward()
    model.zero_grad()
    return curvature.factors()


def driven(model, batches, spec, **options):
    return curvfast.collect_from(
        model, batches, spec, labels="gold", progress=False, **options
    )  # fmt: skip


@cache
def known_mixture(family: str) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """Weights, batches with both kinds of padding, and what brute force finds in them."""
    torch.manual_seed(5)
    model = mixture(family)
    batches = token_batches(sizes=(10, 11))
    return model.state_dict(), batches, truth(model, "mlp", batches)


def loaded_mixture(family: str, implementation: str):
    weights, batches, records = known_mixture(family)
    model = mixture(family, implementation)
    model.load_state_dict(weights)
    return model, batches, records


def patch_batches(batch: dict[str, Any]) -> torch.Tensor:
    return torch.ones(len(batch["labels"]), 5, dtype=torch.bool)


@quiet
class TestDense:
    @pytest.mark.parametrize("family", DENSE)
    def test_factors_equal_brute_force(self, family: str) -> None:
        model, batches = dense(family), token_batches(sizes=(11, 12))
        records = truth(model, "all", batches)
        assert_equal_factors(collected(model, batches, "all"), records)
        assert_equal_factors(driven(model, batches, "all"), records)

    def test_conv1d_fused_and_plain_equal_brute_force(self) -> None:
        model, batches = gpt2(), token_batches(sizes=(11, 12))
        assert "transformer.h.0.attn.c_attn" in select(model, "attention")
        records = truth(model, "all", batches)
        assert_equal_factors(collected(model, batches, "all"), records)
        assert_equal_factors(driven(model, batches, "all"), records)

    def test_a_vision_transformer_with_its_patches_equals_brute_force(self) -> None:
        model, batches = vit(), image_batches()
        assert "vit.embeddings.patch_embeddings.projection" in select(model, "all")
        records = truth(model, "all", batches, patch_batches, image_loss)
        assert_equal_factors(collected(model, batches, "all"), records)
        assert_equal_factors(driven(model, batches, "all"), records)


def train(model, batches, context) -> list[Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(7)
    trace: list[Any] = []
    with context:
        for batch in batches:
            loss = model(**batch).loss
            loss.backward()
            trace += [
                loss.detach(),
                *(p.grad.clone() for p in model.parameters() if p.grad is not None),
            ]
            optimizer.step()
            optimizer.zero_grad()
    return [*trace, *model.state_dict().values(), torch.get_rng_state()]


@pytest.fixture
def deterministic() -> Iterator[None]:
    """The backward of an index adds in an order of its own, even on the CPU."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@quiet
@pytest.mark.parametrize(
    ("family", "implementation", "reentrant"),
    [
        *((family, None, None) for family in (*DENSE, "gpt2", "vit")),
        *(("Mixtral", i, reentrant) for i in IMPLEMENTATIONS for reentrant in (None, False, True)),
        *((family, "grouped_mm", None) for family in MIXTURES[1:]),
    ],
)
def test_collecting_does_not_change_training(
    family, implementation, reentrant, deterministic
) -> None:
    """Losses, gradients, weights and random numbers, bit for bit."""
    if implementation:
        model = mixture(family, implementation, attention_dropout=0.1)
    else:
        model = {"gpt2": gpt2, "vit": vit}.get(
            family, lambda: dense(family, attention_dropout=0.1)
        )()
    batches = image_batches() if family == "vit" else token_batches(sizes=(7, 8))
    model.train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    twin = copy.deepcopy(model)
    watched = train(model, batches, curvfast.collect(model, "all"))
    alone = train(twin, batches, nullcontext())
    assert len(watched) == len(alone)
    assert all(torch.equal(one, two) for one, two in zip(watched, alone, strict=True))


@quiet
class TestMixtures:
    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    @pytest.mark.parametrize("family", MIXTURES)
    def test_factors_equal_brute_force(self, family: str, implementation: str) -> None:
        """Only tokens that were routed to an expert, are real and are scored, are its rows."""
        model, batches, records = loaded_mixture(family, implementation)
        assert_equal_factors(collected(model, batches, "mlp"), records)
        assert_equal_factors(driven(model, batches, "mlp"), records)

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing_changes_nothing(self, implementation: str, reentrant: bool) -> None:
        model, batches, records = loaded_mixture("Qwen2Moe", implementation)
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        assert_equal_factors(collected(model, batches, "mlp"), records)
        assert_equal_factors(driven(model, batches, "mlp", keep_mode=True), records)

    def test_two_forwards_before_one_backward_are_told_apart(self) -> None:
        model, batches, records = loaded_mixture("Mixtral", "grouped_mm")
        with curvfast.collect(model, loss_scale=1 / 2) as curvature:
            sum(model(**batch).loss / 2 for batch in batches).backward()
        assert_equal_factors(curvature.factors(), records)

    def test_the_fallback_of_grouped_mm_is_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers.integrations import moe

        monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *_: False)
        model, batches, records = loaded_mixture("Mixtral", "grouped_mm")
        assert_equal_factors(collected(model, batches, "mlp"), records)

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_bfloat16_under_autocast(self, implementation: str) -> None:
        model, batches, records = loaded_mixture("Mixtral", implementation)
        if implementation == "grouped_mm":
            # transformers multiplies in the dtype of the weights.
            model.model.layers.bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            factors = collected(model, batches, "mlp")
        name = "model.layers.0.mlp.experts.0.gate_up_proj"
        a, _, rows = records[name].moments()
        # Rounding moves a token near a tie to another expert.
        assert abs(factors[name].rows_g - rows) <= 2
        assert (factors[name].a_sum - a).norm() <= 0.1 * a.norm()

    def test_one_expert_alone_and_one_matrix_alone(self) -> None:
        model, batches, records = loaded_mixture("Mixtral", "grouped_mm")
        spec = ["*.0.mlp.experts.2.down_proj", "*.1.mlp.experts.1.*"]
        factors = collected(model, batches, spec)
        assert len(factors) == 3
        assert_equal_factors(factors, {name: records[name] for name in factors})

    def test_a_rule_for_rows_is_asked_about_the_tokens_of_all_experts(self) -> None:
        model, batches, _ = loaded_mixture("Mixtral", "eager")
        asked = set()

        def even(name: str, shape: torch.Size) -> torch.Tensor:
            asked.add(shape)
            return (torch.arange(shape.numel()) % 2 == 0).view(shape)

        records = truth(
            model, "mlp", batches,
            lambda b: even("", torch.Size([b["input_ids"].numel()])).view(b["input_ids"].shape),
        )  # fmt: skip
        assert_equal_factors(collected(model, batches, "mlp", rows=even), records)
        assert asked == {torch.Size([40]), torch.Size([44])}

    @pytest.mark.parametrize("driven_pass", [False, True])
    def test_thinned_rows_are_the_same_for_inputs_and_gradients(self, driven_pass: bool) -> None:
        model, batches, records = loaded_mixture("Mixtral", "grouped_mm")
        batch = batches[:1]
        records = truth(model, "mlp", batch)
        measure = driven if driven_pass else collected
        for name, factors in measure(model, batch, "mlp", rows_per_step=1).items():
            a, g = torch.cat(records[name].a), torch.cat(records[name].g)
            assert factors.rows_a == factors.rows_g == 1
            errors = [
                (factors.a_sum - torch.outer(x, x)).norm() / x.square().sum()
                + (factors.g_sum - torch.outer(y, y)).norm() / y.square().sum()
                for x, y in zip(a, g, strict=True)
            ]
            assert min(errors) <= 1e-4
        half = measure(model, batch, "mlp", rows_per_step=0.5)
        for name, record in records.items():
            assert half[name].rows_a == half[name].rows_g == max(1, round(record.rows / 2))

    def test_calls_left_out_are_not_watched(self) -> None:
        model, batches, _ = loaded_mixture("Mixtral", "grouped_mm")
        once = collected(model, batches, "mlp")
        watched: list[int] = []
        module = model.model.layers[1].mlp.experts.act_fn
        handle = module.register_forward_hook(lambda *_: watched.append(len(modes())))
        twice = [b for b in batches for _ in range(2)]
        for name, factors in collected(model, twice, "mlp", every=2).items():
            assert torch.equal(factors.a_sum, once[name].a_sum)
        handle.remove()
        assert watched == [1, 0, 1, 0]

    def test_nothing_stays_on_the_model_or_the_stack_of_modes(self) -> None:
        model, batches, _ = loaded_mixture("Mixtral", "eager")
        before = [(sorted(vars(m)), len(m._forward_hooks)) for m in model.modules()]

        def interrupt(*_: Any) -> None:
            assert len(modes()) == 1
            raise KeyboardInterrupt

        with curvfast.collect(model):
            model(**batches[0]).loss.backward()
            assert not modes()
        handle = model.model.layers[0].mlp.experts.act_fn.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt), curvfast.collect(model):
            model(**batches[0])
        handle.remove()
        assert not modes()
        assert before == [(sorted(vars(m)), len(m._forward_hooks)) for m in model.modules()]

    def test_no_activation_outlives_its_step(self) -> None:
        model, batches, _ = loaded_mixture("Mixtral", "grouped_mm")
        alive: list[weakref.ref[torch.Tensor]] = []
        module = model.model.layers[1].mlp.experts
        handle = module.register_forward_pre_hook(
            lambda _, args: alive.append(weakref.ref(args[0]))
        )
        gc.collect()
        gc.disable()
        try:
            with curvfast.collect(model):
                model(**batches[0]).loss.backward()
                assert [ref() for ref in alive] == [None]
        finally:
            gc.enable()
            handle.remove()

    @pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
    @pytest.mark.cpu_branches
    def test_a_compiled_mixture_is_measured(self, implementation: str) -> None:
        block = mixture("Mixtral", implementation).model.layers[0].mlp
        x = torch.randn(3, 7, 24)
        compiled = torch.compile(block, backend="eager")
        found = []
        for model in (block, compiled):
            with curvfast.collect(model, "*", loss_reduction="sum") as curvature:
                model(x).square().sum().backward()
            found.append(curvature.factors())
        torch._dynamo.reset()
        for name, factors in found[0].items():
            assert factors.rows_g == found[1][name].rows_g
            torch.testing.assert_close(factors.a_sum, found[1][name].a_sum)
            torch.testing.assert_close(factors.g_sum, found[1][name].g_sum)

    def test_kinds(self) -> None:
        model = mixture("Qwen2Moe")
        mlp = set(select(model, "mlp"))
        block = "model.layers.1.mlp"
        assert {f"{block}.experts.3.gate_up_proj", f"{block}.shared_expert.up_proj"} <= mlp
        router = f"{block}.shared_expert_gate"
        assert router not in select(model, "all")
        assert list(select(model, router)) == [router]


class TestUnroutedExperts:
    @pytest.fixture
    def model(self):
        model = mixture("GptOss")
        for layer in model.model.layers:
            layer.mlp.router.bias.data[3] = -1e4
        return model

    def test_they_are_left_out_with_a_warning(self, model) -> None:
        batches = token_batches("none", (40, 41))
        with curvfast.collect(model) as curvature:
            for batch in batches:
                model(**batch).loss.backward()
        with pytest.warns(NumericalWarning, match=r"no counted token .*experts\.3\.gate_up_proj"):
            factors = curvature.factors()
        assert len(factors) == 12
        assert not any(".3." in name for name in factors)
        coverage = curvature.coverage()
        name = "model.layers.0.mlp.experts.3.down_proj"
        assert "no counted token" in coverage.uncovered[name]
        assert coverage.covered[name.replace("3", "2")] == factors[name.replace("3", "2")].rows_g

    def test_a_mixture_that_never_ran_is_not_mistaken_for_it(self) -> None:
        model = nn.ModuleDict({"fc1": nn.Linear(24, 24), "mixture": mixture("Mixtral").model})
        model.forward = lambda x: model["fc1"](x)
        with curvfast.collect(model, loss_reduction="sum") as curvature:
            model(torch.randn(40, 24)).sum().backward()
        with pytest.warns(
            NumericalWarning, match=r"experts\.0\.gate_up_proj.*its hook never fired"
        ):
            factors = curvature.factors()
        assert set(factors) == {"fc1"}

    def test_a_loop_without_backward_is_not_mistaken_for_it(self, model) -> None:
        with curvfast.collect(model) as curvature:
            model(**token_batches()[0])
        with pytest.raises(CoverageError, match=r"experts\.\d.*: no gradient reached it"):
            curvature.factors()

    @quiet
    def test_shards_that_know_different_experts_add_up(self, model) -> None:
        batches = token_batches()
        few = driven(model, batches, "mlp")
        for layer in model.model.layers:
            layer.mlp.router.bias.data[3] = 1e4
        all_of_them = driven(model, batches, "mlp")
        for merged in (few + all_of_them, all_of_them + few, few + few + all_of_them):
            assert set(merged) == set(all_of_them)
        name = "model.layers.0.mlp.experts.3.down_proj"
        assert merged[name].rows_g == all_of_them[name].rows_g
        assert merged[name.replace("3", "2")].rows_g > all_of_them[name.replace("3", "2")].rows_g
        assert (few + few).provenance["unrouted"] == sorted(few.provenance["unrouted"])

    def test_none_routed_at_all_is_an_error(self, model) -> None:
        with pytest.raises(CoverageError, match=r"3\.down_proj': no token was routed to it"):
            driven(model, token_batches(), "*.experts.3.*")
        with curvfast.collect(model, "*.experts.3.*") as curvature:
            model(**token_batches()[0]).loss.backward()
        with pytest.raises(CoverageError, match=r"3\.down_proj': no token was routed to it"):
            curvature.factors()

    @quiet
    def test_passes_over_few_layers_leave_out_the_same(self, model) -> None:
        batches = token_batches()
        whole = driven(model, batches, "mlp")
        parts = driven(model, batches, "mlp", layers_per_pass=1)
        assert set(parts) == set(whole)
        assert set(parts.provenance["unrouted"]) == set(whole.provenance["unrouted"])
        for name in whole:
            assert torch.equal(parts[name].g_sum, whole[name].g_sum)

    def test_masked_tokens_route_nothing(self, model) -> None:
        """Whoever got padding alone got nothing."""
        batch = token_batches("none", (6,))[0]
        mask = torch.zeros(4, 6)
        mask[0, :2] = 1
        with curvfast.collect(model, ["*.0.mlp.*"]) as curvature:
            curvature.mask(mask)
            model(**batch).loss.backward()
        with pytest.warns(NumericalWarning):
            factors = curvature.factors()
        assert {layer.rows_g for layer in factors.values()} == {1}
        assert len(factors) == 4


class Odd(nn.Module):
    """Like transformers' experts, but its products escape, or the router is not obeyed."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.num_experts, self.is_transposed, self.how = 2, False, how
        self.up_proj = nn.Parameter(torch.randn(2, 4, 4))

    def forward(self, x, routing, weights):
        if self.how == "einsum":
            return torch.einsum("td,ed->te", x, self.up_proj[:, 0])
        if self.how == "dense":
            return (x.expand(2, -1, -1) @ self.up_proj.mT).sum(0)
        one = x[routing[:, 0] == 0] @ self.up_proj[1].T
        return torch.cat([one, x[routing[:, 0] == 1] @ self.up_proj[0].T])


class TestRefusedMixtures:
    @pytest.mark.parametrize("how", ["einsum", "dense", "swapped"])
    def test_products_that_escape_or_are_misread_are_an_error(self, how: str) -> None:
        model = nn.Module()
        model.experts = Odd(how)
        model.forward = lambda x: model.experts(x, torch.tensor([[0], [1], [1], [0]]), None)
        with (
            curvfast.collect(model, loss_reduction="sum"),
            pytest.raises(CoverageError, match=r"'experts'.*Odd.*set_experts_implementation"),
        ):
            model(torch.randn(4, 4))
        assert not modes()

    def test_an_implementation_in_one_kernel_is_refused_by_name(self) -> None:
        model = mixture("Mixtral", num_hidden_layers=1)
        model.config._experts_implementation = "sonicmoe"
        reason = r"sonicmoe.*set_experts_implementation\('grouped_mm'\)"
        with pytest.raises(LayerNotFound, match=reason), curvfast.collect(model):
            pass
        with curvfast.collect(model, "attention") as curvature:
            uncovered = curvature.coverage().uncovered
        assert "sonicmoe" in uncovered["model.layers.0.mlp.experts.gate_up_proj"]

    def test_experts_of_another_make_are_refused_by_name(self) -> None:
        from transformers import Llama4TextConfig
        from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

        config = Llama4TextConfig(hidden_size=8, intermediate_size=8, num_local_experts=2)
        assert "Llama4TextExperts: experts that are not" in unsupported_reason(
            Llama4TextExperts(config)
        )


@quiet
class TestEditing:
    @pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
    def test_an_expert_is_its_own_slice_in_place(self, family: str) -> None:
        model, batches, _ = loaded_mixture(family, "grouped_mm")
        basis = driven(model, batches, "mlp").eigh()
        name = "model.layers.1.mlp.experts.2.gate_up_proj"
        stack = model.model.layers[1].mlp.experts.gate_up_proj
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        weight = stack.detach()[2].double()
        weight = weight.T if family == "GptOss" else weight
        kept = basis.keep(mass=0.5)[name].dense()
        u, v = basis[name].vectors_g.double(), basis[name].vectors_a.double()
        expected = u @ ((u.T @ weight @ v) * kept) @ v.T
        with curvfast.edited(model, basis, 0.5, name) as report:
            edited = stack.detach()[2].T if family == "GptOss" else stack.detach()[2]
            assert (edited - expected).norm() <= 1e-5 * weight.norm()
            assert [layer.name for layer in report.layers] == [name]
            others = [0, 1, 3]
            own = "model.layers.1.mlp.experts.gate_up_proj"
            assert torch.equal(stack[others], before[own][others])
            for other, parameter in model.named_parameters():
                assert (other == own) != torch.equal(parameter, before[other])
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())

    def test_a_patch_embedding_is_edited_as_a_matrix_whatever_its_layout(self) -> None:
        projection = nn.Conv2d(3, 5, 2, 2)
        model = nn.Sequential(projection, nn.Flatten())
        basis = curvfast.collect_from(model, [torch.randn(9, 3, 4, 4)], "0", progress=False).eigh()
        weight = projection.weight.detach().clone()
        u, v = basis["0"].vectors_g.double(), basis["0"].vectors_a.double()
        kept = basis.keep(mass=0.3)["0"].dense()
        expected = u @ ((u.T @ weight.double().flatten(1) @ v) * kept) @ v.T
        for layout in (torch.contiguous_format, torch.channels_last):
            projection.weight.data = weight.clone(memory_format=layout)
            with curvfast.edited(model, basis, 0.3):
                assert (projection.weight.flatten(1) - expected).norm() <= 1e-5 * weight.norm()
            assert torch.equal(projection.weight, weight)


class Patches(nn.Module):
    """A convolution whose patches do not fill the image, and one that reads the same image."""

    def __init__(self, *convolutions: nn.Module) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(convolutions)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([c(x).flatten(1) for c in self.convolutions], 1)


def squares(output: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    return output.square().sum()


@quiet
class TestPatches:
    @pytest.mark.parametrize(
        ("build", "shape"),
        [
            (lambda: Patches(nn.Conv1d(3, 5, 4, 4)), (6, 3, 18)),
            (lambda: Patches(nn.Conv2d(3, 5, (2, 3), (2, 3), bias=False)), (4, 3, 7, 9)),
            (lambda: Patches(nn.Conv3d(2, 5, (2, 3, 2), (2, 3, 2))), (3, 2, 5, 6, 4)),
            (lambda: Patches(nn.Conv2d(3, 5, 1)), (2, 3, 4, 5)),
            # One image, two patch sizes, one of them twice: two second moments, not one or three.
            (
                lambda: Patches(
                    nn.Conv2d(3, 5, 2, 2), nn.Conv2d(3, 4, 4, 4), nn.Conv2d(3, 6, 2, 2)
                ),
                (4, 3, 8, 8),
            ),
        ],
        ids=["1d", "2d-ragged", "3d", "pointwise", "shared-image"],
    )
    def test_factors_equal_brute_force(self, build, shape) -> None:
        model, x = build(), torch.randn(shape)
        records = truth(
            model, "all", [{"x": x}], lambda _: torch.ones(0, dtype=torch.bool), squares
        )
        with curvfast.collect(model, "all", loss_reduction="sum") as curvature:
            model(x).square().sum().backward()
        factors = curvature.factors()
        assert_equal_factors(factors, records)
        if len(factors) == 3:
            sums = [layer.a_sum for layer in factors.values()]
            assert sums[0] is sums[2]
            assert sums[0].shape != sums[1].shape

    def test_an_image_without_a_batch(self) -> None:
        model, x = nn.Sequential(nn.Conv2d(3, 5, 2, 2)), torch.randn(3, 6, 6)
        found = []
        for image in (x, x[None]):
            with curvfast.collect(model, "all", loss_reduction="sum") as curvature:
                model(image).square().sum().backward()
            found.append(curvature.factors()["0"])
        assert torch.equal(found[0].a_sum, found[1].a_sum)
        assert torch.equal(found[0].g_sum, found[1].g_sum)

    @pytest.mark.parametrize(
        ("options", "fault"),
        [
            ({"stride": 1}, r"stride=\(1, 1\)"),
            ({"padding": 1}, r"padding=\(1, 1\)"),
            ({"groups": 2}, "groups=2"),
            ({"dilation": 2}, r"dilation=\(2, 2\)"),
        ],
    )
    def test_other_convolutions_are_refused_by_name(self, options, fault: str) -> None:
        convolution = nn.Conv2d(4, 4, 2, **{"stride": 2, **options})
        model = nn.Sequential(convolution, nn.Flatten(), nn.LazyLinear(3))
        with pytest.raises(LayerNotFound, match=rf"0: convolution with kernel.*{fault}"):
            select(model, "mlp")
        with pytest.raises(LayerNotFound, match=rf"'0': convolution with kernel.*{fault}"):
            select(model, "0")
        model(torch.randn(2, 4, 6, 6))
        with curvfast.collect(model, "all") as curvature:
            assert curvature.coverage().uncovered["0.weight"].startswith("convolution with")

    def test_the_first_layer_may_be_followed_by_an_operation_in_place(self) -> None:
        """A driven pass starts its graph there; autograd forbids changing a leaf in place."""
        torch.manual_seed(3)
        plain, inplace = (
            nn.Sequential(nn.Conv2d(2, 6, 2, 2), nn.ReLU(inplace=i), nn.Flatten(), nn.Linear(24, 3))
            for i in (False, True)
        )
        inplace.load_state_dict(plain.state_dict())
        x = torch.randn(5, 2, 4, 4)
        one, two = (
            curvfast.collect_from(model, [x], "all", progress=False) for model in (plain, inplace)
        )
        for name in one:
            assert torch.equal(one[name].a_sum, two[name].a_sum)
            assert torch.equal(one[name].g_sum, two[name].g_sum)


class TestRefusals:
    @pytest.mark.parametrize(
        ("module", "reason"),
        [
            (nn.LSTM(3, 4), "LSTM: its fused kernels hide the gradients of the gates"),
            (nn.GRU(3, 4), "GRU: its fused kernels"),
            (nn.RNN(3, 4), "RNN: its fused kernels"),
            (nn.LSTMCell(3, 4), "LSTMCell: its fused kernels"),
            (nn.Embedding(3, 4), "embedding"),
            (nn.MultiheadAttention(4, 2), "one fused function"),
            (nn.ConvTranspose2d(3, 4, 2, 2), "transposed convolution"),
            (nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), "computed anew"),
            (nn.Bilinear(3, 4, 5), "Bilinear is not supported"),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
    )
    def test_by_name_with_the_reason(self, module: nn.Module, reason: str) -> None:
        model = nn.ModuleDict({"odd": module, "fc1": nn.Linear(2, 2)})
        with curvfast.collect(model, "all") as curvature:
            uncovered = curvature.coverage().uncovered
        own = {n: why for n, why in uncovered.items() if n.startswith("odd") and "bias" not in n}
        assert own
        assert any(reason in why for why in own.values())
        for spec in ("odd", ["fc1", "odd*"]):
            with pytest.raises(LayerNotFound, match=reason):
                select(model, spec)
        assert list(select(model, "all")) == ["fc1"]

    def test_a_glob_that_means_supported_layers_too_is_fine(self) -> None:
        model = nn.ModuleDict({"mlp_norm": nn.LayerNorm(3), "mlp_up": nn.Linear(3, 3)})
        assert list(select(model, "mlp*")) == ["mlp_up"]


class Packed(nn.Linear):
    """Like a quantised layer of bitsandbytes: an nn.Linear whose weight is packed integers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.scale = linear.weight.abs().amax() / 127
        codes = (linear.weight / self.scale).round().to(torch.int8).flatten()
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.view(self.out_features, self.in_features) * self.scale
        return nn.functional.linear(x, weight, self.bias)


@quiet
class TestQuantised:
    def test_a_packed_weight_is_measured_and_not_edited(self) -> None:
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        packed = nn.Sequential(Packed(model[0]), nn.Tanh(), Packed(model[2]))
        whole = copy.deepcopy(model)
        for mine, theirs in zip(whole, packed, strict=True):
            if isinstance(mine, nn.Linear):
                mine.weight.data = theirs.weight.view(mine.weight.shape) * theirs.scale.detach()
        x = torch.randn(40, 6)
        factors = curvfast.collect_from(packed, [x], "all", progress=False)
        exact = curvfast.collect_from(whole, [x], "all", progress=False)
        for name in ("0", "2"):
            assert torch.equal(factors[name].a_sum, exact[name].a_sum)
            assert torch.equal(factors[name].g_sum, exact[name].g_sum)
        before = packed.state_dict()
        with pytest.raises(InputError, match=r"'0' cannot be edited.*int8 \[48\]"):
            curvfast.edit(packed, factors.eigh(), mass=0.5)
        assert all(torch.equal(v, before[k]) for k, v in packed.state_dict().items())
        curvfast.edit(model, factors.eigh(), mass=0.5)

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
    def test_a_weight_of_the_right_shape_and_a_coded_dtype_is_not_edited(self, dtype) -> None:
        linear = nn.Linear(4, 4)
        linear.weight = nn.Parameter(linear.weight.to(dtype), requires_grad=False)
        layer = linear_layers(nn.Sequential(linear))["0"]
        with pytest.raises(InputError, match="cannot be edited"):
            layer.write(torch.zeros(4, 4))


class LoRA(nn.Module):
    """As PEFT wraps a layer: the layer itself as ``base_layer``, low-rank factors beside it."""

    def __init__(self, base: nn.Module, width_in: int, width_out: int) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(width_in, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, width_out, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + 2 * self.lora_B["default"](self.lora_A["default"](x))


class PeftModelStandIn(nn.Module):
    """As PEFT wraps a model: two modules deep, its names before the model's own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model
        self.config = model.config

    def get_base_model(self) -> nn.Module:
        return self.base_model.model

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        return self.base_model.model(
            input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs
        )


def stand_in(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    for layer in [*linear_layers(model).values()]:
        if layer.name.endswith(("_proj", "c_fc")):
            parent, _, leaf = layer.name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, LoRA(layer.module, layer.d_in, layer.d_out))
    return PeftModelStandIn(model)


def real(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    targets = ["gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj", "c_fc"]
    names = {name.rpartition(".")[2] for name in linear_layers(model)}
    return peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=[t for t in targets if t in names])
    )


@quiet
@pytest.mark.parametrize("wrap", [stand_in, real])
class TestPeft:
    def wrapped(self, wrap, build):
        bare = build()
        model = wrap(copy.deepcopy(bare))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.1)
        return bare, model

    @pytest.mark.parametrize("build", [lambda: dense("Llama"), gpt2], ids=["llama", "gpt2"])
    def test_base_layers_equal_brute_force_under_their_own_names(self, wrap, build) -> None:
        bare, model = self.wrapped(wrap, build)
        batches = token_batches(sizes=(11, 12))
        assert set(select(model, "all")) == set(select(bare, "all"))

        def find(exact: nn.Module) -> Any:
            inner = exact.get_base_model()

            def module(name: str) -> nn.Module:
                found = inner.get_submodule(name)
                return getattr(found, "base_layer", found)

            return module

        records = truth(model, "all", batches, find=find)
        assert_equal_factors(driven(model, batches, "all"), records)
        handle = model.get_base_model().get_input_embeddings().register_forward_hook(
            lambda _m, _a, y: y.requires_grad_()
        )  # fmt: skip
        assert_equal_factors(collected(model, batches, "all"), records)
        handle.remove()

    def test_a_frozen_first_layer_is_explained(self, wrap) -> None:
        _, model = self.wrapped(wrap, lambda: dense("Llama"))
        with pytest.raises(CoverageError, match=r"q_proj'.*enable_input_require_grads"):
            collected(model, token_batches(), "attention")

    def test_the_edit_measured_on_the_wrapped_model_fits_the_bare_one(self, wrap) -> None:
        bare, model = self.wrapped(wrap, lambda: dense("Llama"))
        basis = driven(model, token_batches(), "mlp").eigh()
        curvfast.edit(bare, basis, mass=0.5)
        curvfast.edit(model, basis, mass=0.5)
        weights = bare.state_dict()
        changed = 0
        for name, layer in linear_layers(model).items():
            if layer.kind == "mlp":
                changed += 1
                assert torch.equal(layer.matrix(), weights[f"{name}.weight"])
        assert changed == 6

    def test_the_adapters_are_measured_if_named(self, wrap) -> None:
        _, model = self.wrapped(wrap, lambda: dense("Llama"))
        with curvfast.collect(model, "mlp") as curvature:
            reasons = curvature.coverage().uncovered
        name = "model.layers.0.mlp.up_proj.lora_A.default"
        assert "adapter of a PEFT wrapper" in reasons[f"{name}.weight"]
        assert set(driven(model, token_batches(), name)) == {name}
