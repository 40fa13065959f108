"""How rivals read text, draw rows of it, and try weights on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import VOCABULARY, gpt2, llama
from families import mixture
from hypothesis import given, settings
from hypothesis import strategies as st
from rivals import (
    SUPERVISED,
    Model,
    begin,
    forget,
    kind,
    likelihoods,
    passages,
    same,
    state,
)

from curvfast import Passage
from curvfast.baselines.examples import collate, read_examples
from curvfast.baselines.training import balanced_steps, generators, log_likelihoods
from curvfast.model.rows import IGNORED_LABEL


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


def test_clean_text_counts_in_full_whatever_counts_of_the_memorized() -> None:
    text = [Passage((5, 6, 7), (8, 9))]
    task = begin(llama(), text, text, "mlp", scored="suffix", balanced=True)
    assert task.memorized[0].targets.tolist() == [-100, -100, -100, 8, 9]
    assert task.clean[0].targets.tolist() == [-100, 6, 7, 8, 9]


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


def test_likelihoods_of_a_bfloat16_model_are_summed_in_float32() -> None:
    net = llama().bfloat16().eval()
    task = begin(net, passages(3), None, "mlp", scored="all", balanced=False)
    found = log_likelihoods(task.subject, {}, collate(task.memorized, torch.tensor([1])))
    tokens = task.memorized[1].tokens
    logp = net(input_ids=tokens[None]).logits[0, :-1].detach().double().log_softmax(-1)
    assert found.dtype == torch.float32
    assert float(found.detach()) == pytest.approx(
        float(logp.gather(1, tokens[1:, None]).sum()), rel=1e-6
    )


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


def test_what_one_generator_gives_does_not_depend_on_the_others() -> None:
    alone = [torch.rand(4, generator=generators(3)[i]) for i in range(3)]
    together = [torch.rand(4, generator=own) for own in generators(3)]
    for i in range(3):
        assert torch.equal(alone[i], together[i])
        assert not torch.equal(alone[i], alone[i - 1])


@pytest.mark.parametrize("rival", SUPERVISED, ids=kind)
def test_one_memorized_row_among_many_gives_no_nan(rival: Any) -> None:
    net = llama()
    many = torch.randint(1, VOCABULARY, (40, 6))
    report = rival.forget(net, passages(1), many, progress=False)
    assert all(torch.isfinite(p).all() for p in net.parameters())
    assert all(map(math.isfinite, [*report.memorized_loss, *report.clean_loss]))
