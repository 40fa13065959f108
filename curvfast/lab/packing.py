"""Packing of lessons into rows of one length, without attention between lessons."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from curvfast.errors import InputError
from curvfast.rows import IGNORED_LABEL

Encoded = Sequence[Sequence[int]]
"""Tokens of a lesson's turns, alternating prompts and answers."""


def packed(encoded: Iterable[Encoded], length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pack whole lessons into rows, an end-of-text token before each and as padding.

    Args:
        encoded: Lessons, in order.
        length: Tokens in a row.

    Yields:
        Tokens and labels, int64 [length]; only answers have labels, since prompts are random. An
        incomplete last row is dropped.

    Raises:
        InputError: If a lesson is longer than a row.
    """
    tokens, labels, at = *_blank(length), 1
    for lesson in encoded:
        size = sum(map(len, lesson))
        if size >= length:
            raise InputError(
                f"a lesson of {size} tokens and the end-of-text token before it do not fit in a "
                f"row of {length}; pass a longer length"
            )
        if at + size > length:
            yield tokens, labels
            tokens, labels, at = *_blank(length), 1
        for number, turn in enumerate(lesson):
            here = slice(at, at + len(turn))
            tokens[here] = torch.tensor(turn)
            if number % 2:
                labels[here] = tokens[here]
            at += len(turn)
        at += 1


def restarting(tokens: Tensor) -> Tensor:
    """Return positions that restart at 0 with every end-of-text token, int64 [rows, length].

    transformers blocks attention across restarting positions, if it is called without a mask and
    without a cache.

    Args:
        tokens: int64 [rows, length]; end of text is 0.
    """
    place = torch.arange(tokens.shape[1]).expand_as(tokens)
    return place - torch.where(tokens == 0, place, 0).cummax(1).values


def _blank(length: int) -> tuple[Tensor, Tensor]:
    tokens = torch.zeros(length, dtype=torch.long)
    return tokens, torch.full_like(tokens, IGNORED_LABEL)
