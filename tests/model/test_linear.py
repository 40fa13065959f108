"""Calls of a linear layer: what is no x Wᵀ + b is never edited; each call counts or is told."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import curvfast
from curvfast.errors import CoverageError, CurvfastError, LayerNotFound
from curvfast.model.layers import bare_names, linear_layers, refused_modules

quiet = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")
pytestmark = quiet
DTYPES = [torch.float32, torch.bfloat16]


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(functional.normalize(x, dim=-1), self.weight, self.bias)


class Masked(nn.Linear):
    def __init__(self, *widths: int) -> None:
        super().__init__(*widths)
        self.register_buffer("mask", torch.ones(widths[1], widths[0]))
        self.mask[0, 0] = 0

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight * self.mask, self.bias)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.01


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        noise = 0.01 * torch.randn_like(self.weight)
        return functional.linear(x, self.weight + noise, self.bias)


class Clipped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-9, 9))


class LowRank(nn.Linear):
    def __init__(self, *widths: int, size: float = 1.0) -> None:
        super().__init__(*widths)
        self.down = nn.Parameter(torch.randn(2, widths[0]))
        self.up = nn.Parameter(size * torch.randn(widths[1], 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


class Computed(nn.Linear):
    def __init__(self, *widths: int) -> None:
        super().__init__(*widths)
        nn.init.normal_(self._parameters["weight"])

    @property
    def weight(self) -> Tensor:
        if "weight" not in vars(self).get("_parameters", {}):
            raise AttributeError
        return self._parameters["weight"] * 2


class Counting(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Spelled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class BiasBeside(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return functional.linear(x, self.weight), self.bias


class Routed(NamedTuple):
    scores: Tensor
    logits: Tensor


class Router(nn.Linear):
    def forward(self, x: Tensor) -> Routed:
        logits = super().forward(x)
        return Routed(logits.softmax(-1), logits)


class Net(nn.Module):
    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), last

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.first(x).relu())
        return y[0] + y[1] if isinstance(y, tuple) else y


def measured(net: nn.Module, x: Tensor, layers: str = "last") -> curvfast.Factors:
    with curvfast.collect(net, layers, loss_reduction="sum") as curvature:
        net(x).float().square().sum().backward()
    net.zero_grad()
    return curvature.factors()


def moments(net: nn.Module, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Σ a aᵀ and Σ g gᵀ, from a probe that is added to the output of the layer's own product."""
    module, seen = net.get_submodule(name), []

    def probed(x: Tensor) -> Tensor:
        probe = torch.zeros(*x.shape[:-1], module.out_features, requires_grad=True)
        seen.append((x.detach().clone(), probe))
        return functional.linear(x, module.weight, module.bias) + probe

    module.forward = probed
    try:
        net(x).square().sum().backward()
    finally:
        del module.forward
    net.zero_grad()
    # Of a forward that was checkpointed and one that recomputed it, a gradient reaches one.
    ((a, g),) = ((a, probe.grad) for a, probe in seen if probe.grad is not None)
    a, g = a.reshape(-1, module.in_features), g.reshape(-1, module.out_features)
    return a.T @ a, g.T @ g


class TestOtherMaps:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", [Cosine, Masked, Scaled, Noisy, Clipped, LowRank, Computed])
    def test_they_are_measured_and_never_edited(self, kind, dtype) -> None:
        torch.manual_seed(0)
        net = Net(kind(8, 4)).to(dtype)
        factors = measured(net, torch.randn(40, 6, dtype=dtype))
        before = copy.deepcopy(net.state_dict())
        for again in (net, copy.deepcopy(net)):
            with pytest.raises(CurvfastError, match=r"'last' cannot be edited.*x Wᵀ \+ b"):
                curvfast.edit(again, factors.eigh(), fraction=0.5)
        assert factors["last"].rows_g == 40
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", [nn.Linear, Counting, Spelled, BiasBeside])
    def test_the_same_map_in_other_words_is_edited(self, kind, dtype) -> None:
        torch.manual_seed(0)
        net = Net(kind(8, 4)).to(dtype)
        factors = measured(net, torch.randn(40, 6, dtype=dtype))
        curvfast.edit(net, factors.eigh(), fraction=0.5)

    def test_a_term_that_was_zero_when_it_was_measured_is_found(self) -> None:
        net = Net(LowRank(8, 4, size=0.0))
        basis = measured(net, torch.randn(40, 6)).eigh()
        assert linear_layers(net)["last"].why_read_only() is None
        net.last.up.data.fill_(0.1)
        with pytest.raises(CurvfastError, match="'last' cannot be edited"):
            curvfast.edit(net, basis, fraction=0.5)

    @pytest.mark.parametrize("change", [lambda y: y * 2, lambda y: y.relu(), None])
    def test_a_hook_of_others_that_changes_the_output_is_found(self, change) -> None:
        net = Net(nn.Linear(8, 4))
        net.last.register_forward_hook(lambda _m, _a, y: change(y) if change else None)
        measured(net, torch.randn(40, 6))
        assert (linear_layers(net)["last"].why_read_only() is None) == (change is None)

    def test_a_convolution_that_standardises_its_weight_is_found(self) -> None:
        class Standardised(nn.Conv2d):
            def forward(self, x: Tensor) -> Tensor:
                return functional.conv2d(x, self.weight / self.weight.std(), None, self.stride)

        for kind, same in ((nn.Conv2d, True), (Standardised, False)):
            net = nn.Sequential(kind(3, 8, 4, 4), nn.Flatten(), nn.Linear(32, 2))
            assert (linear_layers(net)["0"].why_read_only() is None) == same
            measured(net, torch.randn(40, 3, 8, 8), "0")
            assert (linear_layers(net)["0"].why_read_only() is None) == same

    def test_under_autocast_the_dtype_of_the_call_is_what_is_compared(self) -> None:
        torch.manual_seed(0)
        net = Net(Spelled(8, 4))
        with torch.autocast("cpu", torch.bfloat16):
            factors = measured(net, torch.randn(40, 6))
        curvfast.edit(net, factors.eigh(), fraction=0.5)

    def test_asking_draws_no_random_number_and_keeps_no_state(self) -> None:
        torch.manual_seed(0)
        net = Net(Noisy(8, 4))
        net.last.register_buffer("seen", torch.zeros(()))
        net.last.register_forward_pre_hook(lambda *_: pytest.fail("a hook ran"))
        before = torch.get_rng_state()
        assert linear_layers(net)["last"].why_read_only()
        assert torch.equal(before, torch.get_rng_state())

    def test_a_later_call_is_compared_no_more(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from curvfast.model import linear

        looked: list[Tensor] = []
        monkeypatch.setattr(linear, "look", lambda _layer, x, _y: looked.append(x))
        net = Net(Cosine(8, 4))
        with curvfast.collect(net, "last", loss_reduction="sum"):
            for _ in range(3):
                net(torch.randn(4, 6)).sum().backward()
        assert len(looked) == 1


class InPlace(nn.Module):
    def __init__(self, how: str, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.how = nn.Linear(6, 8, bias=bias), nn.Linear(8, 4), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how.startswith("checkpoint"):
            return self.down(checkpoint(self.middle, x, use_reentrant=self.how.endswith("in")))
        return self.down(self.middle(x))

    def middle(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if self.how == "out of place":
            return y.relu()
        if self.how == "dropout":
            return functional.dropout(y, 0.5, inplace=True)
        if self.how == "part":
            y[..., :3].mul_(2)
            return y
        if self.how == "twice":
            return y.mul_(0.5).relu_()
        return y.relu_()


def doubled(_module: nn.Module, _x: object, y: Tensor) -> None:
    """Hook of others, which changes a gradient."""
    if y.requires_grad:
        y.register_hook(lambda g: 2 * g)


HOW = ["out of place", "relu", "dropout", "part", "twice", "checkpoint", "checkpoint re-entrant in"]


class TestWrittenInPlace:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("how", HOW)
    def test_the_gradient_of_the_product_itself_counts(self, how: str, bias: bool) -> None:
        net, x = InPlace(how, bias), torch.randn(3, 5, 6).requires_grad_()
        torch.manual_seed(3)
        a, g = moments(net, x, "up")
        torch.manual_seed(3)
        factors = measured(net, x, "*")
        assert factors["up"].rows_g == 15
        torch.testing.assert_close(factors["up"].a_sum, a)
        torch.testing.assert_close(factors["up"].g_sum, g)

    @pytest.mark.parametrize("how", HOW)
    def test_training_is_the_same_bit_for_bit(self, how: str) -> None:
        x = torch.randn(3, 5, 6)
        found = []
        for watched in (True, False):
            net, own = InPlace(how), x.clone().requires_grad_()
            net.up.register_forward_hook(doubled)
            torch.manual_seed(3)
            if watched:
                with curvfast.collect(net, "*", loss_reduction="sum"):
                    net(own).square().sum().backward()
            else:
                net(own).square().sum().backward()
            found.append([own.grad, *(p.grad for p in net.parameters()), torch.get_rng_state()])
        assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))

    def test_a_driven_pass_counts_it_too(self) -> None:
        x = torch.randn(40, 5, 6)
        found = [
            curvfast.collect_from(InPlace(how), [x], "*", labels="sampled", seed=0, progress=False)[
                "up"
            ]
            for how in ("relu", "out of place")
        ]
        assert torch.equal(found[0].g_sum, found[1].g_sum)
        assert torch.equal(found[0].a_sum, found[1].a_sum)

    @pytest.mark.cpu_branches
    def test_a_compiled_model_counts_it_too(self) -> None:
        net, x = InPlace("relu"), torch.randn(3, 5, 6)
        a, g = moments(net, x, "up")
        compiled = torch.compile(net, backend="aot_eager")
        factors = measured(compiled, x, "up")["up"]
        torch._dynamo.reset()
        torch.testing.assert_close(factors.a_sum, a)
        torch.testing.assert_close(factors.g_sum, g)


class TestCalls:
    def test_a_router_counts_the_logits_whatever_is_made_of_them(self) -> None:
        torch.manual_seed(0)
        net, x = Net(Router(8, 4)), torch.randn(40, 6)
        factors = measured(net, x)["last"]
        logits = net.last.logits = net.last(net.first(x).relu()).logits.detach().requires_grad_()
        (logits.softmax(-1) + logits).square().sum().backward()
        torch.testing.assert_close(factors.g_sum, logits.grad.T @ logits.grad)

    def test_a_router_where_a_driven_pass_would_begin_is_refused(self) -> None:
        net = Net(Router(8, 4))
        with pytest.raises(CoverageError, match=r"'last' cannot be measured.*several tensors"):
            curvfast.collect_from(net, [torch.randn(40, 6)], "last", progress=False)
        assert set(curvfast.collect_from(net, [torch.randn(40, 6)], "*", progress=False)) == {
            "first", "last"
        }  # fmt: skip

    def test_a_bias_beside_the_product_in_a_driven_pass(self) -> None:
        net = Net(BiasBeside(8, 4))
        factors = curvfast.collect_from(net, [torch.randn(40, 6)], "last", progress=False)
        assert factors["last"].G.trace() > 0

    def test_one_row_without_a_batch_counts(self) -> None:
        net = Net(nn.Linear(8, 4))
        x = torch.randn(6)
        a, g = moments(net, x, "last")
        factors = measured(net, x)["last"]
        assert factors.rows_a == factors.rows_g == 1
        torch.testing.assert_close(factors.a_sum, a)
        torch.testing.assert_close(factors.g_sum, g)

    def test_an_input_by_keyword_is_found_among_others(self) -> None:
        class Named(nn.Linear):
            def forward(self, scale: Tensor, input: Tensor) -> Tensor:
                return super().forward(input)

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = Named(6, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.layer(scale=torch.ones(()), input=x)

        assert measured(Model(), torch.randn(9, 6), "layer")["layer"].rows_g == 9

    def test_no_rows_are_no_call(self) -> None:
        net = Net(nn.Linear(8, 4))
        with curvfast.collect(net, "*", loss_reduction="sum") as curvature:
            for rows in (0, 9):
                net(torch.randn(rows, 6)).sum().backward()
        assert curvature._capture.calls["last"].resting == 1
        assert curvature.factors()["last"].rows_g == 9

    @pytest.mark.parametrize(
        ("forward", "said"),
        [
            (lambda self, x: {"y": nn.Linear.forward(self, x)}, "returned a dict"),
            (lambda self, x: nn.Linear.forward(self, x).sum(0), "returned a Tensor [4]"),
            (lambda self, x: (x.sum(), x), "none of its 2 values"),
        ],
    )
    def test_an_output_that_is_no_product_is_told_and_breaks_nothing(self, forward, said) -> None:
        kind = type("Odd", (nn.Linear,), {"forward": forward})
        net = nn.ModuleDict({"first": nn.Linear(6, 8), "last": kind(8, 4)})

        def run(x: Tensor) -> Tensor:
            y = net["last"](net["first"](x))
            return next(iter(y.values())) if isinstance(y, dict) else y[0]

        net.forward = run
        with curvfast.collect(net, "*", loss_reduction="sum") as curvature:
            net(torch.randn(9, 6)).sum().backward()
        assert said in curvature._capture.calls["last"].why_unseen()
        with pytest.raises(CoverageError, match="'last' cannot be measured"):
            curvfast.collect_from(net, [torch.randn(9, 6)], "*", progress=False)

    def test_nested_tensors_of_an_encoder_are_refused_by_name(self) -> None:
        class Encoder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
                self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(8, 5)

            def forward(self, x: Tensor, mask: Tensor) -> Tensor:
                return self.head(self.encoder(x, src_key_padding_mask=mask)[:, 0])

        net, mask = Encoder(), torch.zeros(3, 7, dtype=torch.bool)
        mask[0, 4:] = True
        batch = {"x": torch.randn(3, 7, 8), "mask": mask}
        with pytest.raises(CoverageError, match=r"linear1' .*enable_nested_tensor=False"):
            curvfast.collect_from(net, [batch], "*linear1", progress=False)
        net.encoder.use_nested_tensor = False
        found = curvfast.collect_from(net, [batch], "*linear1", progress=False)
        assert found["encoder.layers.0.linear1"].rows_g > 0

    def test_transforms_are_left_alone_and_told(self) -> None:
        net, x = Net(nn.Linear(8, 4)), torch.randn(9, 6)
        weights = dict(net.named_parameters())

        def loss(weights: dict[str, Tensor], row: Tensor) -> Tensor:
            return torch.func.functional_call(net, weights, (row[None],)).square().sum()

        with curvfast.collect(net, "last", loss_reduction="sum") as curvature:
            for _ in range(2):
                each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
            torch.func.jvp(lambda w: loss(w, x[0]), (weights,), (weights,))
            calls = curvature._capture.calls["last"]
            assert (calls.forward, calls.transformed) == (0, 3)
            assert "torch.func" in calls.why_unseen()
            net(x).square().sum().backward()
            assert calls.why_unseen() is None
        assert curvature.factors()["last"].rows_g == 9
        torch.testing.assert_close(each["last.weight"].sum(0), net.last.weight.grad)

    def test_what_is_differentiated_twice_is_told_how(self) -> None:
        net, x = Net(nn.Linear(8, 4)), torch.randn(9, 6, requires_grad=True)
        with curvfast.collect(net, "last", loss_reduction="sum"):
            (slope,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
            with pytest.raises(CoverageError, match=r"gradient penalty.*curvature\.paused\(\)"):
                slope.square().sum().backward()


class TestNames:
    def test_checkpointing_and_compiling_anywhere_are_no_part_of_a_name(self) -> None:
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        net = nn.Sequential(nn.Sequential(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 4))
        names = list(linear_layers(net))
        basis = measured(net, torch.randn(40, 6), "*").eigh()
        net[0] = checkpoint_wrapper(net[0])
        net[2] = torch.compile(net[2])
        assert list(linear_layers(net)) == names
        curvfast.edit(net, basis, fraction=0.5)

    @pytest.mark.parametrize("prompt", [True, False])
    def test_what_peft_wraps_is_asked_of_it(self, prompt: bool) -> None:
        class Language(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = nn.Sequential(nn.Linear(6, 8))

        class Tuner(nn.Module):
            def __init__(self, model: nn.Module) -> None:
                super().__init__()
                self.model = model

        class Peft(nn.Module):
            def __init__(self, base: nn.Module) -> None:
                super().__init__()
                self.base_model = base

            def get_base_model(self) -> nn.Module:
                return self.base_model if prompt else self.base_model.model

        language = Language()
        for outer in (lambda m: m, lambda m: nn.ModuleDict({"net": m})):
            wrapped = outer(Peft(language if prompt else Tuner(language)))
            assert list(linear_layers(wrapped)) == list(linear_layers(outer(language)))
        assert bare_names(language)["model.0"] == "model.0"

    def test_a_flattened_weight_is_told_as_such(self) -> None:
        net = nn.Sequential(nn.Linear(6, 8))
        weight = net[0].weight.detach()
        # As FullyShardedDataParallel leaves a module with use_orig_params=False.
        del net[0].weight, net[0].bias
        net[0].weight, net[0]._is_fsdp_managed_module = weight, True
        net[0]._fsdp_use_orig_params = False
        assert "use_orig_params=True" in refused_modules(net)["0"]
        with pytest.raises(LayerNotFound, match="flattened"):
            with curvfast.collect(net, "0"):
                pass
