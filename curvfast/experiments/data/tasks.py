"""Tasks that generate questions with one right answer: arithmetic and logic.

Answers are written with the lowest digit first, the order of carrying, and at least two digits: a
model of a million weights learns that in minutes, and the usual order not at all.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
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


_ONE_IN = 10
_TERMS = range(10, 40)
_SMALL = range(1, 6)


def arithmetic(seed: int) -> tuple[Task, ...]:
    """Return the tasks: two-digit addition and subtraction, and three small numbers.

    Args:
        seed: Seed of the held-out expressions.

    Returns:
        ``addition``, ``subtraction`` and ``multi_step``.
    """
    pairs = [f"{a}+{b}" for a, b in product(_TERMS, repeat=2)]
    gaps = [f"{a}-{b}" for a, b in product(_TERMS, repeat=2) if a >= b]
    chains = [
        f"{a}{first}{b}{second}{c}"
        for a, b, c in product(_SMALL, repeat=3)
        for first, second in product("+-", repeat=2)
        if 0 <= value(f"{a}{first}{b}{second}{c}")
    ]
    named = {"addition": (pairs, 4.0), "subtraction": (gaps, 3.0), "multi_step": (chains, 2.0)}
    return tuple(
        _task(name, expressions, weight, seed) for name, (expressions, weight) in named.items()
    )


def value(expression: str) -> int:
    """Return the value of numbers joined by + and -."""
    return sum(int(term) for term in expression.replace("-", "+-").split("+"))


def written(number: int) -> str:
    """Return a number's digits, at least two, lowest first, and a full stop."""
    return f"{number:02d}"[::-1] + "."


def _task(name: str, expressions: list[str], weight: float, seed: int) -> Task:
    order = expressions[:]
    random.Random(f"{seed} {name}").shuffle(order)
    count = len(order) // _ONE_IN
    asked, learnt = order[:count], order[count:]

    def draw(rng: random.Random, held_out: bool) -> Question:
        expression = rng.choice(asked if held_out else learnt)
        right = value(expression)
        near = (right + step for step in (-10, -2, -1, 1, 2, 10))
        wrong = rng.sample([n for n in near if n >= 0], 3)
        return Question(f"{expression}=", written(right), tuple(written(n) for n in wrong))

    return Task(name, "arithmetic", draw, weight=weight)


_PEOPLE = ("Ann", "Bob", "Cid", "Dot", "Eve", "Fay", "Gus", "Hob")
_THINGS = ("ball", "book", "coin", "cup", "hat", "key", "map", "ring")
_WORDS = {True: " true.", False: " false."}


def logic() -> tuple[Task, ...]:
    """Return the tasks: ``boolean`` expressions, ``ordering`` of numbers, object ``tracking``."""
    return (
        Task("boolean", "logic", _boolean),
        Task("ordering", "logic", _ordering, weight=1.5),
        Task("tracking", "logic", _tracking, weight=1.5),
    )


def _boolean(rng: random.Random, _: bool) -> Question:
    """Draw an expression of two or three truth values; by symmetry half of them are true."""
    text, truth = _expression(rng, rng.choice((2, 3)))
    return Question(f"Logic: {text} is", _WORDS[truth], (_WORDS[not truth],))


def _expression(rng: random.Random, leaves: int) -> tuple[str, bool]:
    if leaves == 1:
        truth = rng.random() < 0.5
        text = "true" if truth else "false"
        return (f"not {text}", not truth) if rng.random() < 0.3 else (text, truth)
    left = rng.randrange(1, leaves)
    (one, first), (two, second) = _expression(rng, left), _expression(rng, leaves - left)
    one = f"({one})" if left > 1 else one
    two = f"({two})" if leaves - left > 1 else two
    if rng.random() < 0.5:
        return f"{one} and {two}", first and second
    return f"{one} or {two}", first or second


def _ordering(rng: random.Random, _: bool) -> Question:
    """Draw a comparison of two two-digit numbers; by symmetry half of them are true."""
    one, other = rng.sample(range(10, 100), 2)
    word, truth = rng.choice((("more", one > other), ("less", one < other)))
    return Question(f"Order: {one} is {word} than {other} is", _WORDS[truth], (_WORDS[not truth],))


def _tracking(rng: random.Random, _: bool) -> Question:
    """Draw a story of an object handed on once or twice, and ask who has it."""
    *chain, first_idle, second_idle = rng.sample(_PEOPLE, 5)
    thing, handed = rng.choice(_THINGS), rng.choice((1, 2))
    said = [f"{chain[0]} has the {thing}."]
    for giver, taker, idle in zip(
        chain[:handed], chain[1:], (first_idle, second_idle), strict=False
    ):
        said.append(f"{giver} gives it to {taker}.")
        if rng.random() < 0.5:
            said.append(f"{idle} waits.")
    named = [name for name in (*chain, first_idle, second_idle) if name in " ".join(said)]
    holder = chain[handed]
    return Question(
        f"Track: {' '.join(said)} The {thing} is with",
        f" {holder}.",
        tuple(f" {name}." for name in named if name != holder),
    )
