"""Shuffling of a stream in bounded memory, by a separate generator."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

# Some 300 MB of text: ten thousand web pages fit, ten thousand books do not.
_MOST_CHARACTERS = 1 << 28


def own_generator(seed: int, purpose: str) -> random.Random:
    """Return a generator independent of the global one and of those for other purposes."""
    return random.Random(f"curvfast.data {seed} {purpose}")


def shuffled(texts: Iterable[str], capacity: int, generator: random.Random) -> Iterator[str]:
    """Yield every text once, each drawn at random from a buffer that is then refilled.

    Args:
        texts: The stream.
        capacity: Most texts held, fewer where they are very long; 0 and 1 keep the order.
        generator: Source of randomness.

    Yields:
        The texts; never more than ``capacity`` of them are read ahead.
    """
    held: list[str] = []
    characters = 0
    for text in texts:
        held.append(text)
        characters += len(text)
        while held and (len(held) >= capacity or characters > _MOST_CHARACTERS):
            taken = _take(held, generator)
            characters -= len(taken)
            yield taken
    while held:
        yield _take(held, generator)


def _take(held: list[str], generator: random.Random) -> str:
    chosen = generator.randrange(len(held))
    held[chosen], held[-1] = held[-1], held[chosen]
    return held.pop()
