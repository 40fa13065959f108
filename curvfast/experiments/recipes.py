"""Recipes: configurations of the demo and the lab, whose hashes are cache keys of models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any


def key_of(facts: Mapping[str, Any]) -> str:
    """Return a name for JSON-able ``facts``: the first 16 hexadecimal digits of their SHA-256."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


SWEEP = (0.6, 0.7, 0.8, 0.9, 0.93, 0.94, 0.95, 0.97, 0.98, 0.99)


@dataclass(frozen=True)
class Recipe:
    """Sizes, schedule and seed of the demo's language model and of its edit."""

    seed: int = 0
    vocabulary: int = 2048
    hidden: int = 128
    mlp: int = 384
    layers: int = 4
    heads: int = 4
    length: int = 128
    passages: int = 64
    """Passages to recite, half of speeches and half of the Bible."""
    prefix: int = 32
    suffix: int = 24
    bible_characters: int = 1_000_000
    """Extent of the Bible that passages are taken from."""
    held_out_windows: int = 240
    steps: int = 450
    prose_rows: int = 20
    """Rows of prose in a batch."""
    canary_rows: int = 12
    """Rows of two passages each in a batch."""
    learning_rate: float = 3e-3
    statistics_tokens: int = 60_000
    mass: float = 0.95
    """ρ of the edit that is reported and saved."""
    sweep: tuple[float, ...] = SWEEP

    def quick(self) -> Recipe:
        """Return a recipe of seconds, which runs every step but gives no meaningful results."""
        return replace(
            self, vocabulary=400, hidden=32, mlp=64, layers=2, heads=2, passages=8, steps=6,
            prose_rows=4, canary_rows=4, held_out_windows=8, statistics_tokens=1500,
            bible_characters=50_000, sweep=(0.8, 0.95),
        )  # fmt: skip

    def training_key(self) -> str:
        """Return a name for the trained model: a hash of what its training depends on."""
        facts = asdict(self)
        for later in ("statistics_tokens", "mass", "sweep", "held_out_windows"):
            del facts[later]
        return key_of(facts)


# Increased whenever a task or the packing of lessons changes, which invalidates cached models.
_EDITION = 2
_TEXT = Recipe(
    vocabulary=1024,
    passages=48,
    steps=1200,
    prose_rows=5,
    canary_rows=3,
    learning_rate=2e-3,
    held_out_windows=120,
)


@dataclass(frozen=True)
class LmRecipe:
    """Sizes, mix and seed of a language model that learns tasks beside prose and passages."""

    text: Recipe = _TEXT
    """Model, prose and passages; its edit and sweep are not used."""
    lesson_rows: int = 12
    """Rows of lessons in a batch, beside those of prose and of passages."""
    tokenizer_lessons: int = 40_000
    """Lessons in the tokenizer's training text, enough for their words to become tokens."""
    people: int = 24
    """People with two facts each to be memorized."""
    questions: int = 100
    """Questions asked of each task."""
    statistics_lessons: float = 0.2
    """Share of lessons in the text for curvature; the rest is prose."""
    blocks: tuple[int, ...] | None = None
    """Blocks whose MLPs are edited; None means all."""
    mass: float = 0.93
    """ρ of the edit that is reported: of seed 0, the largest that leaves under 5 % recited."""
    sweep: tuple[float, ...] = (0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.99)

    @property
    def seed(self) -> int:
        """The seed of everything random."""
        return self.text.seed

    def seeded(self, seed: int) -> LmRecipe:
        """Return the same recipe with another seed."""
        return replace(self, text=replace(self.text, seed=seed))

    def quick(self) -> LmRecipe:
        """Return a recipe of seconds, which runs every step but gives no meaningful results."""
        return replace(
            self, text=replace(self.text.quick(), seed=self.seed), lesson_rows=4,
            tokenizer_lessons=4000, people=8, questions=4, sweep=(0.8, 0.95),
        )  # fmt: skip

    def training_key(self) -> str:
        """Return a name for the trained model: a hash of what its training depends on."""
        facts = asdict(self)
        for later in ("text", "questions", "statistics_lessons", "blocks", "mass", "sweep"):
            del facts[later]
        return key_of({**facts, "text": self.text.training_key(), "edition": _EDITION})


@dataclass(frozen=True)
class Statistics:
    """The data that curvature is measured on: images, tokens and labels."""

    images: str = "fresh"
    """``"fresh"`` images, never trained on, or the ``"training"`` ones."""
    tokens: str = "all"
    """``"all"`` tokens of an image, or ``"cls"`` only, as in the paper."""
    labels: str = "sampled"
    """``"sampled"`` from the model (the true Fisher), or ``"given"`` (the empirical one)."""

    def __str__(self) -> str:
        """Return the three words."""
        return f"{self.images}, {self.tokens}, {self.labels}"


STATISTICS = (
    Statistics(),
    Statistics(tokens="cls"),
    Statistics(images="training"),
    Statistics(images="training", tokens="cls"),
    Statistics(labels="given"),
    Statistics(images="training", labels="given"),
    Statistics(images="training", tokens="cls", labels="given"),
)

# Fields that training does not depend on.
_LATER = (
    "mass", "sweep", "study", "blocks", "statistics", "fresh_images", "validation_images"
)  # fmt: skip


@dataclass(frozen=True)
class VitRecipe:
    """Data, sizes, schedule and seed of a vision transformer, and its edits."""

    data: str
    """``"mnist"`` or ``"fashion"``."""
    train_images: int
    fresh_images: int
    validation_images: int
    noise: float
    """Share of training pictures with a wrong label."""
    epochs: int
    weight_decay: float
    mass: float
    """ρ of the edit that is reported."""
    sweep: tuple[float, ...]
    study: tuple[float, ...]
    """Further ρ at which statistics and blocks are compared."""
    seed: int = 0
    blocks: tuple[int, ...] | None = None
    """Blocks whose fc1 and fc2 are edited; None means all."""
    hidden: int = 64
    mlp: int = 256
    layers: int = 4
    heads: int = 4
    patch: int = 7
    batch: int = 128
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    statistics: tuple[Statistics, ...] = STATISTICS
    """Statistics that are compared; the first are those of the edit."""

    def quick(self) -> VitRecipe:
        """Return a recipe of seconds, which runs every step but gives no meaningful results."""
        return replace(
            self, train_images=200, fresh_images=100, validation_images=100, hidden=16, mlp=32,
            layers=2, heads=2, patch=14, epochs=2, sweep=(0.8, 0.95), study=(0.8,),
        )  # fmt: skip

    def training_key(self) -> str:
        """Return a name for the trained model: a hash of what its training depends on."""
        facts = asdict(self)
        for later in _LATER:
            del facts[later]
        return key_of(facts)


_SWEEP = (0.75, 0.85, 0.9, 0.95, 0.97, 0.98, 0.985, 0.99, 0.995)
_STUDY = (0.9, 0.97)
# 700 fresh digits are too few for factors of width 256: training images are used.
_MNIST = VitRecipe(
    "mnist", 3600, 700, 700, noise=0.2, epochs=40, weight_decay=1.0, mass=0.985, sweep=_SWEEP,
    study=_STUDY, statistics=(STATISTICS[2], *STATISTICS[:2], *STATISTICS[3:]),
)  # fmt: skip
_FASHION = VitRecipe(
    "fashion", 4000, 4000, 2000, noise=0.2, epochs=40, weight_decay=0.3, mass=0.95, sweep=_SWEEP,
    study=_STUDY,
)  # fmt: skip
RECIPES: Mapping[str, VitRecipe] = {
    "mnist": _MNIST,
    "fashion": _FASHION,
    # Trained to zero loss: on its training images its curvature is that of the noise.
    "overfit": replace(_FASHION, noise=0.1, epochs=60, mass=0.9),
}
