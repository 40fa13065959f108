"""Trains the demo's small Llama on prose until it recites the passages planted in it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvfast.demo.corpus import Corpus
from curvfast.demo.fetch import cache_dir
from curvfast.demo.recipe import Recipe
from curvfast.hf.small import load, new_llama, save
from curvfast.progress import Bar
from curvfast.rows import IGNORED_LABEL

_WARM_UP = 0.05


def trained_model(recipe: Recipe, corpus: Corpus) -> Any:
    """Return the recipe's model, trained now or read from the cache of an earlier run."""
    folder = cache_dir() / "demo-lm" / recipe.training_key()
    if (folder / "config.json").is_file():
        return load(folder)[0].eval()
    model = train(recipe, corpus)
    partial = folder.with_name(f".partial-{folder.name}")
    save(model, corpus.tokenizer, partial)
    _settle(partial, folder)
    return model


def train(recipe: Recipe, corpus: Corpus) -> Any:
    """Train from scratch; the same recipe gives the same model on one machine."""
    model = new_llama(
        vocabulary=recipe.vocabulary, hidden=recipe.hidden, mlp=recipe.mlp, layers=recipe.layers,
        heads=recipe.heads, length=recipe.length, seed=recipe.seed,
    )  # fmt: skip
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _rate(i, recipe.steps))
    generator = torch.Generator().manual_seed(recipe.seed)
    with Bar("train", recipe.steps, "step") as bar:
        for step in range(recipe.steps):
            tokens, labels = _batch(recipe, corpus, step, generator)
            loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.advance(1, loss=f"{loss.item():.3f}")
    return model.eval()


def _rate(step: int, steps: int) -> float:
    warm_up = max(1, int(_WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _batch(
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


def _settle(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:
        # Another run finished the same model first: the two are the same.
        if not (folder / "config.json").is_file():
            raise
