"""Mixture of corpora: each document's corpus is drawn by weight."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
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
