"""Training rows of the lab's tasks, packed without attention between lessons."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from curvfast.errors import InputError
from curvfast.experiments.data.corpus import TokenizedCorpus, load_corpus
from curvfast.experiments.data.facts import fact_tasks, table
from curvfast.experiments.data.tasks import Task, arithmetic, logic
from curvfast.experiments.recipes import LmRecipe
from curvfast.model.rows import IGNORED_LABEL

Encoded = Sequence[Sequence[int]]
"""Tokens of a lesson's turns, alternating prompts and answers."""


def packed(encoded: Iterable[Encoded], length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pack whole lessons into rows, an end-of-text token before each and as padding.

    Args:
        encoded: Lessons, in order.
        length: Tokens in a row.

    Yields:
        Tokens and labels, int64 [length]; only answers have labels, since prompts are random. An
        incomplete last row is dropped.

    Raises:
        InputError: If a lesson is longer than a row.
    """
    tokens, labels, at = *_blank(length), 1
    for lesson in encoded:
        size = sum(map(len, lesson))
        if size >= length:
            raise InputError(
                f"a lesson of {size} tokens and the end-of-text token before it do not fit in a "
                f"row of {length}; pass a longer length"
            )
        if at + size > length:
            yield tokens, labels
            tokens, labels, at = *_blank(length), 1
        for number, turn in enumerate(lesson):
            here = slice(at, at + len(turn))
            tokens[here] = torch.tensor(turn)
            if number % 2:
                labels[here] = tokens[here]
            at += len(turn)
        at += 1


def restarting(tokens: Tensor) -> Tensor:
    """Return positions that restart at 0 with every end-of-text token, int64 [rows, length].

    transformers blocks attention across restarting positions, if it is called without a mask and
    without a cache.

    Args:
        tokens: int64 [rows, length]; end of text is 0.
    """
    place = torch.arange(tokens.shape[1]).expand_as(tokens)
    return place - torch.where(tokens == 0, place, 0).cummax(1).values


def _blank(length: int) -> tuple[Tensor, Tensor]:
    tokens = torch.zeros(length, dtype=torch.long)
    return tokens, torch.full_like(tokens, IGNORED_LABEL)


Batch = dict[str, Any]
"""Keyword arguments of the model."""


def tasks_of(recipe: LmRecipe) -> tuple[Task, ...]:
    """Return the tasks of a recipe, with its facts and its seeded held-out questions."""
    known = table(recipe.seed, recipe.people)
    return (*arithmetic(recipe.seed), *fact_tasks(known), *logic())


def lessons(tasks: Sequence[Task], rng: random.Random) -> Iterator[tuple[str, ...]]:
    """Yield endless lessons of all tasks, sampled by the tasks' weights."""
    weights = [task.weight for task in tasks]
    while True:
        yield rng.choices(tasks, weights)[0].learn(rng)


def corpus_of(recipe: LmRecipe) -> TokenizedCorpus:
    """Return prose, passages and a tokenizer that covers the words of the lessons.

    Args:
        recipe: Sizes and seed.

    Returns:
        The corpus; it holds no lesson.

    Raises:
        DownloadError: If the text cannot be had.
    """
    drawn = lessons(tasks_of(recipe), random.Random(f"{recipe.seed} words"))
    return load_corpus(recipe.text, ["".join(next(drawn)) for _ in range(recipe.tokenizer_lessons)])


def lesson_batches(
    tokenizer: Any, tasks: Sequence[Task], *, rows: int, length: int, seed: str
) -> Iterator[Batch]:
    """Yield endless batches of lessons.

    A row holds whole lessons, packed by :func:`curvfast.experiments.data.lessons.packed`. Positions
    restart with each, so that none attends to another.

    Args:
        tokenizer: The model's.
        tasks: The tasks to draw lessons from.
        rows: Rows in a batch.
        length: Tokens in a row.
        seed: Seed of the lessons.

    Yields:
        ``input_ids``, ``labels`` and ``position_ids``, int64 [rows, length].

    Raises:
        InputError: If a lesson is longer than a row.
    """
    drawn = lessons(tasks, random.Random(seed))
    ready = packed(_encoded(tokenizer, drawn, at_once=rows * 8), length)
    while True:
        tokens, labels = map(torch.stack, zip(*islice(ready, rows), strict=True))
        yield {"input_ids": tokens, "labels": labels, "position_ids": restarting(tokens)}


def _encoded(
    tokenizer: Any, drawn: Iterator[tuple[str, ...]], *, at_once: int
) -> Iterator[Encoded]:
    """Yield the tokens of each turn of each lesson, tokenized many lessons at a time."""
    while True:
        some = [next(drawn) for _ in range(at_once)]
        turns = [turn for lesson in some for turn in lesson]
        ids = iter(tokenizer(turns, add_special_tokens=False)["input_ids"])
        yield from ([next(ids) for _ in lesson] for lesson in some)
