"""Factors against the float64 oracle, on real architectures and through every training idiom."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref

import pytest
import torch
from cases import CASES, Case, keep_tokens, llama, token_batches, token_loss
from oracle import assert_equal_factors, brute_force

import curvfast
from curvfast.model.layers import select

pytestmark = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")


def truth(case: Case, model, batches):
    return brute_force(
        copy.deepcopy(model).double(), list(select(model, case.layers)),
        [_double(batch) for batch in batches], case.keep, case.loss,
    )  # fmt: skip


def _double(batch):
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_collect_equals_brute_force(case: Case) -> None:
    model, batches = case.model(), case.batches()
    with curvfast.collect(model, case.layers) as curvature:
        for batch in batches:
            model(**batch).loss.backward()
    assert_equal_factors(curvature.factors(), truth(case, model, batches))


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_kept_input_lives_until_its_gradient_arrives(case: Case, reentrant: bool | None) -> None:
    """Several forwards, each followed by a collection of garbage, then their backwards."""
    model, batches, losses = case.model().train(), case.batches(), []
    records = truth(case, model, batches)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.get_input_embeddings().register_forward_hook(lambda _m, _a, y: y.requires_grad_())
    with curvfast.collect(model, case.layers) as curvature:
        for batch in batches:
            losses.append(model(**batch).loss)
            gc.collect()
        for loss in losses:
            loss.backward()
            gc.collect()
    assert_equal_factors(curvature.factors(), records)


@pytest.mark.parametrize("backward", [True, False])
def test_a_kept_input_goes_with_its_backward_or_its_graph(backward: bool) -> None:
    """A loss that is held keeps no input; a forward without backward keeps none longer than it."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Tanh())
    with curvfast.collect(model, "all", loss_reduction="sum"):
        x = torch.randn(7, 5)
        read = weakref.ref(x.untyped_storage())
        loss = model(x).sum()
        if backward:
            loss.backward()
        else:
            del loss
        del x
        assert read() is None


def test_a_head_alone_is_measured_though_the_backward_starts_at_it() -> None:
    """Its output is made by a node of ours, and freed before the backward."""
    model, batches = llama(tie_word_embeddings=False), token_batches()
    factors = curvfast.collect_from(model, batches, "lm_head", labels="gold", progress=False)
    case = dataclasses.replace(CASES[0], layers="lm_head")
    assert_equal_factors(factors, truth(case, model, batches))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_collect_from_gold_equals_brute_force(case: Case) -> None:
    model, batches = case.model(), case.batches()
    factors = curvfast.collect_from(model, batches, case.layers, labels="gold", progress=False)
    assert_equal_factors(factors, truth(case, model, batches))


@pytest.mark.parametrize("keep_mode", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_checkpointing_changes_nothing(case: Case, reentrant: bool, keep_mode: bool) -> None:
    model, batches = case.model().train(), case.batches()
    records = truth(case, model, batches)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.get_input_embeddings().register_forward_hook(lambda _m, _a, y: y.requires_grad_())
    with curvfast.collect(model, case.layers) as curvature:
        for batch in batches:
            model(**batch).loss.backward()
    assert_equal_factors(curvature.factors(), records)
    factors = curvfast.collect_from(
        model, batches, case.layers, labels="gold", progress=False, keep_mode=keep_mode
    )
    assert_equal_factors(factors, records)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_accumulated_batches_are_told_apart(reentrant: bool | None) -> None:
    """Two forwards before one backward: each recomputation uses the mask of its own batch."""
    case = CASES[0]
    model = llama().train()
    batches = token_batches("right", (9, 9)) + token_batches("left", (9,))
    records = truth(case, model, batches)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    with curvfast.collect(model, loss_scale=1 / 3) as curvature:
        sum(model(**batch).loss / 3 for batch in batches).backward()
    assert_equal_factors(curvature.factors(), records)


@pytest.mark.parametrize("padding", ["none", "right", "left", "both"])
def test_padding_is_left_out(padding: str) -> None:
    case = CASES[0]
    model, batches = llama(), token_batches(padding)
    with curvfast.collect(model) as curvature:
        for batch in batches:
            model(**batch).loss.backward()
    assert_equal_factors(curvature.factors(), truth(case, model, batches))


def test_units_do_not_depend_on_the_loss_reduction() -> None:
    model, batches = llama(), token_batches()
    with curvfast.collect(model, loss_reduction="sum") as curvature:
        for batch in batches:
            token_loss(model(**batch), batch).backward()
    assert_equal_factors(curvature.factors(), truth(CASES[0], model, batches))


@pytest.mark.parametrize("told", ["labels", "predictions"])
def test_a_mean_loss_outside_the_model_is_rescaled(told: str) -> None:
    """The loss is averaged over every scored position, by the caller's own code."""
    model, batches = llama(), token_batches("none")
    with curvfast.collect(model) as curvature:
        for batch in batches:
            count = int((batch["labels"][:, 1:] != -100).sum())
            if told == "labels":
                curvature.labels(count)
            output = model(input_ids=batch["input_ids"])
            (token_loss(output, batch) / count).backward()
    assert_equal_factors(curvature.factors(), truth(CASES[0], model, batches))


def test_items_in_batch_of_a_trainer_are_the_divisor() -> None:
    model, batches = llama(), token_batches("none")
    total = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    with curvfast.collect(model) as curvature:
        for batch in batches:
            model(**batch, num_items_in_batch=total).loss.backward()
    assert_equal_factors(curvature.factors(), truth(CASES[0], model, batches))


def test_an_explicit_mask_overrides_the_models() -> None:
    model, batches = llama(), token_batches("right")
    with curvfast.collect(model) as curvature:
        for batch in batches:
            curvature.mask(batch["attention_mask"])
            curvature.labels(int((batch["labels"][:, 1:] != -100).sum()))
            # Right padding: what comes after the last real position does not change what is before.
            output = model(input_ids=batch["input_ids"])
            (token_loss(output, batch) / int((batch["labels"][:, 1:] != -100).sum())).backward()
    assert_equal_factors(curvature.factors(), truth(CASES[0], model, batches))


def test_the_class_token_alone_can_be_counted() -> None:
    case = CASES[-1]
    model, batches = case.model(), case.batches()

    def class_token(name: str, shape: torch.Size) -> torch.Tensor:
        keep = torch.zeros(shape, dtype=torch.bool)
        keep[:, 0] = True
        return keep

    records = brute_force(
        copy.deepcopy(model).double(), list(select(model, "mlp")),
        [_double(batch) for batch in batches],
        lambda batch: class_token("", torch.Size((len(batch["labels"]), 5))), case.loss,
    )  # fmt: skip
    with curvfast.collect(model, rows=class_token) as curvature:
        for batch in batches:
            model(**batch).loss.backward()
    assert_equal_factors(curvature.factors(), records)
    factors = curvfast.collect_from(model, batches, labels="gold", rows=class_token, progress=False)
    assert_equal_factors(factors, records)


def test_a_layer_called_twice_counts_both_calls() -> None:
    from torch import nn

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mlp(torch.tanh(self.mlp(x)) + x)

    model, x = Twice(), torch.randn(20, 6)
    with curvfast.collect(model, loss_reduction="sum") as curvature:
        model(x).square().sum().backward()
    factors = curvature.factors()["mlp"]
    inner = model.mlp(x)
    second = torch.tanh(inner) + x
    inner.retain_grad()
    y = model.mlp(torch.tanh(inner) + x)
    y.retain_grad()
    y.square().sum().backward()
    a, g = torch.cat([x, second.detach()]).double(), torch.cat([inner.grad, y.grad]).double()
    assert factors.rows_a == factors.rows_g == 40
    torch.testing.assert_close(factors.a_sum.double(), a.T @ a, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(factors.g_sum.double(), g.T @ g, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(9, 6), (3, 3, 6)])
def test_a_last_layer_whose_output_is_a_view_is_counted(shape: tuple[int, ...]) -> None:
    """The labels' gradient is written over the logits, which a linear layer returns as a view."""
    from torch import nn

    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 5))
    x = torch.randn(shape)
    found = curvfast.collect_from(model, [x], "*", progress=False)
    assert {layer.rows_g for layer in found.values()} == {9}
    flat = curvfast.collect_from(model, [x.reshape(9, 6)], "*", progress=False)
    torch.testing.assert_close(found["2"].g_sum, flat["2"].g_sum)


def test_one_tensor_read_twice_by_one_layer_counts_twice() -> None:
    from torch import nn

    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mlp(x) * self.mlp(x)

    model, x = Same(), torch.randn(9, 4)
    with curvfast.collect(model, loss_reduction="sum") as curvature:
        model(x).sum().backward()
    factors = curvature.factors()["mlp"]
    assert factors.rows_a == factors.rows_g == 18
    torch.testing.assert_close(factors.a_sum, 2 * x.T @ x)


def test_keep_tokens_of_the_oracle_drops_one_position_a_sequence() -> None:
    batch = token_batches("both", (11,))[0]
    mask = batch["attention_mask"].bool()
    assert (mask.sum(1) - keep_tokens(batch).sum(1)).tolist() == [1, 1, 1, 1]
