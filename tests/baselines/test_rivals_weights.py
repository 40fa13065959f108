"""What each rival writes: the weights its paper names, and no others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import gpt2, llama, token_batches
from families import mixture
from rivals import (
    MASKING,
    MOVING,
    Model,
    begin,
    forget,
    kind,
    passages,
    same,
    state,
)
from torch.nn.functional import cross_entropy

from curvfast.baselines import (
    Durable,
    Greedy,
)
from curvfast.baselines.examples import collate, read_examples
from curvfast.baselines.training import Term, gradients, log_likelihoods, mean_loss


@pytest.mark.parametrize("rival", MASKING, ids=kind)
@pytest.mark.parametrize("model", [llama, gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exactly_the_share_is_dropped_and_every_other_weight_is_untouched(
    rival: Any, model: Callable[[], Model], dtype: torch.dtype
) -> None:
    net = model().to(dtype)
    before = state(net)
    report = forget(rival, net)
    chosen = {f"{layer.name}.weight" for layer in report.layers}
    assert len(chosen) > 3
    for name, after in net.named_parameters():
        assert after.dtype == dtype
        different = after != before[name]
        count = round(0.03 * after.numel()) if name in chosen else 0
        assert int(different.sum()) == count, name
        assert (after[different] == 0).all()


@pytest.mark.parametrize("rival", MOVING, ids=kind)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_layers_asked_for_move(rival: Any, dtype: torch.dtype) -> None:
    net = llama().to(dtype)
    before = state(net)
    forget(rival, net, layers=["*.1.mlp.*"])
    for name, after in net.named_parameters():
        assert after.dtype == dtype
        assert torch.equal(after, before[name]) != (".1.mlp." in name), name


def test_small_steps_are_not_lost_in_bfloat16() -> None:
    net = llama().bfloat16()
    before = state(net)
    # Each step alone is far below half a bfloat16 unit of most weights.
    forget(replace(MOVING[0], learning_rate=2e-5, epochs=25), net)
    name = "model.layers.0.mlp.up_proj.weight"
    moved = (dict(net.named_parameters())[name] != before[name]).float().mean()
    assert moved > 0.5


def test_experts_of_a_mixture_are_masked_one_by_one() -> None:
    net = mixture("Mixtral")
    before = state(net)
    report = forget(MASKING[0], net)
    experts = [layer for layer in report.layers if ".experts." in layer.name]
    assert len(experts) == 2 * 4 * 2
    for layer in experts:
        assert layer.changed * layer.weights == pytest.approx(round(0.03 * layer.weights))
    for name, after in net.named_parameters():
        assert torch.equal(after, before[name]) != (".experts." in name), name


def test_greedy_zeroes_what_promises_most_first() -> None:
    net = llama().double()
    text, clean = passages(3), token_batches()[:1]
    rival = Greedy(ratio=0.0005, at_once=1, clean_weight=0.75, batch_size=64)
    expected = copy.deepcopy(net)
    task = begin(expected, text, clean, "mlp", scored="all", balanced=True)
    mem, cln = (collate(rows, torch.arange(len(rows))) for rows in (task.memorized, task.clean))
    own = task.subject.weights()
    total = round(0.0005 * sum(w.numel() for w in own.values()))
    assert total > 2
    for _ in range(total):
        for p in expected.parameters():
            p.grad = None
        loss = sum(
            share * mean_loss(log_likelihoods(task.subject, {}, batch), batch)
            for share, batch in ((-0.25, mem), (0.75, cln))
        )
        loss.backward()
        layers = [layer.parameter for layer in task.subject.layers.values()]
        best = max(layers, key=lambda p: float((p * p.grad).detach().max()))
        with torch.no_grad():
            best.view(-1)[int((best * best.grad).argmax())] = 0
    rival.forget(net, text, clean, progress=False)
    assert same(net, state(expected))


def test_greedy_leaves_alone_what_would_not_help() -> None:
    net = llama().double()
    text, before = passages(), state(net)
    task = begin(net, text, None, "mlp", scored="all", balanced=False)
    batch = collate(task.memorized, torch.arange(5))
    weights = {name: weight.clone() for name, weight in task.subject.weights().items()}
    found, _ = gradients(task.subject, weights, [Term(batch, -1.0, mean_loss)])
    rival = Greedy(ratio=0.99, at_once=10**6, clean_weight=0, batch_size=5)
    rival.forget(net, text, progress=False)
    for name, weight in weights.items():
        after = dict(net.named_parameters())[f"{name}.weight"]
        helps = weight * found[name] > 0
        assert 0.3 < helps.double().mean() < 0.7
        assert torch.equal(after != before[f"{name}.weight"], helps)


def test_greedy_stops_at_its_share_however_many_go_at_once() -> None:
    net = llama()
    before = state(net)
    report = Greedy(ratio=0.002, at_once=7, batch_size=64).forget(
        net, passages(), token_batches(), progress=False
    )
    total = round(0.002 * sum(layer.weights for layer in report.layers))
    assert total % 7
    assert len(report.memorized_loss) == -(-total // 7)
    after = state(net)
    assert sum(int((after[n] != before[n]).sum()) for n in before) == total


def test_durable_zeroes_the_largest_gradients_of_the_mean_over_all_rows() -> None:
    net = llama().double()
    text = passages(7)
    examples = read_examples(text, "memorized")
    expected = copy.deepcopy(net)
    losses = []
    for example in examples:
        logits = expected(input_ids=example.tokens[None]).logits[0, :-1]
        losses.append(cross_entropy(logits, example.tokens[1:]))
    torch.stack(losses).mean().backward()
    report = Durable(ratio=0.1, batch_size=3).forget(net, text, progress=False)
    after = dict(net.named_parameters())
    for name, p in expected.named_parameters():
        if ".mlp." in name:
            count = round(0.1 * p.numel())
            largest = p.grad.abs().flatten().topk(count).indices
            assert set((after[name] == 0).flatten().nonzero()[:, 0].tolist()) == set(
                largest.tolist()
            )
    assert report.memorized_loss == pytest.approx([float(torch.stack(losses).detach().mean())])
