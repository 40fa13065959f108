"""Packing of documents' tokens into sequences, and collation of sequences into batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSequence:
    """A sequence, and the number of tokens left of the last document read."""

    tokens: list[int]
    rest: int


def pack_sequences(
    documents: Iterable[list[int]], length: int, shortest: int, *, join: bool
) -> Iterator[TokenSequence]:
    """Pack documents into sequences of ``length`` tokens, in order.

    A sequence is yielded as soon as it is full. So a full sequence is followed by a suffix of the
    last document read, of ``rest`` tokens, and the documents not read yet: a count of documents and
    that number define the position.

    Args:
        documents: Token ids.
        length: Tokens a sequence.
        shortest: Sequences of fewer tokens are left out.
        join: Whether a sequence may hold several documents; if not, each document ends one.

    Yields:
        Sequences; those shorter than ``length`` are the stream's last, or a document's.
    """
    held: list[int] = []
    for tokens in documents:
        start = 0
        while len(tokens) - start >= length - len(held):
            stop = start + length - len(held)
            yield TokenSequence(held + tokens[start:stop], len(tokens) - stop)
            held, start = [], stop
        held += tokens[start:]
        if not join:
            if len(held) >= shortest:
                yield TokenSequence(held, 0)
            held = []
    if len(held) >= shortest:
        yield TokenSequence(held, 0)


def collate(sequences: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """Collate sequences into a batch, padded on the right to the longest.

    Args:
        sequences: Token ids, none empty.
        pad: Id of padding.

    Returns:
        ``input_ids`` int64 [sequences, longest]; where something is padded also ``attention_mask``,
        int64 of the same shape. Models are faster without one.
    """
    longest = max(map(len, sequences))
    padded = [[*s, *[pad] * (longest - len(s))] for s in sequences]
    batch = {"input_ids": torch.tensor(padded)}
    if any(len(s) < longest for s in sequences):
        lengths = torch.tensor([len(s) for s in sequences])
        batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    return batch
