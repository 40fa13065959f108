"""The paper's experiment in small: a language model that recites passages is edited."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from curvfast.baselines.curvature_free import svd_basis
from curvfast.collection.collect import collect_from
from curvfast.display import track
from curvfast.editing.edit import edit
from curvfast.evals.suite import evaluate
from curvfast.experiments.data.corpus import TokenizedCorpus, load_corpus
from curvfast.experiments.models.language import trained_model
from curvfast.experiments.recipes import Recipe
from curvfast.experiments.runs.comparison import METHODS, compare
from curvfast.experiments.runs.outputs import keep_curvature, keep_passages
from curvfast.hf.small import save
from curvfast.kfac.factors import Factors
from curvfast.model.identity import versions
from curvfast.model.layers import LayerSpec
from curvfast.report.plots import frontier
from curvfast.storage import write_json

_ROWS = 16


def run(
    recipe: Recipe, out: Path | None, report_stage: Callable[[str], None], *, command: str = ""
) -> dict[str, Any]:
    """Train (or load), measure, edit, and measure again.

    Args:
        recipe: The configuration.
        out: Folder for results.json, the picture and the edited checkpoint, and what a report shows
            besides; None writes nothing.
        report_stage: Called with one line before each stage.
        command: The command that makes these results, saved with them.

    Returns:
        What results.json holds: figures of the unedited model and of the three edits, and the
        sweep.

    Raises:
        DownloadError: If the text cannot be had.
    """
    started = time.perf_counter()
    report_stage("reading the text: State of the Union addresses and the King James Bible")
    corpus = load_corpus(recipe)
    report_stage(
        f"training a small Llama until it recites {len(corpus.canaries)} passages (cached)"
    )
    model = trained_model(recipe, corpus, report_stage)
    text = corpus.held_out.split(_ROWS)

    def measure(model: nn.Module) -> dict[str, float]:
        return evaluate(model, passages=corpus.passages(), text=text).to_dict()

    base = {**measure(model), "kept_fraction": 1.0}
    report_stage("measuring curvature on prose that holds none of the passages")
    factors = prose_factors(model, recipe, corpus)
    basis = factors.eigh()
    singular = svd_basis(model, basis)
    report_stage(
        "editing: every ρ, against truncated SVD and random pairs at the same kept fraction"
    )
    masses = sorted({*recipe.sweep, recipe.mass})
    sweep = [
        compare(model, basis, singular, mass, measure, seed=recipe.seed)
        for mass in track(masses, "sweep", len(masses), "ρ")
    ]
    chosen = next(point for point in sweep if point["mass"] == recipe.mass)
    results = {
        "base": base,
        **{method: chosen[method] for method in METHODS},
        "mass": recipe.mass,
        "sweep": sweep,
        "recipe": asdict(recipe),
        "statistics_rows": factors.rows,
        "versions": versions(),
    }
    if command:
        results["command"] = command
    if out is not None:
        keep_curvature(out, basis, recipe.mass)
        keep_passages(out, model, corpus.tokenizer, corpus.passages(), basis, recipe.mass)
        report = edit(model, basis, mass=recipe.mass)
        save(model, corpus.tokenizer, out / "edited")
        results["edit"] = report.to_dict()
        results["seconds"] = round(time.perf_counter() - started, 1)
        _write(results, recipe, out)
        report_stage(f"wrote results.json, frontier.png and edited/ to {out}")
    return results


def prose_factors(
    model: nn.Module,
    recipe: Recipe,
    corpus: TokenizedCorpus,
    layers: LayerSpec = "mlp",
    *,
    progress: bool = True,
) -> Factors:
    """Measure the curvature of a model on prose that holds none of the passages.

    Args:
        model: A causal language model of the demo's tokens.
        recipe: How many tokens, and the seed.
        corpus: Lends the prose.
        layers: As in :func:`curvfast.collect`.
        progress: Whether a bar counts tokens (on a terminal only).

    Returns:
        Kronecker factors, of labels sampled from the model.
    """
    return collect_from(
        model, prose(recipe, corpus), layers, labels="sampled", tokens=recipe.statistics_tokens,
        seed=recipe.seed, progress=progress,
    )  # fmt: skip


def prose(recipe: Recipe, corpus: TokenizedCorpus) -> list[dict[str, torch.Tensor]]:
    """Return batches of training prose, enough for the statistics."""
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    windows = -(-recipe.statistics_tokens // (recipe.length - 1)) + _ROWS
    starts = torch.randint(len(corpus.train) - recipe.length, (windows,), generator=generator)
    rows = torch.stack([corpus.train[s : s + recipe.length] for s in starts.tolist()])
    return [{"input_ids": part} for part in rows.split(_ROWS)]


def _write(results: dict[str, Any], recipe: Recipe, out: Path) -> None:
    write_json(out / "results.json", results)
    figure = frontier(
        results["base"],
        results["sweep"],
        chosen=recipe.mass,
        title=f"{recipe.passages} passages forgotten: {recipe.layers}-layer Llama, all MLPs edited",
    )
    figure.savefig(out / "frontier.png")
