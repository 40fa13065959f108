"""Figure 4: correlation of tasks' activation of flat components with their loss under an edit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from curvfast.analysis import (
    activation_ratio,
    correlation_interval,
    memorization_scores,
    pearson,
    spearman,
)
from curvfast.core.eigenbasis import Eigenbasis
from curvfast.editing import edited
from curvfast.evals.memorization import Passage
from curvfast.lab.lessons import corpus_of, tasks_of, trained_lm
from curvfast.lab.lm import lm_basis, measure_of
from curvfast.lab.lm_recipe import LmRecipe
from curvfast.lab.questions import as_passage
from curvfast.report.task_spectrum import Point, task_spectrum
from curvfast.studies.counting import CountedPassages
from curvfast.studies.rounding import to_four_decimals
from curvfast.studies.study import Figures, Lines, MatplotlibFigure, Study, StudyConfig, spread

BANDS = (0.1, 0.25, 0.5, 1)
MEASURES = {
    "ratio, answer": "flattest / most curved band, answers",
    "share, answer": "energy in the flattest 60 %, answers",
    "ratio, whole": "flattest / most curved band, whole texts",
    "share, whole": "energy in the flattest 60 %, whole texts",
}
Coefficient = Callable[[Any, Any], float]
COEFFICIENTS: dict[str, Coefficient] = {"Pearson": pearson, "Spearman": spearman}
LEAST = 0.5
"""Accuracy below which a task is left out, as chance performance cannot be lost."""
_MEMORIZATION = "memorization"


def _measure(ask: StudyConfig) -> Figures:
    whole = LmRecipe().seeded(ask.seed)
    recipe = whole.quick() if ask.quick else whole
    corpus, tasks = corpus_of(recipe), tasks_of(recipe)
    ask.say("the lab's language model (cached)")
    model = trained_lm(recipe, corpus, ask.say)
    ask.say("measuring its curvature")
    basis = lm_basis(model, recipe, corpus)
    texts = {_MEMORIZATION: corpus.passages()}
    for task in tasks:
        questions = task.ask(recipe.questions, recipe.seed)
        texts[task.name] = [as_passage(corpus.tokenizer, question) for question in questions]
    prose = [Passage((0,), tuple(row[1:])) for row in corpus.held_out.tolist()]
    ask.say(f"activations of {len(texts)} tasks beside those of prose")
    activations = {name: _activations(model, basis, own, prose) for name, own in texts.items()}
    ask.say(f"asking before and after the edit, ρ = {recipe.mass:g}")
    accuracy = measure_of(recipe, corpus, tasks)
    before = accuracy(model)
    with edited(model, basis, mass=recipe.mass):
        after = accuracy(model)
    kinds = {_MEMORIZATION: _MEMORIZATION, **{task.name: task.kind for task in tasks}}
    found = {}
    for name, kind in kinds.items():
        key = name if name == _MEMORIZATION else f"{name}.generated"
        levels = {"kind": kind, "before": before[key], "after": after[key]}
        found[name] = to_four_decimals(levels | activations[name])
    return {
        "mass": recipe.mass,
        "tasks": found,
        "perplexity": to_four_decimals([before["perplexity"], after["perplexity"]]),
        "correlations": {
            key: {
                name: to_four_decimals(
                    _correlation([{"tasks": found}], key, of, _known([{"tasks": found}]))
                )
                for name, of in COEFFICIENTS.items()
            }
            for key in MEASURES
        },
    }


def _activations(
    model: Any, basis: Eigenbasis, texts: Sequence[Passage], prose: Sequence[Passage]
) -> Figures:
    """Return both measures of low-curvature activation, of answers and of whole texts."""
    counted = CountedPassages()
    found = {}
    for where in ("answer", "whole"):
        own = {"whole": where == "whole"}
        curves = activation_ratio(
            model, basis, counted.batches(texts, **own), counted.batches(prose, whole=True),
            bands=BANDS, rows=counted, samples=0,
        ).ratio  # fmt: skip
        shares = memorization_scores(model, basis, counted.batches(texts, **own), rows=counted)
        found[f"ratio, {where}"] = float((curves[:, -1] / curves[:, 0]).mean())
        found[f"share, {where}"] = float(shares.of().mean())
    return found


def _known(found: Sequence[Figures]) -> list[str]:
    """Return the tasks that the unedited models of all seeds solve."""
    return [
        name
        for name in found[0]["tasks"]
        if all(run["tasks"][name]["before"] >= LEAST for run in found)
    ]


def _lost(task: Figures) -> float:
    return float(1 - task["after"] / task["before"])


def _correlation(
    found: Sequence[Figures], key: str, of: Coefficient, names: Sequence[str]
) -> tuple[float, float, float] | None:
    """Return a measure's correlation with the loss, of means over seeds, and its interval."""
    value = _mean_correlation(found, key, of, names)
    if value is None:
        return None
    return value, *correlation_interval(*_measured(found, key, names), of)


def _mean_correlation(
    found: Sequence[Figures], key: str, of: Coefficient, names: Sequence[str]
) -> float | None:
    """Return the correlation of means over seeds; None for two tasks, where it is trivial."""
    if len(names) < 3:
        return None
    means = (
        [sum(column) / len(found) for column in zip(*rows, strict=True)]
        for rows in _measured(found, key, names)
    )
    return of(*means)


def _measured(
    found: Sequence[Figures], key: str, names: Sequence[str]
) -> tuple[list[list[float]], list[list[float]]]:
    """Return a measure and the loss, each by seed and task."""
    x = [[run["tasks"][name][key] for name in names] for run in found]
    return x, [[_lost(run["tasks"][name]) for name in names] for run in found]


def _tables(found: Sequence[Figures]) -> dict[str, Lines]:
    names = _known(found)
    mass = found[0]["mass"]
    tasks = [["task", "kind", "before, %", f"after, ρ = {mass:g}, %", *MEASURES]]
    for name in found[0]["tasks"]:
        runs = [run["tasks"][name] for run in found]
        levels = [spread([100 * own[key] for own in runs], "{:.0f}") for key in ("before", "after")]
        cells = [spread([own[key] for own in runs], "{:.3f}") for key in MEASURES]
        tasks.append([name, runs[0]["kind"].replace("_", " "), *levels, *cells])
    alone = [name for name in names if name != _MEMORIZATION]
    return {
        "tasks": tasks,
        "correlations": _correlations(found, names),
        "correlations without recitation": _correlations(found, alone),
    }


def _correlations(found: Sequence[Figures], names: Sequence[str]) -> Lines:
    """Return each measure's correlation with the loss, over the tasks named."""
    lines = [
        [f"correlation with what is lost, {len(names)} tasks", *COEFFICIENTS]
        + [f"{name}, each seed" for name in COEFFICIENTS]
    ]
    for key, label in MEASURES.items():
        ways = COEFFICIENTS.values()
        pooled = [_written(_correlation(found, key, of, names)) for of in ways]
        single = [_each([_mean_correlation([run], key, of, names) for run in found]) for of in ways]
        lines.append([label, *pooled, *single])
    return lines


def _each(found: Sequence[float | None]) -> str:
    known = [value for value in found if value is not None]
    return spread(known) if known else "none"


def _written(found: Sequence[float] | None) -> str:
    return "none" if found is None else "{:.2f} [{:.2f}, {:.2f}]".format(*found)


def _picture(found: Sequence[Figures]) -> MatplotlibFigure:
    panels = {}
    for key, label in MEASURES.items():
        points = [
            Point(
                name,
                found[0]["tasks"][name]["kind"],
                [run["tasks"][name][key] for run in found],
                [100 * _lost(run["tasks"][name]) for run in found],
            )
            for name in _known(found)
        ]
        notes = [
            f"{name} {_written(_correlation(found, key, of, _known(found)))}"
            for name, of in COEFFICIENTS.items()
        ]
        panels[label] = points, "\n".join(notes)
    return task_spectrum(panels)


STUDY = Study(_measure, _tables, _picture)
