"""Logic tasks, whose answers follow from the prompt: booleans, comparisons, object tracking."""

from __future__ import annotations

import random

from curvfast.lab.questions import Question, Task

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
