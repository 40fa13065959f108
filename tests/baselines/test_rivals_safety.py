"""A rival changes nothing but the weights it may, loses nothing, and refuses what is no input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import VOCABULARY, llama, token_batches
from rivals import (
    GREEDY,
    MASKING,
    MOVING,
    RANDOM,
    SUPERVISED,
    Model,
    forget,
    kind,
    passages,
    random_pairs,
    same,
    state,
)

from curvfast import Passage
from curvfast.baselines import (
    Durable,
    Subnet,
    TruncatedSVD,
)
from curvfast.baselines import baseline as subjects
from curvfast.baselines.baseline import choose
from curvfast.errors import InputError, LayerNotFound, NonFiniteError


@pytest.mark.parametrize("rival", RANDOM, ids=kind)
def test_a_seed_decides_every_bit(rival: Any) -> None:
    models = [llama() for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    # Rows come in an order of the seed where a step does not take them all.
    for model, seed in zip(models, (0, 0, 1), strict=True):
        forget(replace(rival, batch_size=2), model, seed)
    assert same(models[0], state(models[1]))
    assert not same(models[0], state(models[2]))


@pytest.mark.parametrize("rival", SUPERVISED, ids=kind)
def test_modes_gradients_and_the_global_generator_are_as_before(rival: Any) -> None:
    net = llama(attention_dropout=0.5)
    net.model.layers[1].eval()
    net.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    sum(p.sum() for p in net.parameters() if p.requires_grad).backward()
    facts = [
        lambda: [m.training for m in net.modules()],
        lambda: [p.requires_grad for p in net.parameters()],
        lambda: [None if p.grad is None else p.grad.clone() for p in net.parameters()],
        lambda: [id(m) for m in net.modules()],
        lambda: [id(p) for p in net.parameters()],
    ]
    before = [fact() for fact in facts]
    text, clean = passages(), token_batches()
    random = torch.get_rng_state()
    with torch.no_grad():
        rival.forget(net, text, clean, progress=False)
    assert torch.equal(torch.get_rng_state(), random)
    for fact, then in zip(facts, before, strict=True):
        now = fact()
        assert len(now) == len(then)
        for a, b in zip(now, then, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_dropout_is_off_while_a_rival_looks() -> None:
    models = [llama(attention_dropout=0.9), llama()]
    models[1].load_state_dict(models[0].state_dict())
    reports = [forget(MOVING[1], model.train()) for model in models]
    assert reports[0].memorized_loss == reports[1].memorized_loss


class Interrupted(BaseException):
    """Stands for the user's Ctrl-C."""


@pytest.mark.parametrize("rival", SUPERVISED, ids=kind)
@pytest.mark.parametrize("call", [1, 3])
def test_an_interrupt_while_it_learns_loses_nothing(rival: Any, call: int) -> None:
    net = llama()
    before, calls = state(net), 0

    def interrupt(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Interrupted

    handle = net.model.layers[2].register_forward_hook(interrupt)
    if isinstance(rival, Durable):
        rival = replace(rival, batch_size=1)
    with pytest.raises(Interrupted):
        forget(rival, net)
    handle.remove()
    assert same(net, before)
    assert all(p.requires_grad for p in net.parameters())
    assert all(m.training for m in net.modules())


@pytest.mark.parametrize(
    "rival",
    [*SUPERVISED, TruncatedSVD(0.5), "random"],
    ids=lambda r: r if r == "random" else kind(r),
)
def test_an_interrupt_between_two_writes_loses_nothing(
    rival: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = llama()
    if rival == "random":
        rival = random_pairs(net)
    before, reached = state(net), []

    def interrupt(name: str, old: torch.Tensor, new: torch.Tensor) -> None:
        reached.append(not torch.equal(old, new))
        raise Interrupted

    # Called once the weights are written, before the call returns.
    monkeypatch.setattr(subjects, "_change", interrupt)
    with pytest.raises(Interrupted):
        forget(rival, net)
    assert reached == [True]
    assert same(net, before)


@pytest.mark.parametrize("rival", SUPERVISED, ids=kind)
@pytest.mark.parametrize(
    ("memorized", "message"),
    [
        ([], "memorized= holds no sequence"),
        (None, "memorized= is None"),
        ([[5]], r"memorized\[0\] has no token to predict"),
        ([Passage((5, 6), (7,)), [[0.5, 1.5]]], r"memorized\[1\] is torch.float32"),
        (["text"], r"memorized\[0\] is a str"),
        ([{"tokens": [1, 2]}], r"memorized\[0\] is a NoneType"),
    ],
)
def test_text_that_is_none_is_refused(rival: Any, memorized: Any, message: str) -> None:
    net = llama()
    before = state(net)
    with pytest.raises(InputError, match=message):
        rival.forget(net, memorized, token_batches(), progress=False)
    assert same(net, before)


@pytest.mark.parametrize(
    ("rival", "changes"),
    [
        *[(r, {"ratio": v}) for r in (*MASKING, GREEDY) for v in (0, 1, -0.1, float("nan"))],
        *[(r, {"batch_size": 0}) for r in SUPERVISED],
        *[(r, {"scored": "prefix"}) for r in SUPERVISED],
        *[(r, {"clean_weight": v}) for r in (MASKING[0], GREEDY) for v in (-0.1, 1)],
        *[(r, {"epochs": 0}) for r in (*MASKING[:2], *MOVING)],
        *[(r, {"learning_rate": v}) for r in (*MASKING[:2], *MOVING) for v in (0, float("inf"))],
        *[(r, {"weight_decay": -1}) for r in (*MASKING[:2], *MOVING)],
        *[(r, {"retain": -1}) for r in MOVING],
        (MASKING[0], {"momentum": -1}),
        (MOVING[1], {"beta": 0}),
        (GREEDY, {"at_once": 0}),
        (TruncatedSVD(0.5), {"fraction": 0}),
    ],
)
def test_a_setting_out_of_range_is_refused_when_it_is_made(rival: Any, changes: Any) -> None:
    with pytest.raises(InputError, match=f"{next(iter(changes))}="):
        replace(rival, **changes)


@pytest.mark.parametrize("rival", SUPERVISED, ids=kind)
def test_layers_and_clean_text_must_be_there(rival: Any) -> None:
    net = llama()
    with pytest.raises(LayerNotFound, match="matches no linear layer"):
        forget(rival, net, layers="*.absent")
    if type(rival) not in (Subnet, Durable):
        with pytest.raises(InputError, match="clean= is None"):
            rival.forget(net, passages(), None, progress=False)


@pytest.mark.parametrize("rival", [*SUPERVISED, TruncatedSVD(0.5)], ids=kind)
def test_a_quantised_weight_is_refused_before_any_is_written(rival: Any) -> None:
    net = llama()
    last = net.model.layers[2].mlp.down_proj
    last.weight = torch.nn.Parameter(last.weight.detach().to(torch.int8), requires_grad=False)
    before = state(net)
    with pytest.raises(InputError, match="cannot be edited"):
        forget(rival, net)
    assert same(net, before)


def test_sharded_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subjects, "is_sharded_model", lambda model: True)
    with pytest.raises(InputError, match="sharded over processes"):
        forget(Durable(ratio=0.1), llama())


def test_a_wrapper_is_looked_through() -> None:
    net = llama()
    assert choose(torch.compile(net), "mlp").model is net


class Classifier(Model):
    """One prediction a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = torch.nn.Linear(4, VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.mlp(input_ids[:, :4].float())


def test_a_model_that_does_not_predict_every_token_is_refused() -> None:
    rows = torch.randint(1, VOCABULARY, (3, 6))
    with pytest.raises(InputError, match="pass a causal language model"):
        Durable(ratio=0.1).forget(Classifier(), rows, progress=False)


def test_a_ratio_that_is_no_weight_of_a_layer_is_refused() -> None:
    for rival in (*MASKING, GREEDY):
        with pytest.raises(InputError, match="is none"):
            forget(replace(rival, ratio=1e-7), llama())


@pytest.mark.parametrize("rival", MOVING, ids=kind)
def test_a_loss_that_explodes_ends_it_and_nothing_is_written(rival: Any) -> None:
    net = llama()
    before = state(net)
    with pytest.raises(NonFiniteError, match=r"at step 2 of 4.*lower the learning rate"):
        forget(replace(rival, learning_rate=1e30), net)
    assert same(net, before)


def test_weights_that_are_not_finite_are_not_written() -> None:
    net = llama()
    before, subject = state(net), choose(net, "mlp")
    new = {name: weight + 1 for name, weight in subject.weights().items()}
    new["model.layers.2.mlp.down_proj"][3, 4] = float("nan")
    with pytest.raises(NonFiniteError, match=r"'model.layers.2.mlp.down_proj'"):
        subject.commit(new)
    assert same(net, before)
