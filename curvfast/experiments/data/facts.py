"""Tasks on facts about fictional people: memorized, or given in the prompt."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from curvfast.errors import InputError
from curvfast.experiments.data.tasks import Question, Task

_NAMES = (
    "Abe", "Ann", "Bea", "Bob", "Cal", "Cid", "Dee", "Dot", "Eli", "Eve", "Fay", "Flo",
    "Gil", "Gus", "Hal", "Hob", "Ian", "Ida", "Jan", "Joe", "Kay", "Kit", "Leo", "Lou",
    "Max", "May", "Nan", "Ned", "Oda", "Ola", "Pam", "Pat", "Rex", "Roy", "Sid", "Sue",
    "Ted", "Tom", "Uma", "Una", "Val", "Vic", "Walt", "Wes", "Xan", "Yan", "Zeb", "Zoe",
)  # fmt: skip
_VALUES = {
    "home": ("Ashby", "Belden", "Carrow", "Dover", "Everley", "Falstone", "Glenmore", "Harwick"),
    "trade": ("baker", "carpenter", "doctor", "farmer", "miner", "painter", "sailor", "weaver"),
}  # fmt: skip
_CHOICES = 4


@dataclass(frozen=True)
class FactTable:
    """Facts of known people, and the names of unknown people."""

    facts: dict[tuple[str, str], str]
    """(person, relation) -> value."""
    strangers: tuple[str, ...]


def table(seed: int, people: int) -> FactTable:
    """Draw the facts.

    Args:
        seed: Seed of the known people and their facts.
        people: Number of known people, of 48.

    Returns:
        A home and a trade for each person known.

    Raises:
        InputError: If fewer than two people would be known, or fewer than two unknown.
    """
    if not 2 <= people <= len(_NAMES) - 2:
        raise InputError(
            f"people={people}: there are {len(_NAMES)} names, and stories are told of two people, "
            f"known or strangers; pass 2 to {len(_NAMES) - 2}"
        )
    rng = random.Random(f"{seed} facts")
    names = rng.sample(_NAMES, len(_NAMES))
    facts = {
        (name, relation): rng.choice(values)
        for name in names[:people]
        for relation, values in _VALUES.items()
    }
    return FactTable(facts, tuple(names[people:]))


def fact_tasks(known: FactTable) -> tuple[Task, ...]:
    """Return the tasks on facts.

    Args:
        known: Facts to be memorized.

    Returns:
        ``closed_book`` asks for them. ``open_book`` states a home and a trade of unknown people and
        asks for one of the two; ``counterfactual`` states false facts of known people.
    """

    def recall(rng: random.Random, _: bool) -> Question:
        (name, relation), right = rng.choice(list(known.facts.items()))
        return _asked(name, relation, right, rng)

    people = sorted({name for name, _ in known.facts})
    return (
        Task("closed_book", "closed_book", recall, weight=2.5),
        _stories("open_book", known, known.strangers),
        _stories("counterfactual", known, people),
    )


def _stories(name: str, known: FactTable, people: Sequence[str]) -> Task:
    def told(rng: random.Random, _: bool) -> Question:
        return _story(known, people, rng)[1][0]

    def lesson(rng: random.Random) -> tuple[str, ...]:
        story, questions = _story(known, people, rng)
        turns = [turn for question in questions for turn in question.turns]
        return (turns[0], *(turn.removeprefix(story) for turn in turns[1:]))

    return Task(name, "open_book", told, lesson, weight=1.5)


def _story(
    known: FactTable, people: Sequence[str], rng: random.Random
) -> tuple[str, tuple[Question, ...]]:
    """Return the statement of a home and a trade, of one or two people, and questions on them."""
    one, other = rng.sample(people, 2)
    told = []
    relations = rng.sample(list(_VALUES), 2)
    for name, relation in zip((one, rng.choice((one, other))), relations, strict=True):
        truth = known.facts.get((name, relation))
        told.append((name, relation, rng.choice([v for v in _VALUES[relation] if v != truth])))
    story = "Story:" + "".join(f" {_prompt(name, rel)} {value}." for name, rel, value in told)
    questions = (
        _asked(
            name, relation, value, rng, story=story + " ",
            first=[v for v in (known.facts.get((name, relation)),) if v],
        )
        for name, relation, value in rng.sample(told, 2)
    )  # fmt: skip
    return story, tuple(questions)


def _prompt(name: str, relation: str) -> str:
    return f"The {relation} of {name} is"


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
    wrong_answers = tuple(f" {value}." for value in wrong[: _CHOICES - 1])
    return Question(story + _prompt(name, relation), f" {right}.", wrong_answers)
