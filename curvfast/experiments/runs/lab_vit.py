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

from curvfast.baselines.curvature_free import svd_basis
from curvfast.collection.collect import collect_from
from curvfast.display import ReportStage, track
from curvfast.editing.edit import edited
from curvfast.errors import InputError, NumericalWarning
from curvfast.experiments.data.images import NoisySplit
from curvfast.experiments.models.vit import PICTURES_AT_ONCE, accuracies, split_of, trained_vit
from curvfast.experiments.recipes import Statistics, VitRecipe
from curvfast.experiments.runs.comparison import METHODS, compare, mlp_of, only, require_blocks
from curvfast.experiments.runs.outputs import keep_curvature
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.model.identity import versions
from curvfast.model.layers import LayerSpec
from curvfast.report.lab_figures import noise_study
from curvfast.storage import write_json

SCHEMA_VERSION = 1


def run(
    recipe: VitRecipe,
    out: Path | None,
    report_stage: ReportStage,
    *,
    data: Path | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Train (or load) on wrong labels, measure curvature in several ways, edit, and measure again.

    Args:
        recipe: What to run.
        out: Folder for results.json, the picture, and what a report shows besides; None writes
            nothing.
        report_stage: Called with one line before each stage.
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
    report_stage(f"reading the pictures: {recipe.data}")
    split = split_of(recipe, data)
    report_stage(
        f"training a small ViT on {len(split.train)} pictures, {recipe.noise:.0%} wrong (cached)"
    )
    model = trained_vit(recipe, split, report_stage)
    layers = mlp_of(recipe.blocks)
    base = {**accuracies(model, split), "kept_fraction": 1.0}
    report_stage(
        "measuring curvature and editing: every ρ, against SVD and random pairs of the same size"
    )
    measured = vit_basis(model, split, recipe.statistics[0], layers=layers, seed=recipe.seed)
    sweep = _sweep(model, split, recipe, measured, recipe.sweep, METHODS)
    chosen = next(point for point in sweep if point["mass"] == recipe.mass)
    report_stage("comparing where curvature is measured")
    arms = [
        _arm(model, split, recipe, statistics, chosen["kfac"]["kept_fraction"])
        for statistics in track(recipe.statistics, "statistics", len(recipe.statistics), "way")
    ]
    report_stage("comparing which blocks are edited")
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
        report_stage(f"wrote results.json and figures.png to {out}")
    return results


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
        for pixels, own in zip(
            images.pixels.split(PICTURES_AT_ONCE), labels.split(PICTURES_AT_ONCE), strict=True
        )
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
