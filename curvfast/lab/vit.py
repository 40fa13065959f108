"""The lab's experiment on images: edits of a vision transformer that memorized wrong labels."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.baselines.svd import svd_basis
from curvfast.core.eigenbasis import Eigenbasis
from curvfast.demo.caching import cached
from curvfast.demo.comparison import METHODS, compare
from curvfast.demo.fitting import fit
from curvfast.demo.keeping import keep_curvature
from curvfast.driver import collect_from
from curvfast.editing import edited
from curvfast.errors import InputError, NumericalWarning
from curvfast.hf.vision import load_vit, new_vit, save_vit
from curvfast.lab.blocks import mlp_of, only, require_blocks
from curvfast.lab.images import CLASSES, SIDE, Images, fashion, mnist
from curvfast.lab.noise import NoisySplit, noisy_split
from curvfast.lab.vit_recipe import Statistics, VitRecipe
from curvfast.layers import LayerSpec
from curvfast.progress import Say, silent, track
from curvfast.provenance import versions
from curvfast.report.lab import noise_study
from curvfast.storage import write_json

SCHEMA_VERSION = 1
_AT_ONCE = 500


def run(
    recipe: VitRecipe, out: Path | None, say: Say, *, data: Path | None = None, command: str = ""
) -> dict[str, Any]:
    """Train (or load) on wrong labels, measure curvature in several ways, edit, and measure again.

    Args:
        recipe: What to run.
        out: Folder for results.json, the picture, and what a report shows besides; None writes
            nothing.
        say: Called with one line before each stage.
        data: Folder of Fashion-MNIST's files; None looks in the usual places.
        command: What makes these results, kept with them.

    Returns:
        What results.json holds. Figures are shares of pictures: ``memorized`` (wrongly labelled
        training pictures classified as labelled), ``ground_truth`` (the same pictures, classified
        rightly), ``validation`` and ``clean`` (training pictures rightly labelled).

    Raises:
        DownloadError: If the pictures cannot be had.
        StorageError: If a file of pictures is damaged.
        InputError: If ``recipe`` asks for more pictures or blocks than there are.
    """
    started = time.perf_counter()
    _check(recipe)
    say(f"reading the pictures: {recipe.data}")
    split = split_of(recipe, data)
    say(f"training a small ViT on {len(split.train)} pictures, {recipe.noise:.0%} wrong (cached)")
    model = trained_vit(recipe, split, say)
    layers = mlp_of(recipe.blocks)
    base = {**accuracies(model, split), "kept_fraction": 1.0}
    say("measuring curvature and editing: every ρ, against SVD and random pairs of the same size")
    measured = vit_basis(model, split, recipe.statistics[0], layers=layers, seed=recipe.seed)
    sweep = _sweep(model, split, recipe, measured, recipe.sweep, METHODS)
    chosen = next(point for point in sweep if point["mass"] == recipe.mass)
    say("comparing where curvature is measured")
    arms = [
        _arm(model, split, recipe, statistics, chosen["kfac"]["kept_fraction"])
        for statistics in track(recipe.statistics, "statistics", len(recipe.statistics), "way")
    ]
    say("comparing which blocks are edited")
    basis = measured
    if recipe.blocks is not None:
        basis = vit_basis(model, split, recipe.statistics[0], layers="mlp", seed=recipe.seed)
    groups = [*((number,) for number in range(recipe.layers)), (0, recipe.layers - 1)]
    blocks = [
        {
            "blocks": list(group),
            "sweep": _sweep(
                model, split, recipe, only(basis, group), recipe.study, ("kfac", "svd")
            ),
        }
        for group in groups
    ]
    results = {
        "schema_version": SCHEMA_VERSION,
        "base": base,
        **{method: chosen[method] for method in METHODS},
        "mass": recipe.mass,
        "sweep": sweep,
        "statistics": arms,
        "blocks": blocks,
        "recipe": asdict(recipe),
        "versions": versions(),
    }
    if command:
        results["command"] = command
    if out is not None:
        keep_curvature(out, measured, recipe.mass)
        results["seconds"] = round(time.perf_counter() - started, 1)
        write_json(out / "results.json", results)
        noise_study(results).savefig(out / "figures.png")
        say(f"wrote results.json and figures.png to {out}")
    return results


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


def _sweep(
    model: nn.Module,
    split: NoisySplit,
    recipe: VitRecipe,
    basis: Eigenbasis,
    masses: Sequence[float],
    methods: Sequence[str],
) -> list[dict[str, Any]]:
    """Edit at every ρ and the recipe's by each method, and measure."""
    singular = svd_basis(model, basis)
    return [
        compare(
            model, basis, singular, mass, lambda changed: accuracies(changed, split),
            seed=recipe.seed, methods=methods,
        )
        for mass in sorted({*masses, recipe.mass})
    ]  # fmt: skip


def _arm(
    model: nn.Module,
    split: NoisySplit,
    recipe: VitRecipe,
    statistics: Statistics,
    fraction: float,
) -> dict[str, Any]:
    """Measure curvature in one way; edit at every ρ, and at one kept fraction for all ways."""
    layers = mlp_of(recipe.blocks)
    basis = vit_basis(model, split, statistics, layers=layers, seed=recipe.seed)
    with edited(model, basis, fraction=fraction) as report:
        matched = {**accuracies(model, split), "kept_fraction": report.kept_fraction}
    return {
        "statistics": asdict(statistics),
        "matched": matched,
        "sweep": _sweep(model, split, recipe, basis, recipe.study, ("kfac",)),
    }


def trained_vit(recipe: VitRecipe, split: NoisySplit, say: Say = silent) -> Any:
    """Return the recipe's model, trained now or read from the cache of an earlier run."""
    return cached(
        "lab-vit",
        recipe.training_key(),
        read=lambda folder: load_vit(folder).eval(),
        make=lambda unfinished: train_vit(recipe, split, unfinished=unfinished, say=say),
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
        progress: ``unfinished`` and ``say`` of :func:`curvfast.demo.fitting.fit`.

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


def vit_basis(
    model: nn.Module, split: NoisySplit, statistics: Statistics, *, layers: LayerSpec, seed: int
) -> Eigenbasis:
    """Measure the curvature of a vision transformer's layers and decompose it.

    Args:
        model: An image classifier of transformers, its first token CLS.
        split: Source of the images.
        statistics: Which pictures, tokens and labels.
        layers: As in :func:`curvfast.collect`.
        seed: Seed of the sampled labels.

    Returns:
        Eigenbases by layer name.

    Raises:
        InputError: If ``statistics`` holds an unknown word.
    """
    if statistics.images not in ("fresh", "training") or statistics.tokens not in ("all", "cls"):
        raise InputError(f"{statistics}: pass images 'fresh' or 'training', tokens 'all' or 'cls'")
    fresh = statistics.images == "fresh"
    images = split.fresh if fresh else split.train
    labels = split.fresh.labels if fresh else split.given
    batches = [
        {"pixel_values": pixels, "labels": own}
        for pixels, own in zip(images.pixels.split(_AT_ONCE), labels.split(_AT_ONCE), strict=True)
    ]
    factors = collect_from(
        model, batches, layers, seed=seed,
        labels="gold" if statistics.labels == "given" else statistics.labels,
        rows=_cls if statistics.tokens == "cls" else None,
    )  # fmt: skip
    with warnings.catch_warnings():
        # Ten classes span nine directions of the last block's G: the rest is rounding error.
        warnings.simplefilter("ignore", NumericalWarning)
        return factors.eigh()


@torch.no_grad()
def classify(model: nn.Module, images: Images) -> Tensor:
    """Return the likeliest class of each picture, int64 [images]."""
    parts = images.pixels.split(_AT_ONCE)
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


def _cls(_: str, shape: torch.Size) -> Tensor:
    """Count only the first token of each image."""
    keep = torch.zeros(shape, dtype=torch.bool)
    keep[:, 0] = True
    return keep


def _check(recipe: VitRecipe) -> None:
    if recipe.data not in ("mnist", "fashion"):
        raise InputError(f"data={recipe.data!r}: pass 'mnist' or 'fashion'")
    require_blocks(recipe.blocks, recipe.layers)
    if not recipe.statistics:
        raise InputError("statistics=(): pass at least one way to measure curvature")
