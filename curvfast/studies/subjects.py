"""Trained models of the studies, each with its eigenbasis of curvature."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from curvfast.core.eigenbasis import Eigenbasis
from curvfast.demo.recipe import Recipe
from curvfast.lab import vit
from curvfast.lab.lm_recipe import LmRecipe
from curvfast.lab.noise import NoisySplit
from curvfast.lab.vit_recipe import RECIPES, VitRecipe
from curvfast.studies.reciters import RecitingModel, demo_subject, lab_subject
from curvfast.studies.study import StudyConfig


@dataclass(frozen=True, eq=False)
class LabVit:
    """The lab's vision transformer, which memorized wrong labels, with its eigenbasis."""

    recipe: VitRecipe
    split: NoisySplit
    model: Any
    basis: Eigenbasis


def demo_lm(ask: StudyConfig) -> RecitingModel:
    """Return the demo's language model at a seed, trained now or read from the cache."""
    recipe = replace(Recipe(), seed=ask.seed)
    return demo_subject(recipe.quick() if ask.quick else recipe, ask.say)


def lab_lm(ask: StudyConfig) -> RecitingModel:
    """Return the lab's language model at a seed, trained now or read from the cache."""
    recipe = LmRecipe().seeded(ask.seed)
    return lab_subject(recipe.quick() if ask.quick else recipe, ask.say)


def lab_vit(ask: StudyConfig) -> LabVit:
    """Return the lab's vision transformer of digits at a seed, trained now or from the cache."""
    recipe = replace(RECIPES["mnist"], seed=ask.seed)
    recipe = recipe.quick() if ask.quick else recipe
    ask.say("the lab's vision transformer (cached), and the curvature of its pictures")
    split = vit.split_of(recipe)
    model = vit.trained_vit(recipe, split, ask.say)
    basis = vit.vit_basis(model, split, recipe.statistics[0], layers="mlp", seed=recipe.seed)
    return LabVit(recipe, split, model, basis)
