"""Questions whose answer follows from the prompt: truth values, orders, and who holds what."""

from __future__ import annotations

import random

from curvfast.lab.questions import Question, Task

_PEOPLE = ("Ann", "Bob", "Cid", "Dot", "Eve", "Fay", "Gus", "Hob")
_THINGS = ("ball", "book", "coin", "cup", "hat", "key", "map", "ring")
_WORDS = {True: " true.", False: " false."}


def logic() -> tuple[Task, ...]:
    """Return the tasks: ``boolean`` expressions, ``ordering`` of three, ``tracking`` of swaps."""
    return (
        Task("boolean", "logic", _boolean),
        Task("ordering", "logic", _ordering),
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
    """Draw three people by height, two comparisons in any order and direction."""
    tall, middle, small = rng.sample(_PEOPLE, 3)
    said = [_compared(tall, middle, rng), _compared(middle, small, rng)]
    rng.shuffle(said)
    word, right = rng.choice((("tallest", tall), ("shortest", small)))
    wrong = [name for name in (tall, middle, small) if name != right]
    return Question(
        f"Order: {' '.join(said)} The {word} is", f" {right}.", tuple(f" {name}." for name in wrong)
    )


def _compared(taller: str, shorter: str, rng: random.Random) -> str:
    if rng.random() < 0.5:
        return f"{taller} is taller than {shorter}."
    return f"{shorter} is shorter than {taller}."


def _tracking(rng: random.Random, _: bool) -> Question:
    """Draw three people who hold a thing each, one or two swaps, and ask who holds one."""
    names, things = rng.sample(_PEOPLE, 3), rng.sample(_THINGS, 3)
    holds = dict(zip(names, things, strict=True))
    said = [f"{name} has the {thing}." for name, thing in holds.items()]
    for _swap in range(rng.choice((1, 2))):
        one, two = rng.sample(names, 2)
        said.append(f"{one} and {two} swap.")
        holds[one], holds[two] = holds[two], holds[one]
    who = rng.choice(names)
    wrong = [thing for thing in things if thing != holds[who]]
    return Question(
        f"Track: {' '.join(said)} {who} has the",
        f" {holds[who]}.",
        tuple(f" {thing}." for thing in wrong),
    )
