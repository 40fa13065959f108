"""The losses, masks and steps of rivals are those of their papers' equations."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from cases import llama, token_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from rivals import (
    Model,
    begin,
    forget,
    likelihoods,
    losses_of,
    passages,
    same,
    state,
)
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from curvfast.baselines import (
    NPO,
    BalancedSubnet,
    GradientAscent,
    Subnet,
)
from curvfast.baselines.baseline import choose
from curvfast.baselines.examples import collate, read_examples
from curvfast.baselines.npo import npo_loss
from curvfast.baselines.parametrizations import initial_scores, straight_through, without_smallest
from curvfast.baselines.training import (
    Term,
    balanced_steps,
    generators,
    gradients,
    log_likelihoods,
    mean_loss,
)
from curvfast.model.rows import IGNORED_LABEL


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_scores_get_the_gradient_of_a_mask_that_is_their_size(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = torch.Size((5, 7))
    scores = initial_scores(shape, 7, generator).double().requires_grad_()
    weight, x = (torch.randn(s, generator=generator).double() for s in (shape, (3, 7)))
    count = seed % 35
    dropped = without_smallest(torch.ones_like(weight), scores.detach().abs(), count)
    assert int((dropped == 0).sum()) == count
    # Forwards the mask, backwards |s|.
    mask = dropped + scores.abs() - scores.detach().abs()
    (x @ (weight * mask).T).tanh().sum().backward()
    masked = (weight * dropped).requires_grad_()
    (x @ masked.T).tanh().sum().backward()
    found = straight_through(masked.grad, weight, scores.detach())
    torch.testing.assert_close(found, scores.grad, rtol=1e-12, atol=1e-12)


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 6), st.data())
@settings(max_examples=20, deadline=None)
def test_what_is_dropped_are_the_smallest_whatever_the_signs(
    seed: int, rows: int, columns: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(0, 4, (rows, columns), generator=generator).float()
    weight = torch.randn(rows, columns, generator=generator)
    count = data.draw(st.integers(0, rows * columns))
    new = without_smallest(weight, keys, count)
    gone = new == 0
    assert int(gone.sum()) == count
    assert torch.equal(new[~gone], weight[~gone])
    if 0 < count < rows * columns:
        assert keys[gone].max() <= keys[~gone].min()


def test_scores_start_uniform_within_one_over_the_root_of_the_inputs() -> None:
    scores = initial_scores(torch.Size((64, 100)), 100, torch.Generator().manual_seed(0))
    assert scores.abs().max() <= 0.1
    assert scores.std() == pytest.approx(0.1 / math.sqrt(3), rel=0.05)
    assert scores.mean().abs() < 0.005


@given(st.integers(0, 10**6), st.floats(0.01, 5), st.floats(0, 30))
@settings(max_examples=50, deadline=None)
def test_the_npo_loss_is_its_equation(seed: int, beta: float, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    found, reference = (
        -spread * torch.rand(6, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    direct = 0.0
    for now, then in zip(found.tolist(), reference.tolist(), strict=True):
        ratio = math.exp(now - then)
        direct += -2 / beta * math.log(1 / (1 + ratio**beta)) / 6
    assert float(npo_loss(found, reference, beta)) == pytest.approx(direct, rel=1e-9)


def test_npo_tends_to_gradient_ascent_as_beta_vanishes() -> None:
    net = llama().double()
    task = begin(net, passages(), None, "mlp", scored="suffix", balanced=False)
    batch = collate(task.memorized, torch.arange(5))
    # Away from the reference, where every β > 0 differs from ascent.
    reference = log_likelihoods(task.subject, {}, batch).detach() + torch.linspace(-3, 3, 5)

    def gradient(objective: Any) -> torch.Tensor:
        found, _ = gradients(task.subject, task.subject.weights(), [Term(batch, 1.0, objective)])
        return torch.cat([g.flatten() for g in found.values()])

    ascent = gradient(lambda found, _: found.mean())
    distances = [
        float((gradient(lambda found, _, b=b: npo_loss(found, reference, b)) - ascent).norm())
        for b in (1.0, 0.1, 0.01)
    ]
    assert distances[0] > 0.1 * float(ascent.norm())
    # First order in β.
    assert distances[1] < 0.2 * distances[0]
    assert distances[2] == pytest.approx(0.1 * distances[1], rel=0.05)


@pytest.mark.parametrize("scored", ["all", "suffix"])
def test_balanced_subnet_is_its_algorithm(scored: str) -> None:
    net = llama(num_hidden_layers=1).double()
    text, clean = passages(4), token_batches(sizes=(8,))
    rival = BalancedSubnet(
        ratio=0.1, clean_weight=0.3, learning_rate=20, momentum=0.8, weight_decay=0.01, epochs=4,
        scored=scored,
    )  # fmt: skip
    subject = choose(copy.deepcopy(net), "mlp")
    frozen = {f"{name}.weight": w for name, w in subject.weights().items()}
    generator, *_ = generators(7)
    scores = {
        name: initial_scores(w.shape, w.shape[1], generator).double().requires_grad_()
        for name, w in frozen.items()
    }
    optimizer = torch.optim.SGD(scores.values(), lr=20, momentum=0.8, weight_decay=0.01)
    mem, cln = read_examples(text, "memorized", scored), read_examples(clean, "clean")

    def masked() -> dict[str, torch.Tensor]:
        made = {}
        for name, w in frozen.items():
            size = scores[name].abs()
            mask = (size > size.flatten().kthvalue(round(0.1 * w.numel())).values).double()
            made[name] = w * (mask + size - size.detach())
        return made

    first = masked()
    for _ in range(4):
        optimizer.zero_grad()
        weights = masked()
        loss = -0.7 * losses_of(net, mem, weights) + 0.3 * losses_of(net, cln, weights)
        loss.backward()
        optimizer.step()
    rival.forget(net, text, clean, seed=7, progress=False)
    after = dict(net.named_parameters())
    assert any(((after[n] == 0) != (w == 0)).any() for n, w in first.items())
    for name, weight in masked().items():
        assert torch.equal(after[name] == 0, weight == 0)


@pytest.mark.parametrize("scored", ["all", "suffix"])
@pytest.mark.parametrize("method", [GradientAscent, NPO])
def test_fine_tuning_follows_its_loss(method: Any, scored: str) -> None:
    net = llama(num_hidden_layers=1).double()
    text, clean = passages(4), token_batches(sizes=(8,))
    rival = method(retain=0.4, learning_rate=2e-3, weight_decay=0.1, epochs=4, scored=scored)
    subject = choose(copy.deepcopy(net), "mlp")
    moved = {f"{n}.weight": w.clone().requires_grad_() for n, w in subject.weights().items()}
    optimizer = torch.optim.AdamW(moved.values(), lr=2e-3, weight_decay=0.1)
    mem, cln = read_examples(text, "memorized", scored), read_examples(clean, "clean")
    reference = likelihoods(net, mem, {}).detach()
    for _ in range(4):
        optimizer.zero_grad()
        if method is GradientAscent:
            forget_loss = -losses_of(net, mem, moved)
        else:
            ratio = (likelihoods(net, mem, moved) - reference).exp()
            forget_loss = 2 / 0.1 * (1 + ratio**0.1).log().mean()
        (forget_loss + 0.4 * losses_of(net, cln, moved)).backward()
        optimizer.step()
    report = rival.forget(net, text, clean, seed=7, progress=False)
    assert report.memorized_loss[0] == pytest.approx(losses_of(subject.model, mem, {}).item())
    for name, weight in moved.items():
        after = dict(net.named_parameters())[name].detach()
        torch.testing.assert_close(after, weight.detach(), rtol=1e-7, atol=1e-9)


def test_without_balance_balanced_subnet_is_subnet() -> None:
    models = [llama() for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    forget(BalancedSubnet(ratio=0.05, clean_weight=0, epochs=3, batch_size=2), models[0])
    forget(Subnet(ratio=0.05, epochs=3, batch_size=2), models[1])
    forget(BalancedSubnet(ratio=0.05, clean_weight=0.5, epochs=3, batch_size=2), models[2])
    assert same(models[0], state(models[1]))
    assert not same(models[0], state(models[2]))


def test_the_loss_of_a_step_is_the_balanced_one() -> None:
    net = llama().double()
    task = begin(net, passages(), token_batches(), "mlp", scored="all", balanced=True)
    terms = next(balanced_steps(task, 100, 0, forget=-0.3, keep=0.7))
    found, losses = gradients(task.subject, task.subject.weights(), terms)

    def mean(examples: Any) -> torch.Tensor:
        return torch.stack(
            [
                cross_entropy(
                    net(input_ids=e.tokens[None]).logits[0, :-1],
                    e.targets[1:],
                    ignore_index=IGNORED_LABEL,
                )
                for e in examples
            ]
        ).mean()

    memorized, clean = mean(task.memorized), mean(task.clean)
    (-0.3 * memorized + 0.7 * clean).backward()
    assert losses == pytest.approx([memorized.item(), clean.item()])
    for name, gradient in found.items():
        expected = dict(net.named_parameters())[f"{name}.weight"].grad
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


class Recomputed(Model):
    """A layer that computes its forward again in the backward, whatever its mode."""

    def __init__(self, layer: Model) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)


def test_a_region_computed_again_in_the_backward_meets_the_weights_on_trial() -> None:
    models = [llama().double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for block in models[1].model.layers:
        block.mlp = Recomputed(block.mlp)
    found, text = [], passages()
    for net in models:
        task = begin(net, text, None, "mlp", scored="all", balanced=False)
        batch = collate(task.memorized, torch.arange(5))
        trial = {name: 3 * weight for name, weight in task.subject.weights().items()}
        found.append(gradients(task.subject, trial, [Term(batch, 1.0, mean_loss)])[0])
    assert len(found[0]) == len(found[1]) == 9
    for plain, again in zip(found[0].values(), found[1].values(), strict=True):
        torch.testing.assert_close(plain, again)
