"""Training rows of the lab's tasks, and its language model."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from curvfast.demo.caching import cached
from curvfast.demo.corpus import Corpus, load_corpus
from curvfast.demo.fitting import fit
from curvfast.demo.training import mixed_rows
from curvfast.hf.small import load, new_llama, save
from curvfast.lab.arithmetic import arithmetic
from curvfast.lab.facts import fact_tasks, table
from curvfast.lab.lm_recipe import LmRecipe
from curvfast.lab.logic import logic
from curvfast.lab.packing import Encoded, packed, restarting
from curvfast.lab.questions import Task
from curvfast.progress import Say, silent

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


def corpus_of(recipe: LmRecipe) -> Corpus:
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

    A row holds whole lessons, packed by :func:`curvfast.lab.packing.packed`. Positions restart with
    each, so that none attends to another.

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


def trained_lm(recipe: LmRecipe, corpus: Corpus, say: Say = silent) -> Any:
    """Return the recipe's model, trained now or read from the cache of an earlier run."""
    return cached(
        "lab-lm",
        recipe.training_key(),
        read=lambda folder: load(folder)[0].eval(),
        make=lambda unfinished: train_lm(recipe, corpus, unfinished=unfinished, say=say),
        write=lambda model, folder: save(model, corpus.tokenizer, folder),
    )


def train_lm(
    recipe: LmRecipe, corpus: Corpus, *, unfinished: Path | None = None, say: Say = silent
) -> Any:
    """Train from scratch; the same recipe gives the same model on one machine."""
    text = recipe.text
    model = new_llama(
        vocabulary=text.vocabulary, hidden=text.hidden, mlp=text.mlp, layers=text.layers,
        heads=text.heads, length=text.length, seed=text.seed, spread="width",
    )  # fmt: skip
    return fit(
        model,
        training_batches(recipe, corpus),
        steps=text.steps,
        learning_rate=text.learning_rate,
        weight_decay=0.1,
        unfinished=unfinished,
        say=say,
    )


def training_batches(recipe: LmRecipe, corpus: Corpus) -> Iterator[Batch]:
    """Yield a step's rows of prose, of passages and of lessons.

    Prose begins with an end-of-text token too; otherwise that token would mark all other rows.
    """
    text = recipe.text
    generator = torch.Generator().manual_seed(text.seed)
    taught = lesson_batches(
        corpus.tokenizer, tasks_of(recipe), rows=recipe.lesson_rows, length=text.length,
        seed=f"{text.seed} lessons",
    )  # fmt: skip
    for step in range(text.steps):
        tokens, labels = mixed_rows(text, corpus, step, generator)
        tokens[: text.prose_rows, 0] = 0
        rows = next(taught)
        yield {
            "input_ids": torch.cat([tokens, rows["input_ids"]]),
            "labels": torch.cat([labels, rows["labels"]]),
            "position_ids": torch.cat([restarting(tokens), rows["position_ids"]]),
            "use_cache": False,
        }
