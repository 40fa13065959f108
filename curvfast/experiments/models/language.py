"""Language models of the demo and the lab: their training, and snapshots during it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvfast.display import ReportStage, silent
from curvfast.errors import InputError
from curvfast.experiments.data.corpus import TokenizedCorpus
from curvfast.experiments.data.lessons import Batch, lesson_batches, restarting, tasks_of
from curvfast.experiments.models.cache import cached
from curvfast.experiments.models.training import After, fit
from curvfast.experiments.recipes import LmRecipe, Recipe, key_of
from curvfast.hf.small import load, new_llama, save
from curvfast.model.rows import IGNORED_LABEL
from curvfast.storage import read_folder, write_folder


def trained_model(
    recipe: Recipe, corpus: TokenizedCorpus, report_stage: ReportStage = silent
) -> Any:
    """Return the recipe's model, trained now or read from the cache of an earlier run."""
    return cached(
        "demo-lm",
        recipe.training_key(),
        read=lambda folder: load(folder)[0].eval(),
        make=lambda unfinished: train(
            recipe, corpus, unfinished=unfinished, report_stage=report_stage
        ),
        write=lambda model, folder: save(model, corpus.tokenizer, folder),
    )


def train(
    recipe: Recipe,
    corpus: TokenizedCorpus,
    after: After | None = None,
    *,
    unfinished: Path | None = None,
    report_stage: ReportStage = silent,
) -> Any:
    """Train from scratch; the same recipe gives the same model on one machine.

    Args:
        recipe: Sizes, schedule and seed.
        corpus: What it learns.
        after: As of :func:`curvfast.experiments.models.training.fit`, like what follows.
        unfinished: Folder of the state to go on from.
        report_stage: Told how far it is.

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
        report_stage=report_stage,
    )


def untrained(recipe: Recipe) -> Any:
    """Return the model that training begins with."""
    return new_llama(
        vocabulary=recipe.vocabulary, hidden=recipe.hidden, mlp=recipe.mlp, layers=recipe.layers,
        heads=recipe.heads, length=recipe.length, seed=recipe.seed,
    )  # fmt: skip


def training_batches(recipe: Recipe, corpus: TokenizedCorpus) -> Iterator[dict[str, Any]]:
    """Yield the training batch of each step."""
    generator = torch.Generator().manual_seed(recipe.seed)
    for step in range(recipe.steps):
        tokens, labels = mixed_rows(recipe, corpus, step, generator)
        yield {"input_ids": tokens, "labels": labels, "use_cache": False}


def mixed_rows(
    recipe: Recipe, corpus: TokenizedCorpus, step: int, generator: torch.Generator
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


Weights = dict[str, Tensor]
"""Parameters by name, on the CPU."""
KIND = "curvfast-snapshots"


def snapshots(
    recipe: Recipe,
    corpus: TokenizedCorpus,
    steps: Sequence[int],
    report_stage: ReportStage = silent,
) -> dict[int, Weights]:
    """Return the weights after each of ``steps`` optimizer steps, trained now or kept earlier.

    It is the training of :func:`curvfast.experiments.models.language.train`: the final weights are,
    bit for bit, those of the demo's model.

    Args:
        recipe: Sizes, schedule and seed.
        corpus: What it learns.
        steps: Each from 0, the untrained model, to ``recipe.steps``.
        report_stage: Told how far it is.

    Returns:
        Weights by step, in rising order.

    Raises:
        InputError: If a step is not in that range, or there is none.
        StorageError: If what was kept is damaged.
    """
    wanted = sorted({*steps})
    if not wanted or wanted[0] < 0 or wanted[-1] > recipe.steps:
        raise InputError(f"steps={list(steps)}: pass some, each from 0 to {recipe.steps}")
    return cached(
        "demo-lm-steps",
        key_of({"training": recipe.training_key(), "steps": wanted}),
        read=_read,
        make=lambda unfinished: _train(recipe, corpus, wanted, unfinished, report_stage),
        write=_write,
    )


def restored(recipe: Recipe, weights: Mapping[str, Tensor]) -> Any:
    """Return a model of the recipe with these weights, in eval mode."""
    model = untrained(recipe).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model


def _train(
    recipe: Recipe,
    corpus: TokenizedCorpus,
    steps: Sequence[int],
    unfinished: Path,
    report_stage: ReportStage,
) -> dict[int, Weights]:
    def keep(model: Any, taken: int) -> None:
        # On disk, where a training that goes on finds the snapshots from before it was cut off.
        if taken in steps:
            _write({taken: dict(model.named_parameters())}, unfinished / f"step-{taken}")

    train(recipe, corpus, keep, unfinished=unfinished, report_stage=report_stage)
    return {step: _read(unfinished / f"step-{step}")[step] for step in steps}


def _write(found: Mapping[int, Weights], folder: Path) -> None:
    tensors = {
        f"{step}.{name}": tensor
        for step, weights in found.items()
        for name, tensor in weights.items()
    }
    write_folder(folder, kind=KIND, meta={"steps": list(found)}, tensors=tensors)


def _read(folder: Path) -> dict[int, Weights]:
    meta, tensors = read_folder(folder, kind=KIND)
    found: dict[int, Weights] = {step: {} for step in meta["steps"]}
    for key, tensor in tensors.items():
        step, name = key.split(".", 1)
        found[int(step)][name] = tensor
    return found


def trained_lm(
    recipe: LmRecipe, corpus: TokenizedCorpus, report_stage: ReportStage = silent
) -> Any:
    """Return the recipe's model, trained now or read from the cache of an earlier run."""
    return cached(
        "lab-lm",
        recipe.training_key(),
        read=lambda folder: load(folder)[0].eval(),
        make=lambda unfinished: train_lm(
            recipe, corpus, unfinished=unfinished, report_stage=report_stage
        ),
        write=lambda model, folder: save(model, corpus.tokenizer, folder),
    )


def train_lm(
    recipe: LmRecipe,
    corpus: TokenizedCorpus,
    *,
    unfinished: Path | None = None,
    report_stage: ReportStage = silent,
) -> Any:
    """Train from scratch; the same recipe gives the same model on one machine."""
    text = recipe.text
    model = new_llama(
        vocabulary=text.vocabulary, hidden=text.hidden, mlp=text.mlp, layers=text.layers,
        heads=text.heads, length=text.length, seed=text.seed, spread="width",
    )  # fmt: skip
    return fit(
        model,
        mixed_lesson_batches(recipe, corpus),
        steps=text.steps,
        learning_rate=text.learning_rate,
        weight_decay=0.1,
        unfinished=unfinished,
        report_stage=report_stage,
    )


def mixed_lesson_batches(recipe: LmRecipe, corpus: TokenizedCorpus) -> Iterator[Batch]:
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
