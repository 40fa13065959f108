"""The models that studies look at, each with the curvature of its population, by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from curvfast.core.eigenbasis import Eigenbasis
from curvfast.demo.corpus import Corpus, load_corpus
from curvfast.demo.lm import prose_factors
from curvfast.demo.recipe import Recipe
from curvfast.demo.training import trained_model
from curvfast.lab import lm, vit
from curvfast.lab.lessons import corpus_of, trained_lm
from curvfast.lab.lm_recipe import LmRecipe
from curvfast.lab.noise import NoisySplit
from curvfast.lab.vit_recipe import RECIPES, VitRecipe
from curvfast.studies.study import Ask


@dataclass(frozen=True, eq=False)
class DemoLm:
    """The demo's language model, which recites passages; curvature of prose without them."""

    recipe: Recipe
    corpus: Corpus
    model: Any
    basis: Eigenbasis


@dataclass(frozen=True, eq=False)
class LabVit:
    """The lab's vision transformer, which knows wrong labels; curvature as its recipe has it."""

    recipe: VitRecipe
    split: NoisySplit
    model: Any
    basis: Eigenbasis


def demo_lm(ask: Ask) -> DemoLm:
    """Return the demo's language model at a seed, trained now or read from the cache."""
    recipe = replace(Recipe(), seed=ask.seed)
    recipe = recipe.quick() if ask.quick else recipe
    ask.say("the demo's language model (cached), and the curvature of prose")
    corpus = load_corpus(recipe)
    model = trained_model(recipe, corpus)
    return DemoLm(recipe, corpus, model, prose_factors(model, recipe, corpus).eigh())


def lab_vit(ask: Ask) -> LabVit:
    """Return the lab's vision transformer of digits at a seed, trained now or from the cache."""
    recipe = replace(RECIPES["mnist"], seed=ask.seed)
    recipe = recipe.quick() if ask.quick else recipe
    ask.say("the lab's vision transformer (cached), and the curvature of its pictures")
    split = vit.split_of(recipe)
    model = vit.trained_vit(recipe, split)
    basis = vit.vit_basis(model, split, recipe.statistics[0], layers="mlp", seed=recipe.seed)
    return LabVit(recipe, split, model, basis)


def lab_lm_basis(ask: Ask) -> Eigenbasis:
    """Return the eigenbasis of the lab's language model at a seed, as its experiment has it."""
    recipe = LmRecipe().seeded(ask.seed)
    recipe = recipe.quick() if ask.quick else recipe
    ask.say("the lab's language model (cached), and the curvature of prose and lessons")
    corpus = corpus_of(recipe)
    return lm.lm_basis(trained_lm(recipe, corpus), recipe, corpus)
