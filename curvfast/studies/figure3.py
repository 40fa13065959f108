"""Figure 3: the effect of an edit on abilities, from recitation to logic."""

from __future__ import annotations

from collections.abc import Sequence

from curvfast.lab import lm
from curvfast.lab.lm_recipe import LmRecipe
from curvfast.report.abilities import abilities
from curvfast.studies import pretrained
from curvfast.studies.study import Figures, Lines, Study, StudyConfig, spread

METHODS = {"kfac": "K-FAC edit", "svd": "truncated SVD"}


def _measure(ask: StudyConfig) -> Figures:
    recipe = LmRecipe().seeded(ask.seed)
    trained = lm.run(recipe.quick() if ask.quick else recipe, None, ask.say)
    return {"smollm": pretrained.abilities(ask), "lab": trained}


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


STUDY = Study(_measure, _tables, abilities)
