"""The lab's experiment on a language model: recitation, arithmetic, facts and logic."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.baselines.curvature_free import svd_basis
from curvfast.collection.collect import collect_from
from curvfast.display import track
from curvfast.errors import InputError
from curvfast.evals.choices import choice_accuracy
from curvfast.evals.memorization import memorization
from curvfast.evals.perplexity import perplexity
from curvfast.experiments.data.corpus import TokenizedCorpus
from curvfast.experiments.data.lessons import Batch, corpus_of, lesson_batches, restarting, tasks_of
from curvfast.experiments.data.tasks import Task, as_choice, as_passage
from curvfast.experiments.models.language import trained_lm
from curvfast.experiments.recipes import LmRecipe
from curvfast.experiments.runs.comparison import compare, mlp_of, require_blocks
from curvfast.experiments.runs.outputs import keep_curvature, keep_passages
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.model.identity import versions
from curvfast.model.rows import IGNORED_LABEL
from curvfast.report.lab_figures import task_study
from curvfast.storage import write_json

SCHEMA_VERSION = 1
KINDS = ("memorization", "arithmetic", "closed_book", "open_book", "logic")
"""Kinds of tasks, from the paper's largest loss to its smallest."""
_METHODS = ("kfac", "svd")
_ROWS = 16

Measure = Callable[[nn.Module], dict[str, float]]


def run(
    recipe: LmRecipe, out: Path | None, report_stage: Callable[[str], None], *, command: str = ""
) -> dict[str, Any]:
    """Train (or load), ask, edit, and ask again.

    Args:
        recipe: What to run.
        out: Folder for results.json, the picture, and what a report shows besides; None writes
            nothing.
        report_stage: Called with one line before each stage.
        command: The command that makes these results, saved with them.

    Returns:
        What results.json holds: for each edit ``memorization`` (share of passages recited),
        ``perplexity``, and of each task ``TASK.generated`` (share of answers generated greedily)
        and ``TASK.chosen`` (share of answers likelier than the wrong ones); and under ``kept`` the
        share of what the unedited model could that is left, by kind, of both.

    Raises:
        DownloadError: If the text cannot be had.
        InputError: If ``recipe`` asks for blocks that are not there.
    """
    started = time.perf_counter()
    require_blocks(recipe.blocks, recipe.text.layers)
    report_stage("reading the text, and drawing facts and lessons")
    corpus = corpus_of(recipe)
    tasks = tasks_of(recipe)
    report_stage(
        f"training a small Llama on prose, {recipe.text.passages} passages and lessons (cached)"
    )
    model = trained_lm(recipe, corpus, report_stage)
    measure = measure_of(recipe, corpus, tasks)
    base = {**measure(model), "kept_fraction": 1.0}
    report_stage(
        f"measuring curvature, {recipe.statistics_lessons:.0%} on lessons, none on passages"
    )
    basis = lm_basis(model, recipe, corpus)
    singular = svd_basis(model, basis)
    report_stage("editing: every ρ, against truncated SVD at the same kept fraction")
    masses = sorted({*recipe.sweep, recipe.mass})
    sweep = [
        compare(model, basis, singular, mass, measure, seed=recipe.seed, methods=_METHODS)
        for mass in track(masses, "sweep", len(masses), "ρ")
    ]
    kinds = {task.name: task.kind for task in tasks}
    chosen = next(point for point in sweep if point["mass"] == recipe.mass)
    results = {
        "schema_version": SCHEMA_VERSION,
        "tasks": kinds,
        "base": base,
        **{method: chosen[method] for method in _METHODS},
        "mass": recipe.mass,
        "kept": {
            method: {
                how: kept_by_kind(base, chosen[method], kinds, how)
                for how in ("generated", "chosen")
            }
            for method in _METHODS
        },
        "sweep": sweep,
        "recipe": asdict(recipe),
        "versions": versions(),
    }
    if command:
        results["command"] = command
    if out is not None:
        keep_curvature(out, basis, recipe.mass)
        keep_passages(out, model, corpus.tokenizer, corpus.passages(), basis, recipe.mass)
        results["seconds"] = round(time.perf_counter() - started, 1)
        write_json(out / "results.json", results)
        task_study(results).savefig(out / "figures.png")
        report_stage(f"wrote results.json and figures.png to {out}")
    return results


def measure_of(recipe: LmRecipe, corpus: TokenizedCorpus, tasks: Sequence[Task]) -> Measure:
    """Return a function that computes every measure of :func:`run`."""
    asked = {task.name: task.ask(recipe.questions, recipe.seed) for task in tasks}
    tokenizer = corpus.tokenizer
    passages = {name: [as_passage(tokenizer, q) for q in qs] for name, qs in asked.items()}
    choices = {name: [as_choice(tokenizer, q) for q in qs] for name, qs in asked.items()}
    recited = corpus.passages()
    # Every training row begins with an end-of-text token.
    held_out = corpus.held_out.index_fill(1, torch.tensor([0]), 0).split(_ROWS)

    def measure(model: nn.Module) -> dict[str, float]:
        found = {
            "memorization": memorization(model, recited).strict,
            "perplexity": perplexity(model, held_out),
        }
        for name in asked:
            found[f"{name}.generated"] = memorization(model, passages[name]).strict
            found[f"{name}.chosen"] = choice_accuracy(model, choices[name])
        return found

    return measure


def lm_basis(model: nn.Module, recipe: LmRecipe, corpus: TokenizedCorpus) -> Eigenbasis:
    """Measure curvature on prose and lessons in the recipe's mix, sampled labels, and decompose.

    Args:
        model: The unedited model.
        recipe: Tokens, mix, layers and seed.
        corpus: Source of the prose.

    Returns:
        Eigenbases by layer name.

    Raises:
        InputError: If the share of lessons is not in [0, 1].
    """
    share = recipe.statistics_lessons
    if not 0 <= share <= 1:
        raise InputError(f"statistics_lessons={share}: pass a share of the rows, in [0, 1]")
    text = recipe.text
    generator = torch.Generator().manual_seed(text.seed + 1)
    drawn = lesson_batches(
        corpus.tokenizer, tasks_of(recipe), rows=_ROWS, length=text.length,
        seed=f"{text.seed} statistics",
    )  # fmt: skip
    batches = []
    for _ in range(-(-text.statistics_tokens // (_ROWS * (text.length - 1)))):
        starts = torch.randint(len(corpus.train) - text.length, (_ROWS,), generator=generator)
        prose = torch.stack([corpus.train[s : s + text.length] for s in starts.tolist()])
        prose[:, 0] = 0
        taught = torch.rand(_ROWS, 1, generator=generator) < share
        rows = {"input_ids": prose, "labels": prose, "position_ids": restarting(prose)}
        mixed = {
            key: torch.where(taught, lessons, rows[key]) for key, lessons in next(drawn).items()
        }
        labels = _own_labels(model, mixed, generator)
        batches.append({**mixed, "labels": labels, "use_cache": False})
    factors = collect_from(model, batches, mlp_of(recipe.blocks), labels="gold", seed=text.seed)
    # Passed as given labels, but sampled from the model: recorded as such.
    return replace(factors, provenance={**factors.provenance, "labels": "sampled"}).eigh()


@torch.no_grad()
def _own_labels(model: Any, batch: Batch, generator: torch.Generator) -> Tensor:
    """Return labels sampled from the model's predictions, at positions with labels."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    chances = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1).softmax(-1)
    drawn = torch.multinomial(chances, 1, generator=generator).view(len(batch["labels"]), -1)
    taught = batch["labels"][:, 1:] != IGNORED_LABEL
    return nn.functional.pad(drawn.where(taught, IGNORED_LABEL), (1, 0), value=IGNORED_LABEL)


def kept_by_kind(
    before: Mapping[str, float], after: Mapping[str, float], kinds: Mapping[str, str], how: str
) -> dict[str, float]:
    """Return mean accuracy after an edit over mean accuracy before, by kind of task.

    Args:
        before: Measures of the unedited model.
        after: Measures of the edited model.
        kinds: Kind of each task.
        how: ``"generated"`` or ``"chosen"``.

    Returns:
        A ratio for each of :data:`KINDS`; 0 where the unedited model's accuracy is 0.
    """

    def level(found: Mapping[str, float], kind: str) -> float:
        if kind == "memorization":
            return found[kind]
        return mean(found[f"{name}.{how}"] for name, own in kinds.items() if own == kind)

    return {
        kind: level(after, kind) / level(before, kind) if level(before, kind) else 0.0
        for kind in KINDS
        if kind == "memorization" or kind in kinds.values()
    }
