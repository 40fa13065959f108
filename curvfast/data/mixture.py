"""Mixture and shuffle: several corpora as one stream, drawn by weight, in bounded memory."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

EXHAUSTED = ("stop", "continue")


@dataclass(frozen=True)
class Document:
    """A text, and the index of the corpus it is from."""

    corpus: int
    text: str


def mixed(
    streams: Sequence[Iterator[str]],
    weights: Sequence[float],
    exhausted: str,
    generator: random.Random,
) -> Iterator[Document]:
    """Draw from ``streams`` by weight.

    Args:
        streams: Texts, one stream for each corpus.
        weights: Positive, of any sum; each corpus's share of the *documents*.
        exhausted: What happens when a stream is drawn that has ended: ``"stop"`` ends the mixture,
            whose shares are right up to there; ``"continue"`` goes on with the others, at the
            ratio of their weights, until all have ended.
        generator: Source of randomness.

    Yields:
        Documents.
    """
    left = dict(enumerate(weights))
    while left:
        (drawn,) = generator.choices(list(left), list(left.values()))
        try:
            text = next(streams[drawn])
        except StopIteration:
            if exhausted == "stop":
                return
            del left[drawn]
        else:
            yield Document(drawn, text)


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
