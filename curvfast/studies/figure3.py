"""Figure 3: which abilities an edit takes, from passages recited to logic."""

from __future__ import annotations

from collections.abc import Sequence

from curvfast.lab import lm
from curvfast.lab.lm_recipe import LmRecipe
from curvfast.report.abilities import abilities
from curvfast.studies.study import Ask, Figures, Lines, Study, spread

METHODS = {"kfac": "K-FAC edit", "svd": "truncated SVD"}
WAYS = ("generated", "chosen")


def _measure(ask: Ask) -> Figures:
    recipe = LmRecipe().seeded(ask.seed)
    return lm.run(recipe.quick() if ask.quick else recipe, None, ask.say)


def _tables(found: Sequence[Figures]) -> dict[str, Lines]:
    mass = found[0]["mass"]
    kinds = list(found[0]["kept"]["kfac"]["generated"])
    kept = [[f"accuracy after / before, ρ = {mass:g}", *(kind.replace("_", " ") for kind in kinds)]]
    for method, label in METHODS.items():
        for way in WAYS:
            shares = [spread([run["kept"][method][way][kind] for run in found]) for kind in kinds]
            kept.append([f"{label}, {way}", *shares])
    rows = {"base": "unedited", **METHODS}
    levels = [["answers generated, %", "recited", *found[0]["tasks"], "perplexity"]]
    for key, label in rows.items():
        names = ["memorization", *(f"{task}.generated" for task in found[0]["tasks"])]
        cells = [spread([100 * run[key][name] for run in found], "{:.0f}") for name in names]
        levels.append([label, *cells, spread([run[key]["perplexity"] for run in found], "{:.1f}")])
    return {"kept": kept, "levels": levels}


STUDY = Study(_measure, _tables, abilities)
