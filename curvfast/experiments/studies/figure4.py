"""Figure 4: correlation of tasks' activation of flat components with their loss under an edit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvfast.analysis import (
    activation_ratio,
    correlation_interval,
    memorization_scores,
    pearson,
    spearman,
)
from curvfast.editing.edit import edited
from curvfast.evals.memorization import Passage
from curvfast.experiments.data.lessons import corpus_of, tasks_of
from curvfast.experiments.data.tasks import as_passage
from curvfast.experiments.models.language import trained_lm
from curvfast.experiments.recipes import LmRecipe
from curvfast.experiments.runs.lab_lm import lm_basis, measure_of
from curvfast.experiments.studies.study import (
    Figures,
    Lines,
    MatplotlibFigure,
    Study,
    StudyConfig,
    spread,
    to_four_decimals,
)
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.report.style import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_COLOURS = {
    "memorization": "#c8553d",
    "arithmetic": "#e09f3e",
    "closed_book": "#6a4c93",
    "open_book": "#3a7ca5",
    "logic": "#0b6e4f",
}
_MARKS = "osD^v"
"""Of the tasks of one kind, in order."""


@dataclass(frozen=True)
class Point:
    """One task."""

    name: str
    kind: str
    x: Sequence[float]
    """Its measure at each seed."""
    y: Sequence[float]
    """Loss of accuracy at each seed, in per cent."""


def task_spectrum(panels: Mapping[str, tuple[Sequence[Point], str]]) -> Figure:
    """Draw what an edit takes of each task against a measure of its activations.

    Args:
        panels: Tasks and a note, by the name of the measure.

    Returns:
        Two panels a row; a large mark is a task's mean, dots are seeds.
    """
    from matplotlib.figure import Figure

    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(11, 4.4 * rows), layout="constrained", dpi=160)
    grid = figure.subplots(rows, 2, sharey=True, squeeze=False)
    for (label, (points, note)), axes in zip(panels.items(), grid.flat, strict=False):
        _panel(axes, points)
        axes.set_xlabel(label)
        axes.set_title(note, loc="left", fontsize=9)
        plain(axes)
    for row in grid:
        row[0].set_ylabel("accuracy lost to the edit, %")
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5,
        frameon=False, fontsize=9,
    )  # fmt: skip
    return figure


def _panel(axes: Axes, points: Sequence[Point]) -> None:
    marks: dict[str, Iterator[str]] = {}
    for point in points:
        colour = _COLOURS[point.kind]
        mark = next(marks.setdefault(point.kind, cycle(_MARKS)))
        axes.plot(point.x, point.y, ".", color=colour, alpha=0.4, markersize=5)
        axes.plot(
            mean(point.x), mean(point.y), mark, color=colour, markersize=7, alpha=0.85,
            linestyle="none", label=point.name.replace("_", " "),
        )  # fmt: skip


_ROWS = 32


class CountedPassages:
    """Batches of passages, and the row rule that selects the positions to count.

    An analysis runs one batch after another: the rule applies to the last batch drawn.
    """

    def __init__(self) -> None:
        """Count nothing until a batch is drawn."""
        self._keep = torch.zeros(0, 0, dtype=torch.bool)

    def batches(self, passages: Sequence[Passage], *, whole: bool) -> Iterator[dict[str, Tensor]]:
        """Yield passages with their continuations, padded on the right.

        Args:
            passages: Prompts and continuations.
            whole: Whether all positions except the first and the last count; else only those that
                predict the continuation.

        Yields:
            ``input_ids`` and ``attention_mask``, int64 [passages, longest].
        """
        for start in range(0, len(passages), _ROWS):
            part = passages[start : start + _ROWS]
            texts = [(*p.prefix, *p.suffix) for p in part]
            tokens = torch.zeros(len(part), max(map(len, texts)), dtype=torch.long)
            mask, keep = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
            for row, (passage, text) in enumerate(zip(part, texts, strict=True)):
                tokens[row, : len(text)] = torch.tensor(text)
                mask[row, : len(text)] = 1
                keep[row, 1 if whole else len(passage.prefix) - 1 : len(text) - 1] = True
            self._keep = keep
            yield {"input_ids": tokens, "attention_mask": mask}

    def __call__(self, _: str, __: torch.Size) -> Tensor:
        """Return the counted positions of the last batch drawn, bool [passages, longest]."""
        return self._keep


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


def _measure(config: StudyConfig) -> Figures:
    whole = LmRecipe().seeded(config.seed)
    recipe = whole.quick() if config.quick else whole
    corpus, tasks = corpus_of(recipe), tasks_of(recipe)
    config.report_stage("the lab's language model (cached)")
    model = trained_lm(recipe, corpus, config.report_stage)
    config.report_stage("measuring its curvature")
    basis = lm_basis(model, recipe, corpus)
    texts = {_MEMORIZATION: corpus.passages()}
    for task in tasks:
        questions = task.ask(recipe.questions, recipe.seed)
        texts[task.name] = [as_passage(corpus.tokenizer, question) for question in questions]
    prose = [Passage((0,), tuple(row[1:])) for row in corpus.held_out.tolist()]
    config.report_stage(f"activations of {len(texts)} tasks beside those of prose")
    activations = {name: _activations(model, basis, own, prose) for name, own in texts.items()}
    config.report_stage(f"asking before and after the edit, ρ = {recipe.mass:g}")
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
