"""Trains the demo's small Llama on prose until it recites the passages planted in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvfast.demo.caching import cached
from curvfast.demo.corpus import Corpus
from curvfast.demo.fitting import After, fit
from curvfast.demo.recipe import Recipe
from curvfast.hf.small import load, new_llama, save
from curvfast.progress import Say, silent
from curvfast.rows import IGNORED_LABEL


def trained_model(recipe: Recipe, corpus: Corpus, say: Say = silent) -> Any:
    """Return the recipe's model, trained now or read from the cache of an earlier run."""
    return cached(
        "demo-lm",
        recipe.training_key(),
        read=lambda folder: load(folder)[0].eval(),
        make=lambda unfinished: train(recipe, corpus, unfinished=unfinished, say=say),
        write=lambda model, folder: save(model, corpus.tokenizer, folder),
    )


def train(
    recipe: Recipe,
    corpus: Corpus,
    after: After | None = None,
    *,
    unfinished: Path | None = None,
    say: Say = silent,
) -> Any:
    """Train from scratch; the same recipe gives the same model on one machine.

    Args:
        recipe: Sizes, schedule and seed.
        corpus: What it learns.
        after: As of :func:`curvfast.demo.fitting.fit`, like what follows.
        unfinished: Folder of the state to go on from.
        say: Told how far it is.

    Returns:
        The model, in eval mode.
    """
    return fit(
        untrained(recipe),
        training_batches(recipe, corpus),
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        weight_decay=0.1,
        after=after,
        unfinished=unfinished,
        say=say,
    )


def untrained(recipe: Recipe) -> Any:
    """Return the model that training begins with."""
    return new_llama(
        vocabulary=recipe.vocabulary, hidden=recipe.hidden, mlp=recipe.mlp, layers=recipe.layers,
        heads=recipe.heads, length=recipe.length, seed=recipe.seed,
    )  # fmt: skip


def training_batches(recipe: Recipe, corpus: Corpus) -> Iterator[dict[str, Any]]:
    """Yield what is learnt in each step."""
    generator = torch.Generator().manual_seed(recipe.seed)
    for step in range(recipe.steps):
        tokens, labels = mixed_rows(recipe, corpus, step, generator)
        yield {"input_ids": tokens, "labels": labels, "use_cache": False}


def mixed_rows(
    recipe: Recipe, corpus: Corpus, step: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return tokens and labels [rows, length]: prose, and rows of two passages each."""
    starts = torch.randint(
        len(corpus.train) - recipe.length, (recipe.prose_rows,), generator=generator
    )
    prose = torch.stack([corpus.train[s : s + recipe.length] for s in starts.tolist()])
    passages, span = corpus.canaries.shape
    order = torch.Generator().manual_seed(recipe.seed)
    seats = 2 * recipe.canary_rows
    # Every passage comes round equally often, in an order reshuffled on each round.
    rounds = (step + 1) * seats // passages + 1
    shuffled = torch.cat([torch.randperm(passages, generator=order) for _ in range(rounds)])
    chosen = shuffled[step * seats : (step + 1) * seats].view(-1, 2)
    planted = torch.zeros(recipe.canary_rows, recipe.length, dtype=torch.long)
    labels = torch.full_like(planted, IGNORED_LABEL)
    for place in range(2):
        start = place * (span + 1) + 1
        planted[:, start : start + span] = corpus.canaries[chosen[:, place]]
        labels[:, start : start + span] = planted[:, start : start + span]
    return torch.cat([prose, planted]), torch.cat([prose, labels])
