"""Questions with one right answer, and tasks that generate them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from curvfast.evals.choices import Choice
from curvfast.evals.memorization import Passage

_TRIES = 50


@dataclass(frozen=True)
class Question:
    """A question: a prompt, its answer, and wrong answers of the same form."""

    prompt: str
    answer: str
    """With the full stop: "1" is no answer to 4 + 8."""
    wrong: tuple[str, ...]

    @property
    def turns(self) -> tuple[str, str]:
        """The prompt and the answer."""
        return self.prompt, self.answer


@dataclass(frozen=True)
class Task:
    """A task: a generator of questions of one form."""

    name: str
    kind: str
    """``"arithmetic"``, ``"closed_book"``, ``"open_book"`` or ``"logic"``."""
    draw: Callable[[random.Random, bool], Question]
    """Draws a question, one kept out of training if the flag is set."""
    lesson: Callable[[random.Random], tuple[str, ...]] | None = None
    """Draws a training text of alternating prompts and answers; None: a single question."""
    weight: float = 1.0
    """Sampling weight of the task among the lessons."""

    def learn(self, rng: random.Random) -> tuple[str, ...]:
        """Draw a training text of alternating prompts and answers."""
        return self.lesson(rng) if self.lesson else self.draw(rng, False).turns

    def ask(self, count: int, seed: int) -> list[Question]:
        """Draw distinct test questions.

        Args:
            count: Number of questions; fewer are returned if the task has no more.
            seed: Seed of the choice.

        Returns:
            Held-out questions, if the task holds any out.
        """
        rng = random.Random(f"{seed} {self.name}")
        drawn = (self.draw(rng, True) for _ in range(_TRIES * count))
        distinct: dict[str, Question] = {}
        for question in drawn:
            distinct.setdefault(question.prompt, question)
            if len(distinct) == count:
                break
        return list(distinct.values())


def as_passage(tokenizer: Any, question: Question) -> Passage:
    """Return a question as a prompt after an end-of-text token, and the answer to generate."""
    return Passage((0, *_ids(tokenizer, question.prompt)), _ids(tokenizer, question.answer))


def as_choice(tokenizer: Any, question: Question) -> Choice:
    """Return a question as a prompt after an end-of-text token, and answers to choose from."""
    answers = (question.answer, *question.wrong)
    return Choice(
        (0, *_ids(tokenizer, question.prompt)), tuple(_ids(tokenizer, a) for a in answers)
    )


def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
