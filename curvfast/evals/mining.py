"""mine(): search of a corpus for passages that a model recites."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor, nn

from curvfast.display import Bar
from curvfast.errors import InputError
from curvfast.evals.memorization import Passage
from curvfast.evals.recitation import leading_matches

# About a third of tokens are predicted by chance, four in a row rarely.
_HEAD, _GROWTH = 4, 4


@dataclass(frozen=True)
class Mined:
    """A recited passage and where it was found."""

    passage: Passage
    text: int
    """Number of the text it was first found in."""
    start: int
    """Position in that text at which its prefix begins."""
    before: tuple[int, ...]
    """The tokens before it there."""
    occurrences: int
    """Number of windows of the corpus that hold it."""


@dataclass(frozen=True)
class MiningReport:
    """Report of :func:`mine`: recited passages, and counts of the windows searched."""

    found: tuple[Mined, ...]
    """In the order of the corpus, each once."""
    windows: int
    """Windows searched, repeated ones and copies included."""
    distinct: int
    """Distinct windows."""
    copies: int
    """Distinct windows left out because the suffix copies the text before it."""
    forwarded: int
    """Tokens the model was run on; without stages it would be all tokens of distinct windows."""

    @property
    def passages(self) -> list[Passage]:
        """The passages, as :func:`curvfast.evaluate` takes them."""
        return [mined.passage for mined in self.found]

    def __str__(self) -> str:
        """Return the counts on one line."""
        return (
            f"{len(self.found)} passages recited of {self.distinct - self.copies} distinct windows "
            f"({self.windows} windows, {self.copies} copies left out, {self.forwarded} tokens run)"
        )


@dataclass(frozen=True)
class _Window:
    tokens: tuple[int, ...]
    text: int
    start: int
    before: tuple[int, ...]
    digest: bytes


def mine(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | Tensor],
    *,
    prefix: int = 64,
    suffix: int = 48,
    stride: int | None = None,
    opening: Sequence[int] = (),
    context: int = 0,
    copies: bool = False,
    batch_size: int = 32,
    progress: bool = True,
) -> MiningReport:
    """Find passages that a causal language model recites: windows whose suffix it predicts.

    A window is recited if the likeliest token is the true one at every position of its suffix,
    given all before it in the window; greedy decoding then writes the same. Four tokens of each
    suffix are tested first and only survivors further, so most windows cost little more than their
    prefix. Repeated windows are tested once: 16 bytes and a count are held for each distinct one.
    Source: arXiv 2510.24256, section on data.

    Args:
        model: A causal language model of transformers; in eval mode meanwhile.
        batches: As in :func:`curvfast.collect_from`; each row is one text, padding apart.
        prefix: Tokens of the prompt.
        suffix: Tokens that must follow.
        stride: Tokens between the starts of two windows of a text; None sets them end to end.
        opening: Token ids prepended to each prefix, such as BOS.
        context: Number of tokens before each window to keep with it, for :func:`stress`.
        copies: Whether to include suffixes that repeat the text before them with some period, which
            are copied from the prompt rather than recalled.
        batch_size: Windows at a time.
        progress: Whether a bar counts windows (on a terminal only).

    Returns:
        Each recited passage once, and counts of the windows searched.

    Raises:
        InputError: If an argument is out of range, or no text is as long as a window.
    """
    span = prefix + suffix
    step = span if stride is None else stride
    if min(prefix, suffix, step, batch_size) < 1 or context < 0:
        raise InputError(
            f"prefix={prefix}, suffix={suffix}, stride={stride}, batch_size={batch_size}, "
            f"context={context}: all but context must be at least 1"
        )
    seen: dict[bytes, int] = {}
    counts = dict.fromkeys(("copies", "forwarded"), 0)

    def fresh(bar: Bar) -> Iterator[_Window]:
        for window in _windows(batches, span, step, context):
            bar.advance(1)
            seen[window.digest] = seen.get(window.digest, 0) + 1
            if seen[window.digest] > 1:
                continue
            if not copies and repeats(window.tokens, prefix):
                counts["copies"] += 1
                continue
            yield window

    def survivors(windows: Iterator[_Window], length: int) -> Iterator[_Window]:
        while part := list(islice(windows, batch_size)):
            prompts = [(*opening, *window.tokens[:prefix]) for window in part]
            goals = [window.tokens[prefix : prefix + length] for window in part]
            counts["forwarded"] += sum(len(p) + len(g) for p, g in zip(prompts, goals, strict=True))
            runs = leading_matches(model, prompts, goals, batch_size=batch_size)
            yield from (window for window, run in zip(part, runs, strict=True) if run == length)

    with Bar("mine", None, "window", progress) as bar:
        windows = fresh(bar)
        for length in _stages(suffix):
            windows = survivors(windows, length)
        known = list(windows)
    if not seen:
        raise InputError(
            f"no text of the batches has the {span} tokens of a window; pass longer rows, or a "
            "smaller prefix= or suffix="
        )
    found = tuple(
        Mined(
            Passage((*opening, *w.tokens[:prefix]), w.tokens[prefix:]),
            w.text, w.start, w.before, seen[w.digest],
        )
        for w in known
    )  # fmt: skip
    return MiningReport(found, sum(seen.values()), len(seen), **counts)


def repeats(tokens: Sequence[int], prefix: int) -> bool:
    """Return whether the tokens after ``prefix`` repeat those before it with one period.

    Args:
        tokens: A window.
        prefix: Where its suffix begins; no period is longer.
    """
    suffix = tuple(tokens[prefix:])
    return any(
        suffix == tuple(tokens[prefix - period : len(tokens) - period])
        for period in range(1, prefix + 1)
    )


def _stages(suffix: int) -> list[int]:
    """Return the number of suffix tokens tested at each stage; the last is all of them."""
    lengths = []
    length = _HEAD
    while length < suffix:
        lengths.append(length)
        length *= _GROWTH
    return [*lengths, suffix]


def _windows(batches: Iterable[Any], span: int, step: int, context: int) -> Iterator[_Window]:
    for number, tokens in enumerate(_texts(batches)):
        for start in range(0, len(tokens) - span + 1, step):
            own = tokens[start : start + span]
            digest = hashlib.blake2b(array("q", own).tobytes(), digest_size=16).digest()
            before = tokens[max(0, start - context) : start]
            yield _Window(tuple(own), number, start, tuple(before), digest)


def _texts(batches: Iterable[Any]) -> Iterator[list[int]]:
    """Yield the real tokens of each row."""
    for batch in batches:
        tokens, mask = batch, None
        if isinstance(batch, Mapping):
            tokens, mask = batch.get("input_ids"), batch.get("attention_mask")
        if not isinstance(tokens, Tensor) or tokens.dim() != 2:
            raise InputError(
                "a batch has no input_ids [texts, length]; pass {'input_ids': ..., "
                "'attention_mask': ...} or a tensor of token ids"
            )
        for row, own in enumerate(tokens.tolist()):
            yield (
                own
                if mask is None
                else [token for token, real in zip(own, mask[row].tolist(), strict=True) if real]
            )
