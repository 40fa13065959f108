"""Verbatim memorization: greedy continuations compared with the true ones.

Greedy continuation of a prefix, compared with the true suffix on token ids. Strict: all equal.
Loose: 1 - edits / length ≥ 0.75. Levenshtein: mean of edits / length (arXiv 2510.24256, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import nn

from curvfast.errors import InputError
from curvfast.evals.generation import greedy

LOOSE_SIMILARITY = 0.75


@dataclass(frozen=True)
class Passage:
    """A passage as token ids: a prompt, and its true continuation."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


@dataclass(frozen=True)
class MemorizationScores:
    """Strict, loose and Levenshtein scores of a set of passages."""

    strict: float
    """Share of passages continued exactly."""
    loose: float
    """Share continued with at most a quarter of the suffix edited."""
    levenshtein: float
    """Mean edit distance over suffix length: 0 is verbatim."""
    passages: int

    def to_dict(self) -> dict[str, float]:
        """Return the scores as JSON-able values."""
        return asdict(self)


def memorization(
    model: nn.Module, passages: Sequence[Passage], *, batch_size: int = 32
) -> MemorizationScores:
    """Measure how many ``passages`` a causal language model recites.

    Args:
        model: A causal language model of transformers.
        passages: Prefixes and suffixes; suffixes may differ in length.
        batch_size: Passages at a time.

    Returns:
        Strict, loose and Levenshtein scores.

    Raises:
        InputError: If there is no passage, or one has an empty part.
    """
    if not passages or any(not p.suffix or not p.prefix for p in passages):
        raise InputError("memorization needs passages, each with a prefix and a suffix")
    length = max(len(passage.suffix) for passage in passages)
    continued = greedy(model, [p.prefix for p in passages], length, batch_size=batch_size)
    return score([p.suffix for p in passages], continued)


def score(
    suffixes: Sequence[Sequence[int]], continued: Sequence[Sequence[int]]
) -> MemorizationScores:
    """Compare continuations, cut to the suffix's length, with the true suffixes."""
    from rapidfuzz.distance import Levenshtein

    distances = [
        Levenshtein.distance(list(suffix), list(found[: len(suffix)])) / len(suffix)
        for suffix, found in zip(suffixes, continued, strict=True)
    ]
    n = len(distances)
    return MemorizationScores(
        strict=sum(d == 0 for d in distances) / n,
        loose=sum(1 - d >= LOOSE_SIMILARITY for d in distances) / n,
        levenshtein=sum(distances) / n,
        passages=n,
    )
