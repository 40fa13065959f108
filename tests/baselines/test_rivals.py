"""Rivals forget what they are for, behind one interface and with one report."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from cases import VOCABULARY, llama
from rivals import (
    SUPERVISED,
    Model,
    forget,
    kind,
    random_pairs,
    same,
    state,
)

import curvfast
from curvfast import Passage
from curvfast.baselines import (
    NPO,
    RIVALS,
    BalancedSubnet,
    Durable,
    GradientAscent,
    Greedy,
    RandomPairs,
    Subnet,
    TruncatedSVD,
)
from curvfast.baselines.baseline import choose
from curvfast.baselines.examples import collate, read_examples
from curvfast.baselines.training import log_likelihoods, mean_loss
from curvfast.errors import LayerNotFound


@pytest.fixture(scope="module")
def reciter() -> tuple[Model, list[Passage], torch.Tensor, torch.Tensor]:
    """A tiny model that recites a few passages, and knows a language of repeating pairs."""
    torch.manual_seed(0)
    net = llama(num_hidden_layers=2, hidden_size=32, intermediate_size=96)

    def language(rows: int) -> torch.Tensor:
        start = torch.randint(1, 30, (rows, 1))
        return (start + 7 * torch.arange(14)) % 29 + 1

    recited = torch.randint(30, VOCABULARY, (4, 14))
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    for _ in range(150):
        tokens = torch.cat([recited, language(12)])
        net(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    texts = [Passage(tuple(row[:4]), tuple(row[4:])) for row in recited.tolist()]
    return net.eval(), texts, language(24), language(24)


FORGETTING = [
    BalancedSubnet(ratio=0.2, clean_weight=0.5, learning_rate=3, epochs=30, batch_size=24),
    Subnet(ratio=0.2, learning_rate=1, epochs=30),
    Durable(ratio=0.5),
    GradientAscent(learning_rate=1e-3, epochs=25),
    NPO(learning_rate=2e-3, epochs=30),
    Greedy(ratio=0.02, at_once=10),
]


@pytest.mark.parametrize("rival", FORGETTING, ids=kind)
def test_memorized_text_suffers_more_than_ordinary_text(rival: Any, reciter: Any) -> None:
    net, texts, clean, held_out = reciter
    net = copy.deepcopy(net)
    sets = (read_examples(texts, "texts", "suffix"), read_examples(held_out, "held_out"))

    def losses() -> list[float]:
        subject = choose(net, "mlp")
        batches = [collate(examples, torch.arange(len(examples))) for examples in sets]
        with torch.no_grad():
            return [float(mean_loss(log_likelihoods(subject, {}, b), b)) for b in batches]

    before = losses()
    assert curvfast.evaluate(net, passages=texts).strict == 1
    rival.forget(net, texts, clean, progress=False)
    memorized, ordinary = (now - then for now, then in zip(losses(), before, strict=True))
    assert memorized > 0.1
    assert memorized > 10 * ordinary
    assert curvfast.evaluate(net, passages=texts).strict < 1


@pytest.mark.parametrize("rival", [*SUPERVISED, TruncatedSVD(0.5)], ids=kind)
def test_the_report_counts_what_changed_and_is_json(rival: Any) -> None:
    net = llama()
    # What was zero before is not counted as zeroed.
    net.model.layers[0].mlp.up_proj.weight.data[::2] = 0
    before = state(net)
    report = forget(rival, net)
    after = state(net)
    pairs = [(before[f"{c.name}.weight"], after[f"{c.name}.weight"]) for c in report.layers]
    changed = sum(int((a != b).sum()) for a, b in pairs)
    zeroed = sum(int(((a != b) & (b == 0)).sum()) for a, b in pairs)
    total = sum(a.numel() for a, _ in pairs)
    assert report.changed == pytest.approx(changed / total)
    assert report.zeroed == pytest.approx(zeroed / total)
    for layer, (a, b) in zip(report.layers, pairs, strict=True):
        assert layer.relative_change == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-5)
    told = json.loads(json.dumps(report.to_dict()))
    assert told["method"] == kind(rival)
    assert type(rival)(**told["settings"]) == rival
    assert report.layers[0].name in str(report)
    assert len(report.clean_loss) in (0, len(report.memorized_loss))


def test_every_rival_has_been_through_these_tests() -> None:
    assert {type(rival) for rival in (*SUPERVISED, TruncatedSVD(0.5))} | {RandomPairs} == {*RIVALS}


def test_losses_are_told_for_every_step() -> None:
    report = forget(BalancedSubnet(ratio=0.05, epochs=3, batch_size=4), llama())
    # The larger set, 12 rows, in 3 steps an epoch.
    assert len(report.memorized_loss) == len(report.clean_loss) == 9
    report = forget(NPO(epochs=3, batch_size=4), llama())
    assert len(report.memorized_loss) == 3 * 2
    assert report.memorized_loss[0] == pytest.approx(math.log(VOCABULARY), rel=0.1)


def test_projections_are_what_edit_makes_of_the_same_selection() -> None:
    net = llama()
    other = copy.deepcopy(net)
    rival = random_pairs(net)
    report = forget(rival, net, seed=3)
    selection = curvfast.select(other, rival.basis, "random", pairs=rival.like.pairs, seed=3)
    curvfast.edit(other, rival.basis, selection=selection)
    assert same(net, state(other))
    assert json.loads(json.dumps(report.to_dict()))["method"] == "RandomPairs"
    with pytest.raises(LayerNotFound, match="no layer of the basis"):
        forget(rival, net, layers="attention")
    forget(TruncatedSVD(0.5), net)
    for layer in choose(net, "mlp").layers.values():
        rank = int(torch.linalg.matrix_rank(layer.matrix().double(), rtol=1e-4))
        assert rank == round(0.5 * min(layer.d_in, layer.d_out))


def test_presets_are_those_of_the_papers() -> None:
    assert BalancedSubnet.kfac_paper() == BalancedSubnet(
        ratio=0.0015, clean_weight=0.7, learning_rate=0.3, momentum=0.9, weight_decay=5e-4, epochs=5
    )
    original = BalancedSubnet.original()
    assert (original.learning_rate, original.momentum, original.weight_decay) == (0.1, 0.9, 5e-4)
    assert (original.clean_weight, original.epochs, original.batch_size) == (0.05, 5, 32)
    npo = NPO()
    assert (npo.beta, npo.retain, npo.learning_rate) == (0.1, 1.0, 1e-5)
    assert (npo.weight_decay, npo.epochs, npo.batch_size) == (0.01, 10, 32)
    for method in (BalancedSubnet, Subnet, Durable, NPO):
        assert type(method.for_small_models()) is method
