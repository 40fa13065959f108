"""Table 2: edits of a vision transformer that memorized wrong labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from curvfast.lab import vit
from curvfast.lab.vit_recipe import RECIPES, Statistics
from curvfast.report.labels import labels
from curvfast.studies.study import Figures, Lines, Study, StudyConfig, spread

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


def _measure(ask: StudyConfig) -> Figures:
    found = {}
    for name, recipe in RECIPES.items():
        own = replace(recipe, seed=ask.seed)
        found[name] = vit.run(own.quick() if ask.quick else own, None, ask.say, data=ask.data)
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
