"""Table 2: edits of a vision transformer that memorized wrong labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from curvfast.experiments.recipes import RECIPES, Statistics
from curvfast.experiments.runs import lab_vit
from curvfast.experiments.studies.study import Figures, Lines, Study, StudyConfig, spread
from curvfast.report.style import METHOD_STYLES, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def labels(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw wrong labels kept against validation over ρ.

    Args:
        runs: For each seed, results of :func:`curvfast.experiments.runs.lab_vit.run` by the name of
            their recipe.

    Returns:
        A panel a recipe, a thin line a seed: K-FAC and SVD of the same size.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(runs[0]), 4), layout="constrained", dpi=160)
    for axes, name in zip(figure.subplots(1, len(runs[0]), squeeze=False)[0], runs[0], strict=True):
        for number, run in enumerate(runs):
            _seed(axes, run[name], labelled=number == 0)
        recipe = runs[0][name]["recipe"]
        axes.set_title(
            f"{name}: {recipe['noise']:.0%} wrong, {recipe['epochs']} epochs", loc="left",
            fontsize=10,
        )  # fmt: skip
        axes.set_xlabel("wrong labels kept, % (low is better)")
        axes.set_ylabel("validation, %")
        axes.legend(frameon=False, fontsize=8)
        plain(axes)
    return figure


def _seed(axes: Axes, run: Mapping[str, Any], *, labelled: bool) -> None:
    for method in ("kfac", "svd"):
        label, colour, marker = METHOD_STYLES[method]
        points = [*(p[method] for p in run["sweep"]), run["base"]]
        axes.plot(
            [100 * p["memorized"] for p in points], [100 * p["validation"] for p in points],
            color=colour, marker=marker, markersize=3, linewidth=1, alpha=0.7,
            label=label if labelled else None,
        )  # fmt: skip
    label, colour, marker = METHOD_STYLES["base"]
    axes.plot(
        100 * run["base"]["memorized"], 100 * run["base"]["validation"], marker=marker,
        color=colour, markersize=11, linestyle="none", label=label if labelled else None,
    )  # fmt: skip


METHODS = {
    "base": "unedited",
    "kfac": "K-FAC edit",
    "svd": "truncated SVD",
    "random": "random pairs",
}
MEASURES = {
    "memorized": "wrong labels kept",
    "ground_truth": "their true class",
    "validation": "validation",
    "clean": "right labels kept",
    "kept_fraction": "pairs kept",
}


def _measure(config: StudyConfig) -> Figures:
    found = {}
    for name, recipe in RECIPES.items():
        own = replace(recipe, seed=config.seed)
        found[name] = lab_vit.run(
            own.quick() if config.quick else own, None, config.report_stage, data=config.data
        )
    return found


def _tables(found: Sequence[Figures]) -> dict[str, Lines]:
    tables = {}
    for name in found[0]:
        runs = [each[name] for each in found]
        tables[name] = _methods(runs)
        tables[f"{name}, statistics"] = _statistics(runs)
        tables[f"{name}, blocks"] = _blocks(runs)
    return tables


def _methods(runs: Sequence[Figures]) -> Lines:
    """Return the edit at its reported ρ beside baselines that keep as much."""
    lines = [[f"pictures, %, ρ = {runs[0]['mass']:g}", *MEASURES.values()]]
    return lines + [[label, *_cells([run[key] for run in runs])] for key, label in METHODS.items()]


def _statistics(runs: Sequence[Figures]) -> Lines:
    """Return edits at one kept fraction by curvature of other images, tokens and labels."""
    lines = [["curvature measured on (pictures, tokens, labels)", *MEASURES.values()]]
    for arms in zip(*(run["statistics"] for run in runs), strict=True):
        label = str(Statistics(**arms[0]["statistics"]))
        lines.append([label, *_cells([arm["matched"] for arm in arms])])
    return lines


def _blocks(runs: Sequence[Figures]) -> Lines:
    """Return edits of single blocks, or of the first and the last, at the edit's ρ."""
    lines = [["blocks edited", *MEASURES.values()]]
    for parts in zip(*(run["blocks"] for run in runs), strict=True):
        for method in ("kfac", "svd"):
            points = [
                next(p[method] for p in part["sweep"] if p["mass"] == run["mass"])
                for part, run in zip(parts, runs, strict=True)
            ]
            blocks = ", ".join(map(str, parts[0]["blocks"]))
            lines.append([f"{blocks}: {METHODS[method]}", *_cells(points)])
    return lines


def _cells(points: Sequence[Figures]) -> list[str]:
    return [spread([100 * point[key] for point in points], "{:.1f}") for key in MEASURES]


STUDY = Study(_measure, _tables, labels)
