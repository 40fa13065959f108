"""Vision transformer of the lab: its training on wrong labels, and its predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.display import ReportStage, silent
from curvfast.experiments.data.images import (
    CLASSES,
    SIDE,
    Images,
    NoisySplit,
    fashion,
    mnist,
    noisy_split,
)
from curvfast.experiments.models.cache import cached
from curvfast.experiments.models.training import fit
from curvfast.experiments.recipes import VitRecipe
from curvfast.hf.vision import load_vit, new_vit, save_vit

PICTURES_AT_ONCE = 500


def split_of(recipe: VitRecipe, data: Path | None = None) -> NoisySplit:
    """Return the image split of a recipe, with its wrong labels.

    Args:
        recipe: Which pictures, how many, and their noise.
        data: Folder of Fashion-MNIST's files; None looks in the usual places.

    Returns:
        Sets that share no picture.

    Raises:
        DownloadError: If the pictures cannot be had.
        StorageError: If a file of pictures is damaged.
        InputError: If ``recipe`` asks for more pictures than there are.
    """
    first, second = fashion(data) if recipe.data == "fashion" else mnist()
    return noisy_split(
        first, second, train=recipe.train_images, fresh=recipe.fresh_images,
        validation=recipe.validation_images, noise=recipe.noise, seed=recipe.seed,
    )  # fmt: skip


def trained_vit(recipe: VitRecipe, split: NoisySplit, report_stage: ReportStage = silent) -> Any:
    """Return the recipe's model, trained now or read from the cache of an earlier run."""
    return cached(
        "lab-vit",
        recipe.training_key(),
        read=lambda folder: load_vit(folder).eval(),
        make=lambda unfinished: train_vit(
            recipe, split, unfinished=unfinished, report_stage=report_stage
        ),
        write=save_vit,
    )


def train_vit(recipe: VitRecipe, split: NoisySplit, **progress: Any) -> Any:
    """Train from scratch on the given labels; one recipe gives one model on one machine."""
    model = new_vit(
        image=SIDE, patch=recipe.patch, channels=1, classes=CLASSES, hidden=recipe.hidden,
        mlp=recipe.mlp, layers=recipe.layers, heads=recipe.heads, seed=recipe.seed,
    )  # fmt: skip
    return learn(model, recipe, split, **progress)


def learn(model: Any, recipe: VitRecipe, split: NoisySplit, **progress: Any) -> Any:
    """Train a classifier in place on the given labels, every picture once an epoch.

    Args:
        model: Takes ``pixel_values`` and ``labels``, returns an output with ``loss``.
        recipe: Schedule and seed.
        split: Lends pictures and labels.
        progress: ``unfinished`` and ``report_stage``, as in
            :func:`curvfast.experiments.models.training.fit`.

    Returns:
        The model, in eval mode.
    """
    count = len(split.train)
    generator = torch.Generator().manual_seed(recipe.seed)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(recipe.epochs)])
    batches = order.split(recipe.batch)
    return fit(
        model,
        ({"pixel_values": split.train.pixels[i], "labels": split.given[i]} for i in batches),
        steps=len(batches),
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        betas=recipe.betas,
        **progress,
    )


@torch.no_grad()
def classify(model: nn.Module, images: Images) -> Tensor:
    """Return the likeliest class of each picture, int64 [images]."""
    parts = images.pixels.split(PICTURES_AT_ONCE)
    return torch.cat([model(pixel_values=part).logits.argmax(-1) for part in parts])


def accuracies(model: nn.Module, split: NoisySplit) -> dict[str, float]:
    """Return the four shares of :func:`run` for a model in eval mode."""
    found = classify(model, split.train)
    truth, noisy = split.train.labels, split.noisy
    validation = classify(model, split.validation) == split.validation.labels
    return {
        "memorized": _share((found == split.given)[noisy]),
        "ground_truth": _share((found == truth)[noisy]),
        "validation": _share(validation),
        "clean": _share((found == truth)[~noisy]),
    }


def _share(right: Tensor) -> float:
    return float(right.double().mean())
