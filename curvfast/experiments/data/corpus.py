"""The demo's tokenized corpus: training prose, passages to memorize, and held-out text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvfast.evals.memorization import Passage
from curvfast.experiments.data.texts import bible, speeches
from curvfast.experiments.recipes import Recipe
from curvfast.hf.small import train_tokenizer

# Of every twenty speeches one is held out for perplexity and one provides passages.
_GROUP, _HELD_OUT, _SOURCE = 20, 7, 17


@dataclass(frozen=True)
class TokenizedCorpus:
    """Tokenized text of the demo, split by whole speeches."""

    tokenizer: Any
    train: Tensor
    """Training prose, int64 [tokens]."""
    held_out: Tensor
    """Windows of speeches never trained on, int64 [windows, length]."""
    canaries: Tensor
    """Passages trained on repeatedly, int64 [passages, prefix + suffix]."""
    controls: Tensor
    """Passages of the same sources, never trained on: as many, or fewer where those are short."""
    prefix: int

    def passages(self) -> list[Passage]:
        """Return the canaries as prompts and continuations, each after an end-of-text token."""
        return [
            Passage((0, *row[: self.prefix]), tuple(row[self.prefix :]))
            for row in self.canaries.tolist()
        ]


def load_corpus(recipe: Recipe, also: Sequence[str] = ()) -> TokenizedCorpus:
    """Read, split and tokenize the demo's text.

    Args:
        recipe: Sizes and seed.
        also: Further training texts. The tokenizer is then trained on these and on a quarter of the
            prose, so that it covers their words, and separates digits.

    Returns:
        The corpus; half the passages are of speeches not otherwise trained on, half of the Bible.

    Raises:
        DownloadError: If the text cannot be had.
    """
    documents = [document.text for document in speeches()]
    by_role = {
        role: [text for i, text in enumerate(documents) if i % _GROUP == role]
        for role in (_HELD_OUT, _SOURCE)
    }
    prose = [t for i, t in enumerate(documents) if i % _GROUP not in (_HELD_OUT, _SOURCE)]
    tokenizer = (
        train_tokenizer([*prose[::4], *also], recipe.vocabulary, digits=True)
        if also
        else train_tokenizer(prose, recipe.vocabulary)
    )
    rng = random.Random(recipe.seed)
    span = recipe.prefix + recipe.suffix
    half = recipe.passages // 2
    source = _encode(tokenizer, by_role[_SOURCE])
    scripture = _encode(tokenizer, [bible()[: recipe.bible_characters]])
    # The first half of each is trained on; drawing the rest as well does not change that half.
    drawn = [_windows(stream, span, 2 * half, rng) for stream in (source, scripture)]
    held_out = _encode(tokenizer, by_role[_HELD_OUT])
    return TokenizedCorpus(
        tokenizer=tokenizer,
        train=_encode(tokenizer, prose),
        held_out=_rows(held_out, recipe.length)[: recipe.held_out_windows],
        canaries=torch.stack([window for windows in drawn for window in windows[:half]]),
        controls=torch.stack([window for windows in drawn for window in windows[half:]]),
        prefix=recipe.prefix,
    )


def _encode(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Return the texts as one stream of tokens, an end-of-text token before each."""
    ids = [0]
    for encoded in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        ids += [*encoded, 0]
    return torch.tensor(ids)


def _windows(stream: Tensor, length: int, count: int, rng: random.Random) -> list[Tensor]:
    """Return ``count`` windows that do not overlap and hold no end of text."""
    starts = list(range(0, len(stream) - length, length))
    rng.shuffle(starts)
    windows = (stream[start : start + length] for start in starts)
    return [w for w, _ in zip((w for w in windows if (w != 0).all()), range(count), strict=False)]


def _rows(stream: Tensor, length: int) -> Tensor:
    return stream[: len(stream) // length * length].view(-1, length)
