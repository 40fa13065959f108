"""Rows of text to learn tasks from, and the model that learns them beside prose and passages."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from curvfast.demo.caching import cached
from curvfast.demo.corpus import Corpus, load_corpus
from curvfast.demo.fitting import fit
from curvfast.demo.training import mixed_rows
from curvfast.errors import InputError
from curvfast.hf.small import load, new_llama, save
from curvfast.lab.arithmetic import arithmetic
from curvfast.lab.facts import fact_tasks, table
from curvfast.lab.lm_recipe import LmRecipe
from curvfast.lab.logic import logic
from curvfast.lab.questions import Task


def tasks_of(recipe: LmRecipe) -> tuple[Task, ...]:
    """Return the tasks of a recipe, with its facts and with what its seed keeps out of training."""
    known = table(recipe.seed, recipe.people)
    return (*arithmetic(recipe.seed), *fact_tasks(known), *logic())


def lessons(tasks: Sequence[Task], rng: random.Random) -> Iterator[str]:
    """Yield lessons of all tasks without end, each task as often as its weight says."""
    weights = [task.weight for task in tasks]
    while True:
        yield rng.choices(tasks, weights)[0].learn(rng)


def corpus_of(recipe: LmRecipe) -> Corpus:
    """Return prose, passages and a tokenizer that knows the words of the lessons.

    Args:
        recipe: Sizes and seed.

    Returns:
        The corpus; it holds no lesson.

    Raises:
        DownloadError: If the text cannot be had.
    """
    drawn = lessons(tasks_of(recipe), random.Random(f"{recipe.seed} words"))
    return load_corpus(recipe.text, [next(drawn) for _ in range(recipe.tokenizer_lessons)])


def lesson_rows(
    tokenizer: Any, tasks: Sequence[Task], *, rows: int, length: int, seed: str
) -> Iterator[Tensor]:
    """Yield batches [rows, length] of lessons without end, an end-of-text token before each.

    A row holds whole lessons and is filled up with end-of-text tokens.

    Args:
        tokenizer: The model's.
        tasks: What to draw lessons of.
        rows: Rows in a batch.
        length: Tokens in a row.
        seed: Seed of the lessons.

    Yields:
        Token ids, int64.

    Raises:
        InputError: If a lesson is longer than a row.
    """
    drawn = lessons(tasks, random.Random(seed))
    pending: list[list[int]] = []
    while True:
        batch = torch.zeros(rows, length, dtype=torch.long)
        for row in batch:
            at = 1
            while True:
                if not pending:
                    texts = [next(drawn) for _ in range(rows * 8)]
                    pending = tokenizer(texts, add_special_tokens=False)["input_ids"][::-1]
                if len(pending[-1]) >= length:
                    raise InputError(
                        f"a lesson of {len(pending[-1])} tokens and the end-of-text token before "
                        f"it do not fit in a row of {length}; pass a longer length"
                    )
                if at + len(pending[-1]) > length:
                    break
                ids = pending.pop()
                row[at : at + len(ids)] = torch.tensor(ids)
                at += len(ids) + 1
        yield batch


def trained_lm(recipe: LmRecipe, corpus: Corpus) -> Any:
    """Return the recipe's model, trained now or read from the cache of an earlier run."""
    return cached(
        "lab-lm",
        recipe.training_key(),
        read=lambda folder: load(folder)[0].eval(),
        make=lambda: train_lm(recipe, corpus),
        write=lambda model, folder: save(model, corpus.tokenizer, folder),
    )


def train_lm(recipe: LmRecipe, corpus: Corpus) -> Any:
    """Train from scratch; the same recipe gives the same model on one machine."""
    text = recipe.text
    model = new_llama(
        vocabulary=text.vocabulary, hidden=text.hidden, mlp=text.mlp, layers=text.layers,
        heads=text.heads, length=text.length, seed=text.seed,
    )  # fmt: skip
    return fit(
        model,
        training_batches(recipe, corpus),
        steps=text.steps,
        learning_rate=text.learning_rate,
        weight_decay=0.1,
    )


def training_batches(recipe: LmRecipe, corpus: Corpus) -> Iterator[dict[str, Any]]:
    """Yield a step's rows of prose, of passages and of lessons, every token a label."""
    text = recipe.text
    generator = torch.Generator().manual_seed(text.seed)
    taught = lesson_rows(
        corpus.tokenizer, tasks_of(recipe), rows=recipe.lesson_rows, length=text.length,
        seed=f"{text.seed} lessons",
    )  # fmt: skip
    for step in range(text.steps):
        tokens, labels = mixed_rows(text, corpus, step, generator)
        rows = next(taught)
        yield {
            "input_ids": torch.cat([tokens, rows]),
            "labels": torch.cat([labels, rows]),
            "use_cache": False,
        }
