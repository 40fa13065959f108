"""Arithmetic tasks: addition and subtraction; one in ten expressions is held out.

Answers are written with the lowest digit first, the order of carrying, and at least two digits: a
model of a million weights learns that in minutes, and the usual order not at all.
"""

from __future__ import annotations

import random
from itertools import product

from curvfast.lab.questions import Question, Task

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
