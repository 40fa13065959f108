"""The document stream of several corpora: order of files, shuffling, mixing."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from curvfast.data.corpus import Corpus
from curvfast.data.mixture import Document, mixed, own_generator, shuffled
from curvfast.data.settings import StreamConfig
from curvfast.errors import InputError

# Shards are often sorted by kind, so that no single one is representative of the corpus.
_OPEN_PARTS = 16


def documents(corpora: Sequence[Corpus], config: StreamConfig) -> Iterator[Document]:
    """Yield one shard's documents in the order given by ``config`` and its seed.

    Args:
        corpora: As many as weights, or one.
        config: Shard, seed, buffer, weights, and what happens at a corpus's end.

    Yields:
        Documents.

    Raises:
        InputError: If a part cannot be read, or a corpus holds no document.
    """
    streams = []
    for number, corpus in enumerate(corpora):
        generator = own_generator(config.seed, f"corpus {number}")
        if config.shuffle_buffer:
            texts = _spread(corpus, config.shard, generator)
        else:
            texts = _in_order(corpus, config.shard)
        texts = shuffled(_not_empty(texts, corpus, config.shard), config.shuffle_buffer, generator)
        streams.append(texts)
    generator = own_generator(config.seed, "mixture")
    yield from mixed(streams, config.weights or (1.0,), config.exhausted, generator)


def _in_order(corpus: Corpus, shard: tuple[int, int]) -> Iterator[str]:
    for number in range(len(corpus.parts)):
        yield from corpus.documents(number, shard)


def _spread(corpus: Corpus, shard: tuple[int, int], generator: random.Random) -> Iterator[str]:
    """Read the parts in random order, several at a time, in proportion to their sizes."""
    order = list(range(len(corpus.parts)))
    generator.shuffle(order)
    sizes = [part.size() for part in corpus.parts]
    known = all(size is not None for size in sizes)
    for first in range(0, len(order), _OPEN_PARTS):
        chosen = order[first : first + _OPEN_PARTS]
        texts = [corpus.documents(number, shard) for number in chosen]
        shares = [max(1, sizes[number] or 0) if known else 1 for number in chosen]
        for document in mixed(texts, shares, "continue", generator):
            yield document.text


def _not_empty(texts: Iterator[str], corpus: Corpus, shard: tuple[int, int]) -> Iterator[str]:
    empty = True
    for text in texts:
        empty = False
        yield text
    # One shard of several may be empty.
    if empty and shard[1] == 1:
        raise InputError(
            f"{corpus.name} holds no document: every row is blank, or it is an iterator that an "
            "earlier pass used up (pass a list or a Dataset, which can be read again)"
        )
