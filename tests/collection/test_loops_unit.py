"""The unit of G, in loops that people write: proven, told, or asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from loops import (
    BERT,
    Loop,
    Net,
    Step,
    assert_exact,
    counted,
    fit,
    labelled,
    measured,
    only,
    tokens,
)
from oracle import assert_equal_factors
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

import curvfast

pytestmark = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")

# ---- the unit of G --------------------------------------------------------------------------


def classes_second() -> Loop:
    return fit(Net(4, axis=1), cross_entropy, labelled((2, 5), (2, 9)))


def classes_second_of_pixels() -> Loop:
    def loss(y: Tensor, labels: Tensor, reduction: str) -> Tensor:
        return cross_entropy(y, labels, ignore_index=255, reduction=reduction)

    batches = labelled((2, 3, 5), (3, 4, 2))
    batches[0][1][0, :2] = 255
    return fit(Net(4, axis=1), loss, batches)


def an_ignored_label_of_its_own() -> Loop:
    def loss(y: Tensor, labels: Tensor, reduction: str) -> Tensor:
        return cross_entropy(y, labels, ignore_index=-1, reduction=reduction)

    batches = labelled((8,), (8,))
    batches[0][1][:4] = -1
    return fit(Net(4), loss, batches)


def accumulated_without_a_word() -> Loop:
    return fit(Net(4), cross_entropy, labelled((8,), (5,)), factor=1 / 8)


def summed_without_a_word() -> Loop:
    loop = fit(Net(4), cross_entropy, labelled((8,), (5,)))
    return Loop(loop.model, loop.layers, [Step(s.summed, s.summed) for s in loop.steps])


def probabilities_as_labels() -> Loop:
    class Soft(Net):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            y = super().forward(x)
            return y if labels is None else (cross_entropy(y, labels), y)

    model = Soft(5)
    x, p = torch.randn(8, 6), torch.randn(8, 5).softmax(-1)
    step = Step(lambda: model(x, labels=p)[0], lambda: cross_entropy(model(x), p, reduction="sum"))
    return Loop(model, ["up", "down"], [step])


@pytest.mark.parametrize(
    "make",
    [
        classes_second, classes_second_of_pixels, an_ignored_label_of_its_own,
        accumulated_without_a_word, summed_without_a_word, probabilities_as_labels,
    ],
)  # fmt: skip
def test_g_of_a_cross_entropy_is_of_the_summed_loss(make: Callable[[], Loop]) -> None:
    assert_exact(make())


def squeezed_outputs() -> Loop:
    batches = [(torch.randn(n, 6), torch.randint(0, 2, (n,)).float()) for n in (16, 4)]
    loop = fit(Net(1, squeeze=True), binary_cross_entropy_with_logits, batches)
    return replace(loop, layers=["up"])


def a_mean_over_elements() -> Loop:
    batches = [(torch.randn(n, 6), torch.randn(n, 3)) for n in (8, 5)]
    return fit(Net(3), mse_loss, batches)


def a_divergence_beside() -> Loop:
    """A cross-entropy and a tenth of a divergence: no cross-entropy any more."""

    def loss(y: Tensor, labels: Tensor, reduction: str) -> Tensor:
        uniform = (y.log_softmax(-1).exp() * y.log_softmax(-1)).sum(-1)
        total = cross_entropy(y, labels, reduction="none") + 0.1 * uniform
        return total.mean() if reduction == "mean" else total.sum()

    return fit(Net(4), loss, labelled((16,), (9,)))


def rows_of_unequal_weight() -> Loop:
    def loss(y: Tensor, labels: Tensor, reduction: str) -> Tensor:
        total = cross_entropy(y, labels, reduction="none")
        total = (1 - (-total).exp()) ** 2 * total
        return total.mean() if reduction == "mean" else total.sum()

    return fit(Net(4), loss, labelled((16,), (9,)))


UNPROVEN = [squeezed_outputs, a_mean_over_elements, a_divergence_beside, rows_of_unequal_weight]


@pytest.mark.parametrize("make", UNPROVEN)
def test_a_unit_that_nothing_proves_is_asked_for(make: Callable[[], Loop]) -> None:
    with pytest.raises(curvfast.CurvfastError, match="loss_reduction") as refused:
        measured(make())
    for way in ("loss_scale", "labels("):
        assert way in str(refused.value)


@pytest.mark.parametrize("make", UNPROVEN)
def test_a_unit_that_was_told_is_taken(make: Callable[[], Loop]) -> None:
    loop = make()
    records = counted(loop)
    ratios = [float(step.summed().detach() / step.loss().detach()) for step in loop.steps]
    loop.model.zero_grad()
    ahead = iter(ratios)
    factors = measured(loop, lambda curvature, _: curvature.labels(round(next(ahead))))
    assert_equal_factors(factors, records)
    summed = Loop(loop.model, loop.layers, [Step(s.summed, s.summed) for s in loop.steps])
    assert_equal_factors(measured(summed, loss_reduction="sum"), records)


# ---- the head's likelihood ------------------------------------------------------------------


def _bert(**facts: Any) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**BERT, **facts)).eval()


DENSE = "bert.encoder.layer.0.intermediate.dense"


@pytest.mark.parametrize(
    "facts",
    [
        {"num_labels": 1},
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        {"num_labels": 3, "problem_type": "regression"},
    ],
    ids=["one-output", "multi-label", "regression"],
)
def test_sampled_labels_are_of_the_heads_own_likelihood(facts: dict[str, Any]) -> None:
    """E[g gᵀ] is the sum over outputs of the Jacobian's rows, each times its variance."""
    model = _bert(**facts)
    with torch.no_grad():
        model.classifier.bias += 2  # where a softmax and Bernoullis have other variances
    ids, mask, _ = tokens()
    batch = {"input_ids": ids, "attention_mask": mask}
    factors = curvfast.collect_from(model, [batch] * 150, DENSE, progress=False)

    def part(row: int, output: int) -> Callable[[], Tensor]:
        def summed() -> Tensor:
            f = model(**batch).logits[row, output]
            p = f.detach().sigmoid()
            return f * (p * (1 - p)).sqrt() if "multi" in str(facts) else f

        return summed

    places = [(row, output) for row in range(3) for output in range(facts["num_labels"])]
    steps = [Step(part(*place), part(*place), only(mask.bool())) for place in places]
    exact = counted(Loop(model, [DENSE], steps))[DENSE].moments()[1].trace() * 150
    assert 0.75 < float(factors[DENSE].g_sum.trace() / exact) < 1.33


@pytest.mark.parametrize(
    ("facts", "labels", "summed"),
    [
        (
            {"num_labels": 1}, torch.tensor([0.3, -1.0, 2.0]),
            lambda f, y: 0.5 * (f.squeeze(-1) - y).square().sum(),
        ),
        (
            {"num_labels": 1}, torch.tensor([1, 4, 2]),
            lambda f, y: 0.5 * (f.squeeze(-1) - y).square().sum(),
        ),
        (
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 0]]),
            lambda f, y: binary_cross_entropy_with_logits(f, y, reduction="sum"),
        ),
    ],
    ids=["ratings", "whole-ratings", "multi-label"],
)  # fmt: skip
def test_gold_labels_are_scored_by_the_heads_own_likelihood(
    facts: dict[str, Any], labels: Tensor, summed: Callable[[Tensor, Tensor], Tensor]
) -> None:
    model = _bert(**facts)
    ids, mask, _ = tokens()
    call = {"input_ids": ids, "attention_mask": mask}
    factors = curvfast.collect_from(
        model, [{**call, "labels": labels}], DENSE, labels="gold", progress=False
    )
    step = Step(
        lambda: summed(model(**call).logits, labels),
        lambda: summed(model(**call).logits, labels),
        only(mask.bool()),
    )
    assert_equal_factors(factors, counted(Loop(model, [DENSE], [step])))


def test_classes_of_pixels_are_drawn_along_the_axis_that_holds_them() -> None:
    class Pixels(nn.Module):
        """Says how many classes it has, as transformers' models do; width is not that."""

        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 4)
            self.config = type("Config", (), {"num_labels": 4})()

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x).relu()).movedim(-1, 1)

    model = Pixels()
    x, y = torch.randn(2, 3, 5, 6), torch.randint(4, (2, 3, 5))
    factors = curvfast.collect_from(
        model, [{"x": x, "labels": y}], ["up", "down"], labels="gold", progress=False
    )

    def summed() -> Tensor:
        return cross_entropy(model(x), y, reduction="sum")

    records = counted(Loop(model, ["up", "down"], [Step(summed, summed)]))
    assert_equal_factors(factors, records)
