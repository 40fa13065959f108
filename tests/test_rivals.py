"""Rivals: each does what its paper defines, to the weights it may change and to nothing else."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import VOCABULARY, gpt2, llama, token_batches
from families import mixture
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call
from torch.nn.functional import cross_entropy

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
from curvfast.baselines import subject as subjects
from curvfast.baselines.draws import balanced_steps, generators
from curvfast.baselines.examples import IGNORED_LABEL, collate, read_examples
from curvfast.baselines.masks import initial_scores, straight_through, without_smallest
from curvfast.baselines.npo import npo_loss
from curvfast.baselines.rival import begin
from curvfast.baselines.selections import random_selection
from curvfast.baselines.subject import choose
from curvfast.baselines.trial import Term, gradients, log_likelihoods, mean_loss
from curvfast.errors import InputError, LayerNotFound, NonFiniteError

MASKING = [
    BalancedSubnet(ratio=0.03, epochs=2, batch_size=3),
    Subnet(ratio=0.03, epochs=2, batch_size=3),
    Durable(ratio=0.03, batch_size=3),
]
MOVING = [
    GradientAscent(learning_rate=1e-3, epochs=2, batch_size=3),
    NPO(learning_rate=1e-3, epochs=2, batch_size=3),
]
GREEDY = Greedy(ratio=0.002, at_once=5, batch_size=3)
SUPERVISED = [*MASKING, *MOVING, GREEDY]
RANDOM = [r for r in SUPERVISED if not isinstance(r, Durable)]
Model = torch.nn.Module


def kind(rival: Any) -> str:
    return type(rival).__name__


def passages(count: int = 5) -> list[Passage]:
    """Passages of unequal lengths."""
    return [
        Passage(
            tuple(torch.randint(1, VOCABULARY, (4 + i,)).tolist()),
            tuple(torch.randint(1, VOCABULARY, (3 + i % 2,)).tolist()),
        )
        for i in range(count)
    ]


def state(model: Model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(model: Model, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def forget(rival: Any, model: Model, seed: int = 0, layers: Any = "mlp") -> Any:
    torch.manual_seed(5)
    return rival.forget(model, passages(), token_batches(), layers, seed=seed, progress=False)


# What a rival writes


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


# Definitions


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


def likelihoods(net: Model, examples: Any, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """log p of the scored tokens of each example, one by one, with weights in place of its own."""
    found = []
    for example in examples:
        out = functional_call(net, weights, kwargs={"input_ids": example.tokens[None]})
        logp = out.logits[0, :-1].log_softmax(-1)
        scored = (example.targets[1:] != IGNORED_LABEL).nonzero()[:, 0]
        found.append(sum(logp[i, example.targets[i + 1]] for i in scored.tolist()))
    return torch.stack(found)


def losses_of(net: Model, examples: Any, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    counts = torch.tensor([int((e.targets != IGNORED_LABEL).sum()) for e in examples])
    return -(likelihoods(net, examples, weights) / counts).mean()


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


# Reading and drawing


def test_all_forms_of_the_same_text_are_read_alike() -> None:
    ids = [[5, 6, 7, 8], [9, 10, 11, 12]]
    padded = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 0], [0, 9, 10, 11, 12]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]),
    }
    forms = [
        ids, torch.tensor(ids), [torch.tensor(ids)], [torch.tensor(row) for row in ids],
        [Passage((5, 6), (7, 8)), Passage((9,), (10, 11, 12))], padded, [padded],
        ({"input_ids": row} for row in ids),
    ]  # fmt: skip
    for form in forms:
        found = read_examples(form, "memorized")
        assert [e.tokens.tolist() for e in found] == ids
        assert [e.targets.tolist() for e in found] == [[IGNORED_LABEL, *row[1:]] for row in ids]


def test_a_suffix_is_scored_alone_and_labels_are_heeded() -> None:
    (example,) = read_examples(Passage((5, 6, 7), (8, 9)), "memorized", "suffix")
    assert example.targets.tolist() == [-100, -100, -100, 8, 9]
    labels = {"input_ids": [5, 6, 7, 8], "labels": [5, -100, 7, -100]}
    (example,) = read_examples(labels, "memorized")
    assert example.targets.tolist() == [-100, -100, 7, -100]


def test_padding_and_company_leave_a_rows_likelihood_alone() -> None:
    net = llama().double().eval()
    examples = read_examples(passages(6), "memorized", "suffix")
    task = begin(net, passages(6), None, "mlp", scored="suffix", balanced=False)
    together = collate(examples, torch.arange(6))
    found = log_likelihoods(task.subject, {}, together)
    alone = [
        log_likelihoods(task.subject, {}, collate(examples, torch.tensor([i]))) for i in range(6)
    ]
    torch.testing.assert_close(found, torch.cat(alone))
    torch.testing.assert_close(found, likelihoods(net, examples, {}))


def test_the_model_is_told_of_padding_where_there_is_some() -> None:
    net = llama()
    task = begin(net, [[5, 6, 7], [8, 9, 10, 11]], None, "mlp", scored="all", balanced=False)
    told: list[Any] = []
    net.register_forward_pre_hook(
        lambda _m, _a, kwargs: told.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    for rows in ([0, 1], [1], [0]):
        log_likelihoods(task.subject, {}, collate(task.memorized, torch.tensor(rows)))
    assert told[0].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert told[1:] == [None, None]


@pytest.mark.parametrize("model", [llama, gpt2, lambda: mixture("Mixtral", "eager")])
def test_trial_weights_count_as_if_they_were_written(model: Callable[[], Model]) -> None:
    net = model().double().eval()
    before = state(net)
    task = begin(net, passages(), None, "mlp", scored="all", balanced=False)
    batch = collate(task.memorized, torch.arange(5))
    own = log_likelihoods(task.subject, {}, batch)
    new = {n: w + 0.1 * torch.randn_like(w) for n, w in task.subject.weights().items()}
    tried = log_likelihoods(task.subject, new, batch)
    assert same(net, before)
    task.subject.commit(new)
    written = log_likelihoods(task.subject, {}, batch)
    torch.testing.assert_close(tried, written)
    assert (written - own).abs().min() > 1e-3
    # One layer alone, the others being the model's own.
    name = next(iter(new))
    one = {name: new[name] * 0}
    tried = log_likelihoods(task.subject, one, batch)
    task.subject.commit(one)
    torch.testing.assert_close(tried, log_likelihoods(task.subject, {}, batch))


def test_a_layer_that_is_never_called_does_no_harm() -> None:
    net = llama()
    net.model.layers[0].mlp.spare = torch.nn.Linear(20, 20)
    for rival in SUPERVISED:
        report = forget(rival, net)
        assert "model.layers.0.mlp.spare" in [layer.name for layer in report.layers]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_every_step_has_rows_of_both_sets_and_rounds_miss_none(
    memorized: int, clean: int, size: int
) -> None:
    rows = [[[7 + i, 8, 9] for i in range(count)] for count in (memorized, clean)]
    net = torch.nn.Sequential(torch.nn.Linear(2, 2))
    task = begin(net, rows[0], rows[1], "*", scored="all", balanced=True)
    steps = balanced_steps(task, size, 0, forget=-1, keep=1)
    seen: list[list[int]] = [[], []]
    for _ in range(2 * -(-max(memorized, clean) // size)):
        for place, term in enumerate(next(steps)):
            assert 1 <= len(term.batch.rows) <= size
            seen[place] += term.batch.rows.tolist()
    for place, count in enumerate((memorized, clean)):
        for start in (0, count):
            part = seen[place][start : start + count]
            assert (start and len(part) < count) or sorted(part) == list(range(count))


@pytest.mark.parametrize("rival", SUPERVISED, ids=kind)
def test_one_memorized_row_among_many_gives_no_nan(rival: Any) -> None:
    net = llama()
    many = torch.randint(1, VOCABULARY, (40, 6))
    report = rival.forget(net, passages(1), many, progress=False)
    assert all(torch.isfinite(p).all() for p in net.parameters())
    assert all(map(math.isfinite, [*report.memorized_loss, *report.clean_loss]))


# Nothing else changes


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


def random_pairs(net: Model) -> RandomPairs:
    basis = curvfast.collect_from(net, token_batches(sizes=(40, 41)), progress=False).eigh()
    return RandomPairs(basis, basis.keep(fraction=0.5))


# Refusals


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


# What it is for


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


# One interface, one report


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
    selection = random_selection(rival.basis, rival.like, 3)
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
