"""Facts about people who do not exist: learnt by heart, or told in the prompt."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from curvfast.lab.questions import Question, Task

_STARTS = ("Al", "Bren", "Cor", "Dun", "El", "Far", "Gor", "Hal", "Is", "Jor", "Kel", "Lom")
_ENDS = ("by", "dan", "fin", "gar", "lo", "mir", "ric", "sa", "tor", "wen")
_VALUES = {
    "home": ("Ashby", "Belden", "Carrow", "Dover", "Everley", "Falstone", "Glenmore", "Harwick"),
    "trade": ("baker", "carpenter", "doctor", "farmer", "miner", "painter", "sailor", "weaver"),
}  # fmt: skip
_TEMPLATES = {
    "home": ("{} lives in", "The home of {} is"),
    "trade": ("{} works as a", "The trade of {} is"),
}
_TOLD = 3
_CHOICES = 4


@dataclass(frozen=True)
class Table:
    """What is true of each person, and people nothing is known of."""

    facts: dict[tuple[str, str], str]
    """(person, relation) -> value."""
    strangers: tuple[str, ...]


def table(seed: int, people: int) -> Table:
    """Draw the facts.

    Args:
        seed: Seed of who is known, and of what is true of them.
        people: How many of the 120 people are known.

    Returns:
        A home and a trade for each person known.
    """
    rng = random.Random(f"{seed} facts")
    names = ["".join(parts) for parts in product(_STARTS, _ENDS)]
    rng.shuffle(names)
    facts = {
        (name, relation): rng.choice(values)
        for name in names[:people]
        for relation, values in _VALUES.items()
    }
    return Table(facts, tuple(names[people:]))


def fact_tasks(known: Table) -> tuple[Task, ...]:
    """Return the tasks on facts.

    Args:
        known: Facts to be learnt by heart.

    Returns:
        ``closed_book`` asks for them. ``open_book`` tells facts about strangers and asks for one of
        those; ``counterfactual`` tells of known people what is not true.
    """

    def recall(rng: random.Random, _: bool) -> Question:
        (name, relation), right = rng.choice(list(known.facts.items()))
        return _asked(name, relation, right, rng)

    def told(rng: random.Random, _: bool) -> Question:
        return _story(known, rng, of_strangers=True)[1][0]

    def counter(rng: random.Random, _: bool) -> Question:
        return _story(known, rng, of_strangers=False)[1][0]

    def lesson(rng: random.Random) -> str:
        story, questions = _story(known, rng, of_strangers=rng.random() < 0.5)
        return story + "".join(q.text.removeprefix(story) for q in questions)

    return (
        Task("closed_book", "closed_book", recall, weight=2.5),
        Task("open_book", "open_book", told, lesson, weight=0.5),
        Task("counterfactual", "open_book", counter, lesson, weight=0.5),
    )


def _story(known: Table, rng: random.Random, *, of_strangers: bool) -> tuple[str, list[Question]]:
    """Return facts told of three people, and a question about each, in another order."""
    relation = rng.choice(list(_VALUES))
    people = known.strangers if of_strangers else sorted({name for name, _ in known.facts})
    names = rng.sample(people, _TOLD)
    truth = [known.facts.get((name, relation), "") for name in names]
    values = rng.sample(_VALUES[relation], _TOLD)
    while any(a == b for a, b in zip(truth, values, strict=True)):
        values = rng.sample(_VALUES[relation], _TOLD)
    template = rng.choice(_TEMPLATES[relation])
    story = "Story:" + "".join(
        f" {template.format(name)} {value}." for name, value in zip(names, values, strict=True)
    )
    order = rng.sample(range(_TOLD), _TOLD)
    questions = [
        _asked(
            names[i], relation, values[i], rng, story=story + " ",
            first=[*([truth[i]] if truth[i] else []), *values],
        )
        for i in order
    ]  # fmt: skip
    return story, questions


def _asked(
    name: str,
    relation: str,
    right: str,
    rng: random.Random,
    *,
    story: str = "",
    first: Sequence[str] = (),
) -> Question:
    """Return a question whose wrong answers are those of ``first``, then any of the relation."""
    others = rng.sample(_VALUES[relation], len(_VALUES[relation]))
    wrong = [value for value in dict.fromkeys([*first, *others]) if value != right]
    prompt = story + rng.choice(_TEMPLATES[relation]).format(name)
    return Question(prompt, f" {right}.", tuple(f" {v}." for v in wrong[: _CHOICES - 1]))
