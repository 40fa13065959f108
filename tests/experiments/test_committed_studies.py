"""What stands in benchmarks/results/studies is whole, and of the recipes in the code."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from curvfast.experiments.recipes import RECIPES, LmRecipe, Recipe
from curvfast.experiments.studies.names import NAMES

STUDIES = Path(__file__).parents[2] / "benchmarks" / "results" / "studies"
SEEDS = (0, 1, 2)


def read(study: str, seed: int) -> dict[str, Any]:
    return json.loads((STUDIES / study / f"seed-{seed}.json").read_text(encoding="utf-8"))


def plain(recipe: Any) -> Any:
    return json.loads(json.dumps(asdict(recipe)))


@pytest.mark.parametrize("study", NAMES)
def test_every_study_is_there_at_full_size_with_three_seeds_and_a_picture(study: str) -> None:
    for seed in SEEDS:
        found = read(study, seed)
        assert (found["study"], found["seed"], found["quick"]) == (study, seed, False)
    assert (STUDIES / study / "figure.png").is_file()


@pytest.mark.parametrize("seed", SEEDS)
def test_figures_are_of_the_recipes_in_the_code(seed: int) -> None:
    demo, lab = plain(replace(Recipe(), seed=seed)), plain(LmRecipe().seeded(seed))
    assert read("table1", seed)["figures"]["recipe"] == demo
    # Checkpoints are measured on less text than the demo's model is.
    less = {"held_out_windows": 120, "statistics_tokens": 20_000}
    assert read("dynamics", seed)["figures"]["recipe"] == demo | less
    assert read("recovery", seed)["figures"]["recipe"] == lab
    assert read("figure3", seed)["figures"]["lab"]["recipe"] == lab
    assert read("figure4", seed)["figures"]["mass"] == lab["mass"]
    for name, found in read("table2", seed)["figures"].items():
        assert found["recipe"] == plain(replace(RECIPES[name], seed=seed))
