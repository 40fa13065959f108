"""Models that studies measure, what each recites, and the curvature of its population."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from curvfast.experiments.data.corpus import TokenizedCorpus, load_corpus
from curvfast.experiments.data.images import NoisySplit
from curvfast.experiments.data.lessons import corpus_of
from curvfast.experiments.models.language import trained_lm, trained_model
from curvfast.experiments.models.vit import split_of, trained_vit
from curvfast.experiments.recipes import RECIPES, LmRecipe, Recipe, VitRecipe
from curvfast.experiments.runs import lab_vit as vit_run
from curvfast.experiments.runs.demo_lm import prose_factors
from curvfast.experiments.runs.lab_lm import lm_basis
from curvfast.experiments.studies.study import StudyConfig
from curvfast.kfac.eigenbasis import Eigenbasis

ROWS = 16
"""Texts in a batch."""


@dataclass(frozen=True, eq=False)
class RecitingModel:
    """A trained model with its eigenbasis, memorized passages and unseen controls.

    Both sets are from the same sources, half speeches, then half Bible, of equal length, each text
    after an end-of-text token; curvature is measured on text without them.
    """

    recipe: Recipe
    """Recipe of the text and of the model's size."""
    model: Any
    basis: Eigenbasis
    corpus: TokenizedCorpus
    passages: Tensor
    """int64 [passages, 1 + prefix + suffix]."""
    controls: Tensor
    """int64 [controls, 1 + prefix + suffix], as many where the sources are long enough."""


def demo_subject(recipe: Recipe, report_stage: Callable[[str], None]) -> RecitingModel:
    """Return the demo's model, trained now or read from the cache, and its texts.

    Args:
        recipe: Sizes and seed.
        report_stage: Called with one line before each stage.

    Returns:
        The subject; its basis is the one the demo edits by.

    Raises:
        DownloadError: If the text cannot be had.
    """
    corpus = load_corpus(recipe)
    report_stage(f"the demo's model, which recites {recipe.passages} passages (cached)")
    model = trained_model(recipe, corpus, report_stage)
    report_stage("measuring its curvature on prose")
    return _subject(recipe, model, prose_factors(model, recipe, corpus).eigh(), corpus)


def lab_subject(recipe: LmRecipe, report_stage: Callable[[str], None]) -> RecitingModel:
    """Return the lab's model, trained now or read from the cache, and its texts.

    Args:
        recipe: Sizes and seed.
        report_stage: Called with one line before each stage.

    Returns:
        The subject; its basis is the one the lab edits by.

    Raises:
        DownloadError: If the text cannot be had.
        InputError: If the recipe's share of lessons is not in [0, 1].
    """
    corpus = corpus_of(recipe)
    report_stage(
        f"the lab's model, which recites {recipe.text.passages} passages and knows tasks (cached)"
    )
    model = trained_lm(recipe, corpus, report_stage)
    report_stage("measuring its curvature on prose and lessons")
    return _subject(recipe.text, model, lm_basis(model, recipe, corpus), corpus)


def _subject(
    recipe: Recipe, model: Any, basis: Eigenbasis, corpus: TokenizedCorpus
) -> RecitingModel:
    passages, controls = (pad(texts, (1, 0)) for texts in (corpus.canaries, corpus.controls))
    return RecitingModel(recipe, model, basis, corpus, passages, controls)


@dataclass(frozen=True, eq=False)
class LabVit:
    """The lab's vision transformer, which memorized wrong labels, with its eigenbasis."""

    recipe: VitRecipe
    split: NoisySplit
    model: Any
    basis: Eigenbasis


def demo_lm(config: StudyConfig) -> RecitingModel:
    """Return the demo's language model at a seed, trained now or read from the cache."""
    recipe = replace(Recipe(), seed=config.seed)
    return demo_subject(recipe.quick() if config.quick else recipe, config.report_stage)


def lab_lm(config: StudyConfig) -> RecitingModel:
    """Return the lab's language model at a seed, trained now or read from the cache."""
    recipe = LmRecipe().seeded(config.seed)
    return lab_subject(recipe.quick() if config.quick else recipe, config.report_stage)


def lab_vit(config: StudyConfig) -> LabVit:
    """Return the lab's vision transformer of digits at a seed, trained now or from the cache."""
    recipe = replace(RECIPES["mnist"], seed=config.seed)
    recipe = recipe.quick() if config.quick else recipe
    config.report_stage("the lab's vision transformer (cached), and the curvature of its pictures")
    split = split_of(recipe)
    model = trained_vit(recipe, split, config.report_stage)
    basis = vit_run.vit_basis(model, split, recipe.statistics[0], layers="mlp", seed=recipe.seed)
    return LabVit(recipe, split, model, basis)
