"""Reading of token sequences to forget or to retain, and padded batches of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from curvfast.errors import InputError
from curvfast.model.rows import IGNORED_LABEL

SCORED = ("all", "suffix")


@dataclass(frozen=True, eq=False)
class Example:
    """One token sequence without padding, on the CPU."""

    tokens: Tensor
    """int64 [length]."""
    targets: Tensor
    """int64 [length]: the token where its prediction is scored, else -100; never the first."""


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """A batch of sequences, padded on the right."""

    rows: Tensor
    """int64 [rows]: indices of the examples."""
    tokens: Tensor
    """int64 [rows, length]."""
    mask: Tensor
    """bool [rows, length]: True where a token is real."""
    targets: Tensor
    """int64 [rows, length]; -100 where nothing is scored, padding included."""

    @property
    def counts(self) -> Tensor:
        """Scored tokens of each row, int64 [rows]; at least 1."""
        return (self.targets != IGNORED_LABEL).sum(1)


def read_examples(source: Any, name: str, scored: str = "all") -> tuple[Example, ...]:
    """Read token sequences; padding and masked positions are left out.

    Args:
        source: Sequences, each a passage (with ``prefix`` and ``suffix``), a sequence of token ids
            or an int tensor [length]; or batches, each an int tensor [rows, length] or a mapping
            with ``input_ids`` and, where there are, ``attention_mask`` and ``labels``.
        name: Name of the argument, for messages.
        scored: ``"all"``: every token but a sequence's first is to be predicted; ``"suffix"``: of a
            passage only its suffix. Sequences without a prefix are all suffix.

    Returns:
        At least one example, each with at least one token to predict.

    Raises:
        InputError: If there is none, or one is no sequence of at least two token ids.
    """
    items = [source] if _is_one(source) else source
    if not isinstance(items, Iterable):
        raise InputError(
            f"{name}= is {source!r}; pass passages, sequences of token ids, or batches of them"
        )
    found = [
        example
        for number, item in enumerate(items)
        for example in _read(item, f"{name}[{number}]", scored)
    ]
    if not found:
        raise InputError(f"{name}= holds no sequence; pass at least one")
    return tuple(found)


def collate(examples: Sequence[Example], rows: Tensor) -> TokenBatch:
    """Return the examples at the indices ``rows``, int64 [rows], padded to the longest of them."""
    chosen = [examples[row] for row in rows.tolist()]
    tokens = pad_sequence([example.tokens for example in chosen], batch_first=True)
    targets = pad_sequence(
        [example.targets for example in chosen], batch_first=True, padding_value=IGNORED_LABEL
    )
    lengths = torch.tensor([len(example.tokens) for example in chosen])
    return TokenBatch(rows, tokens, torch.arange(tokens.shape[1]) < lengths[:, None], targets)


def in_order(examples: Sequence[Example], size: int) -> Iterator[TokenBatch]:
    """Yield every example once, in batches of at most ``size``."""
    for rows in torch.arange(len(examples)).split(size):
        yield collate(examples, rows)


def drawn(
    examples: Sequence[Example], size: int, generator: torch.Generator
) -> Iterator[TokenBatch]:
    """Yield endless batches of at most ``size``: every example once an epoch, reshuffled each."""
    while True:
        for rows in torch.randperm(len(examples), generator=generator).split(size):
            yield collate(examples, rows)


def _is_one(source: Any) -> bool:
    if isinstance(source, Tensor):
        return source.dim() == 1
    return isinstance(source, Mapping) or _is_passage(source)


def _is_passage(item: Any) -> bool:
    return hasattr(item, "prefix") and hasattr(item, "suffix")


def _read(item: Any, where: str, scored: str) -> Iterator[Example]:
    prompt = 0
    if _is_passage(item):
        prompt = len(item.prefix) if scored == "suffix" else 0
        item = [*item.prefix, *item.suffix]
    batch = item if isinstance(item, Mapping) else {"input_ids": item}
    tokens = _ids(batch.get("input_ids"), where)
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    real = torch.ones_like(tokens) if mask is None else _ids(mask, where)
    targets = tokens if labels is None else _ids(labels, where)
    if not tokens.shape == real.shape == targets.shape:
        raise InputError(f"{where}: input_ids, attention_mask and labels differ in shape")
    for row in range(len(tokens)):
        kept = real[row].bool()
        target = targets[row][kept].clone()
        target[: max(1, prompt)] = IGNORED_LABEL
        if not (target != IGNORED_LABEL).any():
            raise InputError(
                f"{where} has no token to predict: each sequence needs two real tokens, and a "
                "passage a suffix"
            )
        yield Example(tokens[row][kept], target)


def _ids(values: Any, where: str) -> Tensor:
    try:
        found = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{where} is a {type(values).__name__}, not token ids: pass passages, sequences of "
            "token ids, or batches with 'input_ids'"
        ) from error
    if found.dim() not in (1, 2) or found.is_floating_point() or found.is_complex():
        raise InputError(
            f"{where} is {found.dtype} {list(found.shape)}; token ids are integers, [length] or "
            "[rows, length]"
        )
    return found.long() if found.dim() == 2 else found.long()[None]
