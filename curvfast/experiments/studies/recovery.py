"""Recovery: does recitation return when arithmetic is trained again after an edit?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import mean
from typing import TYPE_CHECKING, Any

from curvfast.baselines.curvature_free import svd_basis
from curvfast.editing.edit import edit
from curvfast.evals.memorization import memorization
from curvfast.experiments.data.lessons import corpus_of, lesson_batches, tasks_of
from curvfast.experiments.models.language import trained_lm
from curvfast.experiments.models.training import fit
from curvfast.experiments.recipes import LmRecipe
from curvfast.experiments.runs.lab_lm import KINDS, Measure, lm_basis, measure_of
from curvfast.experiments.studies.study import Figures, Lines, Study, StudyConfig, spread
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.kfac.select import select
from curvfast.kfac.selection.kept_pairs import Selection
from curvfast.report.style import METHOD_STYLES, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_PANELS = {
    "arithmetic": "arithmetic (taught again), %",
    "memorization": "passages recited, %",
    "closed_book": "facts by heart, %",
    "open_book": "facts told in the prompt, %",
    "logic": "logic, %",
    "perplexity": "perplexity on held-out speeches",
}


def relearning(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw every measure over the training steps on arithmetic.

    Args:
        runs: Figures of the study ``recovery``, one a seed.

    Returns:
        Six panels; a line is a mean over seeds, a dot a seed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 6.4), layout="constrained", dpi=160)
    steps = runs[0]["steps"]
    panels = figure.subplots(2, 3, sharex=True)
    for axes, (kind, title) in zip(panels.flat, _PANELS.items(), strict=True):
        scale = 1 if kind == "perplexity" else 100
        for method in runs[0]["levels"][kind]:
            label, colour, marker = METHOD_STYLES[method]
            curves = [[scale * v for v in run["levels"][kind][method]] for run in runs]
            for curve in curves:
                axes.plot(steps, curve, marker, color=colour, markersize=3, alpha=0.5)
            middle = [mean(values) for values in zip(*curves, strict=True)]
            axes.plot(steps, middle, color=colour, linewidth=1.8, label=label)
        if scale == 100:
            axes.set_ylim(-4, 104)
        axes.set_xticks(steps)
        axes.set_title(title, loc="left", fontsize=10)
        plain(axes)
    for axes in panels[-1]:
        axes.set_xlabel("steps on lessons of arithmetic")
    panels[0, 0].legend(frameon=False, fontsize=8)
    return figure


STEPS = (0, 10, 25, 50, 100)
"""Training steps on arithmetic after which everything is measured."""
LEARNING_RATE = 3e-4
"""A seventh of the training's learning rate; with warm-up, and decay to the last step."""
ROWS = 16
METHODS = {"base": "unedited", "kfac": "K-FAC edit", "svd": "truncated SVD"}


def _measure(config: StudyConfig) -> Figures:
    recipe = LmRecipe().seeded(config.seed)
    recipe = recipe.quick() if config.quick else recipe
    steps = STEPS[:2] if config.quick else STEPS
    config.report_stage("training a small Llama on prose, passages and lessons (cached)")
    corpus, tasks = corpus_of(recipe), tasks_of(recipe)
    model = trained_lm(recipe, corpus, config.report_stage)
    passages, others = corpus.passages(), measure_of(recipe, corpus, tasks)
    sums = [task for task in tasks if task.kind == "arithmetic"]

    def measure(model: Any) -> dict[str, float]:
        return {**others(model), "distance": memorization(model, passages).levenshtein}

    config.report_stage("measuring curvature")
    basis = lm_basis(model, recipe, corpus)
    singular = svd_basis(model, basis)
    kept = basis.keep(mass=recipe.mass)
    edits: dict[str, tuple[Eigenbasis, Selection] | None] = {
        "base": None,
        "kfac": (basis, kept),
        "svd": (singular, select(model, singular, "svd", fraction=kept.fractions)),
    }
    before = {name: value.clone() for name, value in model.state_dict().items()}
    curves = {}
    for method, chosen in edits.items():
        config.report_stage(f"{METHODS[method]}: {steps[-1]} steps on arithmetic")
        if chosen is not None:
            edit(model, chosen[0], selection=chosen[1])
        # The same lessons for each method.
        lessons = lesson_batches(
            corpus.tokenizer, sums, rows=ROWS, length=recipe.text.length,
            seed=f"{recipe.seed} recovery",
        )  # fmt: skip
        batches = ({**rows, "use_cache": False} for rows in lessons)
        curves[method] = relearn(model, batches, measure, steps)
        model.load_state_dict(before)
    kinds = {task.name: task.kind for task in tasks}
    return {
        "tasks": kinds,
        "mass": recipe.mass,
        "steps": list(steps),
        "learning_rate": LEARNING_RATE,
        "rows": ROWS,
        "curves": curves,
        "levels": levels(curves, kinds),
        "recipe": asdict(recipe),
    }


def relearn(
    model: Any, batches: Iterable[Mapping[str, Any]], measure: Measure, steps: Sequence[int]
) -> list[dict[str, float]]:
    """Train a model in place and measure it after given steps.

    Args:
        model: A language model of transformers.
        batches: Its keyword arguments, one batch per step.
        measure: Returns figures by name.
        steps: Numbers of steps, rising, after which it is measured; the last ends the training.

    Returns:
        The figures, with ``step``.
    """
    found: list[dict[str, float]] = []

    def after(model: Any, taken: int) -> None:
        if taken in steps:
            found.append({"step": taken, **measure(model)})

    fit(model, batches, steps=steps[-1], learning_rate=LEARNING_RATE, weight_decay=0.0, after=after)
    return found


def levels(
    curves: Mapping[str, Sequence[Mapping[str, float]]], kinds: Mapping[str, str]
) -> dict[str, dict[str, list[float]]]:
    """Return the accuracy of every kind of ability over the steps.

    Args:
        curves: Results of :func:`relearn` by method.
        kinds: Kind of each task.

    Returns:
        By kind and method: the share of passages recited or, of a kind of task, the mean share of
        answers generated; and ``distance`` and ``perplexity`` as they are.
    """

    def level(point: Mapping[str, float], kind: str) -> float:
        own = [name for name, other in kinds.items() if other == kind]
        return mean(point[f"{name}.generated"] for name in own) if own else point[kind]

    return {
        kind: {method: [level(point, kind) for point in own] for method, own in curves.items()}
        for kind in (*KINDS, "distance", "perplexity")
    }


_TITLES = {
    "memorization": "passages recited, %",
    "distance": "distance to the passages",
    "arithmetic": "arithmetic, %",
    "closed_book": "facts by heart, %",
    "open_book": "facts told, %",
    "logic": "logic, %",
    "perplexity": "perplexity",
}
_FORMS = {"distance": "{:.2f}", "perplexity": "{:.1f}"}


def _tables(found: Sequence[Figures]) -> dict[str, Lines]:
    tables = {}
    for kind, title in _TITLES.items():
        scale = 1 if kind in _FORMS else 100
        lines = [[title, *(f"{step} steps" for step in found[0]["steps"])]]
        for method, label in METHODS.items():
            runs = [run["levels"][kind][method] for run in found]
            cells = zip(*runs, strict=True)
            form = _FORMS.get(kind, "{:.0f}")
            lines.append([label, *(spread([scale * v for v in own], form) for own in cells)])
        tables[kind.replace("_", " ")] = lines
    return tables


STUDY = Study(_measure, _tables, relearning)
