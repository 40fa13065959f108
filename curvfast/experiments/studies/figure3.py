"""Figure 3: the effect of an edit on abilities, from recitation to logic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from torch import nn

from curvfast.baselines.curvature_free import svd_basis
from curvfast.collection.collect import collect_from
from curvfast.evals.memorization import Passage, memorization
from curvfast.evals.perplexity import perplexity
from curvfast.experiments.data.prompts import few_shot, questions
from curvfast.experiments.data.tasks import logic
from curvfast.experiments.recipes import LmRecipe
from curvfast.experiments.runs import demo_smollm, lab_lm
from curvfast.experiments.runs.comparison import compare
from curvfast.experiments.runs.lab_lm import kept_by_kind
from curvfast.experiments.studies.study import Figures, Lines, Study, StudyConfig, spread
from curvfast.report.style import METHOD_STYLES, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def abilities_figure(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw accuracy after an edit over accuracy before, by kind of task.

    Args:
        runs: For each seed, figures as of :func:`curvfast.experiments.runs.lab_lm.run` by model.

    Returns:
        A panel for each model and way to answer: bars are means, dots are seeds.
    """
    from matplotlib.figure import Figure

    panels = [(model, how) for model, run in runs[0].items() for how in run["kept"]["kfac"]]
    figure = Figure(figsize=(4.8 * len(panels), 4), layout="constrained", dpi=160)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for place, (model, how) in zip(axes, panels, strict=True):
        own = [run[model] for run in runs]
        _bars(place, own, how)
        place.set_title(f"{model}: answers {how}, ρ = {own[0]['mass']:g}", loc="left", fontsize=10)
        place.legend(frameon=False, fontsize=8)
        plain(place)
    axes[0].set_ylabel("accuracy after / before, %")
    return figure


def _bars(axes: Axes, runs: Sequence[Mapping[str, Any]], how: str) -> None:
    kinds = list(runs[0]["kept"]["kfac"][how])
    for offset, method in enumerate(("kfac", "svd")):
        label, colour, _ = METHOD_STYLES[method]
        shares = [[100 * run["kept"][method][how][kind] for run in runs] for kind in kinds]
        places = [i + 0.4 * offset for i in range(len(kinds))]
        axes.bar(places, [*map(mean, shares)], 0.38, color=colour, alpha=0.55, label=label)
        for place, own in zip(places, shares, strict=True):
            axes.plot([place] * len(own), own, ".", color=colour)
    axes.set_xticks([i + 0.2 for i in range(len(kinds))])
    axes.set_xticklabels([kind.replace("_", "\n") for kind in kinds], fontsize=8)
    axes.axhline(100, color="#1b1b1e", linewidth=0.8, linestyle=":")


_KINDS = {
    "addition": "arithmetic",
    "times_table": "arithmetic",
    "closed_book": "closed_book",
    "open_book": "open_book",
    **{task.name: task.kind for task in logic()},
}
_SHOTS = 4
_METHODS = ("kfac", "svd")


def abilities(config: StudyConfig) -> Figures:
    """Measure every ability of SmolLM2 before and after the edit of its demo.

    Args:
        config: Seed of the text curvature is measured on and of the questions.

    Returns:
        Figures as in :func:`curvfast.experiments.runs.lab_lm.run`, for generated answers only.

    Raises:
        DownloadError: If the model or a text cannot be had.
        CurvfastError: If the model recites nothing of the text searched.
    """
    recipe = demo_smollm.SmolLMRecipe(seed=config.seed)
    recipe = recipe.quick() if config.quick else recipe
    subject = demo_smollm.gather(recipe, config.report_stage)
    model = subject.model
    asked = {
        **questions(subject.tokenizer, recipe.questions, config.seed),
        **logic_questions(subject.tokenizer, recipe.questions, config.seed),
    }

    def measure(model: nn.Module) -> dict[str, float]:
        return {
            "memorization": memorization(model, subject.spans).strict,
            "perplexity": perplexity(model, subject.held_out.split(recipe.batch)),
            **{f"{n}.generated": memorization(model, items).strict for n, items in asked.items()},
        }

    config.report_stage(
        f"asking the unedited model: {len(subject.spans)} spans, {len(asked)} tasks"
    )
    base = {**measure(model), "kept_fraction": 1.0}
    config.report_stage(
        f"measuring curvature of {len(recipe.layers)} layers on speeches, and editing"
    )
    basis = collect_from(
        model, [{"input_ids": part} for part in subject.statistics.split(recipe.batch)],
        layers=list(recipe.layers), tokens=recipe.statistics_tokens, seed=recipe.seed,
    ).eigh()  # fmt: skip
    point = compare(
        model,
        basis,
        svd_basis(model, basis),
        recipe.mass,
        measure,
        seed=recipe.seed,
        methods=_METHODS,
    )
    return {
        "tasks": _KINDS,
        "base": base,
        **{method: point[method] for method in _METHODS},
        "mass": recipe.mass,
        "spans": len(subject.spans),
        "kept": {
            method: {"generated": kept_by_kind(base, point[method], _KINDS, "generated")}
            for method in _METHODS
        },
    }


def logic_questions(tokenizer: Any, count: int, seed: int) -> dict[str, list[Passage]]:
    """Return few-shot questions of each task of logic.

    Args:
        tokenizer: The model's.
        count: Questions of each task.
        seed: Seed of their choice.

    Returns:
        Prompts and answers as token ids, by task.
    """
    found = {}
    for task in logic():
        drawn = [
            (question.prompt, question.answer.removesuffix("."))
            for question in task.ask(count + _SHOTS, seed)
        ]
        found[task.name] = few_shot(tokenizer, drawn, lambda *pair: pair, count)
    return found


METHODS = {"kfac": "K-FAC edit", "svd": "truncated SVD"}


def _measure(config: StudyConfig) -> Figures:
    recipe = LmRecipe().seeded(config.seed)
    trained = lab_lm.run(recipe.quick() if config.quick else recipe, None, config.report_stage)
    return {"smollm": abilities(config), "lab": trained}


def _tables(found: Sequence[Figures]) -> dict[str, Lines]:
    tables = {}
    for model in found[0]:
        runs = [each[model] for each in found]
        tables[f"{model}, kept"] = _kept(runs)
        tables[f"{model}, levels"] = _levels(runs)
    return tables


def _kept(runs: Sequence[Figures]) -> Lines:
    """Return accuracy after an edit over accuracy before, by kind of task."""
    ways = runs[0]["kept"]["kfac"]
    kinds = list(ways["generated"])
    head = [f"accuracy after / before, ρ = {runs[0]['mass']:g}"]
    lines = [[*head, *(kind.replace("_", " ") for kind in kinds)]]
    for method, label in METHODS.items():
        for way in ways:
            shares = [spread([run["kept"][method][way][kind] for run in runs]) for kind in kinds]
            lines.append([f"{label}, {way}", *shares])
    return lines


def _levels(runs: Sequence[Figures]) -> Lines:
    """Return recitation and accuracies, in percent, and perplexity."""
    tasks = runs[0]["tasks"]
    names = ["memorization", *(f"{task}.generated" for task in tasks)]
    heads = [task.replace("_", " ") for task in tasks]
    lines = [["answers generated, %", "recited", *heads, "perplexity"]]
    for key, label in {"base": "unedited", **METHODS}.items():
        cells = [spread([100 * run[key][name] for run in runs], "{:.0f}") for name in names]
        lines.append([label, *cells, spread([run[key]["perplexity"] for run in runs], "{:.1f}")])
    return lines


STUDY = Study(_measure, _tables, abilities_figure)
