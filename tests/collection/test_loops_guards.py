"""What a loop must be told early or never notice: layers, hooks, copies, and what is not finite."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import llama
from loops import (
    Loop,
    Net,
    Step,
    assert_exact,
    counted,
    fit,
    labelled,
    measured,
    not_last,
    only,
    placed,
    shifted,
    tokens,
)
from oracle import assert_equal_factors
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import curvfast
from curvfast.errors import CoverageError

pytestmark = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.2.mlp.down_proj"

# ---- which layers ---------------------------------------------------------------------------


def activations_in_place() -> Loop:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x).relu_())

    model = InPlace()
    x, y = torch.randn(3, 5, 6), torch.randint(4, (3, 5))
    steps = [Step(lambda: placed(model(x), y, "mean"), lambda: placed(model(x), y))]
    return Loop(model, ["up", "down"], steps)


def experts_in_a_list() -> Loop:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.router, self.head = (
                nn.Embedding(50, 16), nn.Linear(16, 2), nn.Linear(16, 50)
            )  # fmt: skip
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

        def route(self, ids: Tensor) -> Tensor:
            return self.router(self.emb(ids).flatten(0, 1)).argmax(-1)

        def forward(self, ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
            x = self.emb(ids)
            flat, to = x.flatten(0, 1), self.route(ids)
            y = torch.zeros_like(flat)
            for number, expert in enumerate(self.experts):
                y[to == number] = expert(flat[to == number])
            logits = self.head(x + y.view_as(x))
            return placed(logits, labels, "mean"), logits

    model = Mixture()
    ids, mask, labels = tokens(real=(3, 7, 4))

    def keep(name: str, shape: torch.Size) -> Tensor:
        return mask.bool().flatten()[model.route(ids) == int(name[-1])]

    n = int((labels != -100).sum())
    loss = lambda: model(ids, attention_mask=mask, labels=labels)[0]  # noqa: E731
    return Loop(model, ["experts.0", "experts.1"], [Step(loss, lambda: n * loss(), keep)])


def bias_beside_the_output() -> Loop:
    class Beside(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return nn.functional.linear(x, self.weight), self.bias

    class Model(Net):
        def __init__(self) -> None:
            super().__init__(4)
            self.up = Beside(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            y, bias = self.up(x)
            return self.down((y + bias).relu())

    return fit(Model(), cross_entropy, labelled((8,), (5,)))


def an_input_without_a_batch() -> Loop:
    model = Net(4)
    x, y = torch.randn(6), torch.tensor(2)

    def loss() -> Tensor:
        return cross_entropy(model(x), y)

    def keep(name: str, shape: torch.Size) -> Tensor:
        return torch.tensor(True)

    told = {"loss_reduction": "sum"}
    return Loop(model, ["up", "down"], [Step(loss, loss, keep)], told)


@pytest.mark.parametrize("make", [activations_in_place])
def test_what_follows_a_layer_in_place_changes_nothing(make: Callable[[], Loop]) -> None:
    assert_exact(make())


@pytest.mark.parametrize(
    "make", [experts_in_a_list, bias_beside_the_output, an_input_without_a_batch]
)
def test_an_unusual_layer_is_exact_or_refused_by_name(make: Callable[[], Loop]) -> None:
    loop = make()
    try:
        factors = measured(loop)
    except curvfast.CurvfastError as refused:
        assert any(name in str(refused) for name in loop.layers)  # noqa: PT017
        return
    assert_equal_factors(factors, counted(loop))


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        w = nn.functional.normalize(self.weight, dim=-1)
        return nn.functional.linear(nn.functional.normalize(x, dim=-1), w)


class Masked(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        pattern = torch.arange(self.weight.numel()).view_as(self.weight) % 2
        return nn.functional.linear(x, self.weight * pattern, self.bias)


class Residual(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x[..., :3]


@pytest.mark.parametrize("layer", [Cosine, Masked, Residual])
def test_a_layer_that_is_no_linear_map_of_its_weight_is_never_written(layer: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), layer(8, 3))
    x, y = torch.randn(9, 6), torch.randint(3, (9,))
    before = model[2].weight.clone()

    def measure_and_edit() -> None:
        with curvfast.collect(model, ["2"]) as curvature:
            cross_entropy(model(x), y).backward()
        curvfast.edit(model, curvature.factors().eigh(), fraction=0.5)

    with pytest.raises(curvfast.CurvfastError, match="2"):
        measure_and_edit()
    assert torch.equal(model[2].weight, before)


# ---- hooks ----------------------------------------------------------------------------------


def _hooks(model: nn.Module) -> int:
    return sum(
        len(hooks)
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    )


def deep_copies(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def averaged_copies(model: nn.Module) -> nn.Module:
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    return average.module


def saved_copies(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [deep_copies, averaged_copies, saved_copies])
def test_a_copy_made_while_collecting_is_not_the_model(
    duplicate: Callable[[nn.Module], nn.Module],
) -> None:
    model = llama()
    ids, mask, labels = tokens()

    def summed() -> Tensor:
        return shifted(model(input_ids=ids, attention_mask=mask).logits, labels)

    loop = Loop(model, [UP, DOWN], [Step(summed, summed, only(not_last(mask)))])
    with curvfast.collect(model, [UP, DOWN]) as curvature:
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        other = duplicate(model)
        other(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    assert _hooks(other) == _hooks(model) == 0
    copy.deepcopy(other)(input_ids=ids)
    assert_equal_factors(curvature.factors(), counted(loop))


def test_gradients_of_each_sample_beside_the_loop_change_nothing() -> None:
    """torch.func runs the same modules under vmap: its tensors are no rows of the loop."""
    loop = fit(Net(4), cross_entropy, labelled((8,)))
    model, x, y = loop.model, *labelled((5,))[0]
    frozen = {name: p.detach() for name, p in model.named_parameters()}

    def one(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(torch.func.functional_call(model, weights, (x,)), y)

    with curvfast.collect(model, loop.layers) as curvature:
        loop.steps[0].loss().backward()
        torch.func.vmap(torch.func.grad(one), (None, 0, 0))(frozen, x, y)
    assert_equal_factors(curvature.factors(), counted(loop))


# ---- told early -----------------------------------------------------------------------------


class Idle(Net):
    def __init__(self) -> None:
        super().__init__(3)
        self.spare = nn.Linear(6, 6)


def test_a_model_compiled_before_the_block_is_told_at_once_or_exact() -> None:
    model = Net(4)
    run = torch.compile(model, backend="eager", dynamic=False)
    batches = labelled((6,), (8,), (6,), (6,), (10,))
    for x, y in batches[:2]:
        cross_entropy(run(x), y).backward()
    model.zero_grad()
    begun = 0
    try:
        with curvfast.collect(model, ["up"]) as curvature:
            for x, y in batches:
                begun += 1
                cross_entropy(run(x), y).backward()
        rows = curvature.factors()["up"].rows_g
    except curvfast.CurvfastError:
        assert begun <= 2
        return
    assert rows == 36


def test_a_layer_that_is_never_called_is_told_after_the_first_batch_and_left_out() -> None:
    drawn, told = 0, []

    def batches() -> Iterator[Tensor]:
        nonlocal drawn
        for _ in range(20):
            if any("spare" in str(each.message) for each in caught):
                told.append(drawn)
            drawn += 1
            yield torch.randn(8, 6)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        factors = curvfast.collect_from(Idle(), batches(), "all", progress=False)
    assert set(factors) == {"up", "down"}
    assert factors["up"].rows_g == 160
    assert told[0] <= 2


def test_a_layer_named_and_never_called_is_an_error_after_the_first_batch() -> None:
    drawn = 0

    def batches() -> Iterator[Tensor]:
        nonlocal drawn
        for _ in range(20):
            drawn += 1
            yield torch.randn(8, 6)

    with pytest.raises(CoverageError, match="spare"):
        curvfast.collect_from(Idle(), batches(), ["up", "spare"], progress=False)
    assert drawn <= 2


def test_a_loop_warns_of_a_layer_never_called_after_its_first_step() -> None:
    model = Idle()
    x, y = labelled((8,), classes=3)[0]

    def two_steps() -> None:
        with curvfast.collect(model, ["up", "spare"]):
            for _ in range(2):
                cross_entropy(model(x), y).backward()

    with pytest.warns(UserWarning, match="spare"):
        two_steps()


# ---- not finite -----------------------------------------------------------------------------


class Overflows(Net):
    """A gradient that overflows half way down, where it is told to."""

    bad = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).relu()
        if self.bad:
            hidden.register_hook(lambda g: g * float("inf"))
        return self.down(hidden)


def _loss_is_nan(number: int, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x * float("nan") if number == 2 else x), y)


@pytest.mark.filterwarnings("ignore")
def test_a_batch_that_is_not_finite_counts_nowhere_and_is_told() -> None:
    model = Net(4)
    with curvfast.collect(model, ["up", "down"]) as curvature:
        for number, (x, y) in enumerate(labelled(*[(8,)] * 5)):
            _loss_is_nan(number, model, x, y).backward()
    factors = curvature.factors()
    assert factors["up"].rows_g == factors["down"].rows_g == 32
    assert all(torch.isfinite(f.g_sum).all() and torch.isfinite(f.a_sum).all() for f in
               factors.values())  # fmt: skip
    assert "finite" in str(curvature.coverage())


@pytest.mark.filterwarnings("ignore")
def test_layers_above_a_gradient_that_overflows_keep_their_rows() -> None:
    model = Overflows(4)
    with curvfast.collect(model, ["up", "down"]) as curvature:
        for number, (x, y) in enumerate(labelled(*[(8,)] * 5)):
            model.bad = number == 2
            cross_entropy(model(x), y).backward()
    factors = curvature.factors()
    assert (factors["down"].rows_g, factors["down"].rows_a) == (40, 40)
    assert (factors["up"].rows_g, factors["up"].rows_a) == (32, 32)
    assert torch.isfinite(factors["up"].g_sum).all()


@pytest.mark.filterwarnings("ignore")
def test_a_batch_that_is_not_finite_is_an_error_where_that_was_asked_for() -> None:
    model = Net(4)

    def measure() -> None:
        with curvfast.collect(model, ["up"], on_nonfinite="error") as curvature:
            for number, (x, y) in enumerate(labelled((8,), (8,), (8,))):
                _loss_is_nan(number, model, x, y).backward()
        curvature.factors()

    with pytest.raises(curvfast.CurvfastError, match="finite"):
        measure()


@pytest.mark.filterwarnings("ignore")
def test_a_step_that_the_scaler_skips_counts_nowhere() -> None:
    """One layer's gradient overflows and the step is skipped: no layer keeps rows of it."""
    model = Overflows(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with curvfast.collect(model, ["up", "down"], grad_scaler=scaler) as curvature:
        for number, (x, y) in enumerate(labelled((8,), (8,), (8,))):
            model.bad = number == 1
            scaler.scale(cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    factors = curvature.factors()
    assert factors["up"].rows_g == factors["down"].rows_g == 16
