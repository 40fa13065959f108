"""Configuration of the experiment on tasks."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from curvfast.demo.caching import key_of
from curvfast.demo.recipe import Recipe

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
