"""Memorization and perplexity: right on models whose answer is known, whatever the batching."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from cases import VOCABULARY, gpt2, llama
from torch import nn

import curvfast
from curvfast import Passage
from curvfast.errors import InputError
from curvfast.evals.choices import Choice, choice_accuracy
from curvfast.evals.generation import greedy
from curvfast.evals.memorization import memorization, score
from curvfast.evals.perplexity import perplexity


def teacher_forced(model, prefix, length):
    """Greedy continuation of one prompt, without padding, cache or generate()."""
    tokens = list(prefix)
    with torch.no_grad():
        for _ in range(length):
            tokens.append(int(model.eval()(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prefix) :]


def prompts(count: int = 7):
    return [torch.randint(1, VOCABULARY, (3 + 2 * i,)).tolist() for i in range(count)]


@pytest.mark.parametrize("model", [llama, gpt2])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_batches_of_unequal_prompts_continue_as_each_alone(model, batch_size: int) -> None:
    net = model()
    # Logits of a fresh model nearly tie; a sharper head makes rounding harmless.
    net.get_output_embeddings().weight.data.mul_(20)
    prefixes = prompts()
    expected = [teacher_forced(net, prefix, 6) for prefix in prefixes]
    assert greedy(net, prefixes, 6, batch_size=batch_size) == expected


def test_the_models_own_generation_settings_are_not_used() -> None:
    model = llama()
    model.get_output_embeddings().weight.data.mul_(20)
    prefix = prompts(1)
    plain = greedy(model, prefix, 8)
    model.generation_config.update(
        do_sample=True, temperature=9.0, repetition_penalty=5.0, eos_token_id=plain[0][1]
    )
    state = torch.get_rng_state()
    assert greedy(model, prefix, 8) == plain
    assert len(plain[0]) == 8
    assert torch.equal(torch.get_rng_state(), state)


def test_recited_passages_are_counted() -> None:
    model = llama()
    model.get_output_embeddings().weight.data.mul_(20)
    passages = [Passage(tuple(p), tuple(teacher_forced(model, p, 8))) for p in prompts(4)]
    flawed = Passage(passages[0].prefix, (*passages[0].suffix[:-1], passages[0].suffix[-1] ^ 1))
    wrong = Passage(passages[1].prefix, (VOCABULARY - 1, 0) * 4)
    scores = memorization(model, [*passages, flawed, wrong])
    assert scores.strict == 4 / 6
    assert scores.loose == 5 / 6
    assert scores.passages == 6


@pytest.mark.parametrize(
    ("found", "strict", "loose", "distance"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], 1, 1, 0),
        ([1, 2, 3, 4, 5, 6, 9, 9], 0, 1, 2 / 8),
        ([1, 2, 3, 4, 5, 9, 9, 9], 0, 0, 3 / 8),
        ([2, 3, 4, 5, 6, 7, 8, 9], 0, 1, 2 / 8),  # shifted by one: an insertion and a deletion
        ([9] * 8, 0, 0, 1),
    ],
)
def test_scores_by_hand(found, strict, loose, distance) -> None:
    scores = score([[1, 2, 3, 4, 5, 6, 7, 8]], [found])
    assert (scores.strict, scores.loose, scores.levenshtein) == (strict, loose, distance)


def test_forty_eight_tokens_allow_twelve_edits() -> None:
    truth = list(range(48))
    assert score([truth], [truth[:36] + [99] * 12]).loose == 1
    assert score([truth], [truth[:35] + [99] * 13]).loose == 0


def test_perplexity_is_weighted_by_tokens_not_batches() -> None:
    model = llama()
    long, short = torch.randint(1, VOCABULARY, (3, 20)), torch.randint(1, VOCABULARY, (1, 5))
    mask = torch.zeros(4, 20, dtype=torch.long)
    mask[:3], mask[3, :5] = 1, 1
    padded = torch.cat([long, nn.functional.pad(short, (0, 15))])
    together = perplexity(model, [{"input_ids": padded, "attention_mask": mask}])
    apart = perplexity(model, [long[:1], long[1:], short])
    losses = []
    with torch.no_grad():
        for row in [*long, *short]:
            logits = model(row[None]).logits[0, :-1].double()
            losses += nn.functional.cross_entropy(logits, row[1:], reduction="none").tolist()
    expected = math.exp(sum(losses) / len(losses))
    assert together == pytest.approx(expected, rel=1e-5)
    assert apart == pytest.approx(expected, rel=1e-5)


def test_a_uniform_model_has_the_vocabulary_for_perplexity() -> None:
    model = llama()
    model.get_output_embeddings().weight.data.zero_()
    found = perplexity(model, [torch.randint(1, VOCABULARY, (2, 9))])
    assert found == pytest.approx(VOCABULARY, rel=1e-5)


def test_evaluate_takes_what_is_asked_and_restores_the_mode() -> None:
    model = llama().train()
    text = [torch.randint(1, VOCABULARY, (2, 9))]
    passages = [Passage((1, 2, 3), (4, 5))]
    both = curvfast.evaluate(model, passages=passages, text=text)
    assert set(both.to_dict()) == {"strict", "loose", "levenshtein", "perplexity"}
    assert set(curvfast.evaluate(model, text=text).to_dict()) == {"perplexity"}
    assert "perplexity" in str(both)
    assert model.training


@pytest.mark.parametrize(
    "measure",
    [
        lambda model: perplexity(model, [torch.tensor([[1, 2, 3]])]),
        lambda model: greedy(model, [[1, 2, 3]], 2),
        lambda model: choice_accuracy(model, [Choice((1, 2), ((3,), (4,)))]),
        lambda model: perplexity(model, [torch.tensor([[1, VOCABULARY]])]),
    ],
    ids=["perplexity", "greedy", "choices", "failed"],
)
def test_a_part_set_to_eval_by_hand_stays_so(measure: Callable[[nn.Module], object]) -> None:
    model = gpt2().train()
    model.transformer.drop.eval()
    model.lm_head.requires_grad_(False)
    seen = []
    model.transformer.drop.register_forward_hook(lambda *_: seen.append(model.training))
    modes = {name: module.training for name, module in model.named_modules()}
    learnt = {name: p.requires_grad for name, p in model.named_parameters()}
    with suppress(IndexError):
        measure(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == learnt
    assert not any(seen)


def test_bad_requests_teach() -> None:
    model = llama()
    for call in (
        lambda: curvfast.evaluate(model),
        lambda: curvfast.evaluate(model, passages=[]),
        lambda: curvfast.evaluate(model, passages=[Passage((), (1,))]),
        lambda: curvfast.evaluate(model, text=[]),
        lambda: greedy(model, [[]], 3),
        lambda: greedy(nn.Linear(2, 2), [[1]], 3),
    ):
        with pytest.raises(InputError, match=r"need|token|generate"):
            call()


def test_a_perplexity_that_overflows_is_infinite() -> None:
    model = llama()
    model.get_output_embeddings().weight.data.mul_(1e6)
    assert perplexity(model, [torch.randint(1, VOCABULARY, (2, 9))]) == math.inf
