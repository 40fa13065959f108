"""Outputs of a run beside results.json, for a report: curvature outlines and continuations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from curvfast.editing.edit import edited
from curvfast.evals.generation import greedy
from curvfast.evals.memorization import Passage
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.report.curvature import FILE as CURVATURE
from curvfast.report.curvature import save_curvature
from curvfast.report.recitals import FILE as PASSAGES
from curvfast.report.recitals import Continuation, save_passages

_SHOWN = 6


def keep_curvature(out: Path, basis: Eigenbasis, mass: float) -> None:
    """Write the outlines of a basis's spectra and of its selection at ``mass``."""
    save_curvature(out / CURVATURE, basis, basis.keep(mass=mass))


def keep_passages(
    out: Path,
    model: nn.Module,
    tokenizer: Any,
    passages: Sequence[Passage],
    basis: Eigenbasis,
    mass: float,
) -> None:
    """Write a model's continuations of six passages before and after an edit.

    Args:
        out: Folder.
        model: The unedited model; it is restored when this returns.
        tokenizer: Turns tokens into text.
        passages: All passages; the six are evenly spread, regardless of their continuations.
        basis: Eigenbases by layer name.
        mass: ρ of the edit.
    """
    count = min(_SHOWN, len(passages))
    shown = [passages[i * len(passages) // count] for i in range(count)]
    before = _continued(model, tokenizer, shown)
    with edited(model, basis, mass=mass):
        after = _continued(model, tokenizer, shown)
    texts = zip(shown, before, after, strict=True)
    save_passages(
        out / PASSAGES,
        [
            Continuation(
                _text(tokenizer, passage.prefix), _text(tokenizer, passage.suffix), one, two
            )
            for passage, one, two in texts
        ],
        chosen=f"{count} of {len(passages)} passages, spread evenly, not chosen by their outcome.",
    )  # fmt: skip


def _continued(model: nn.Module, tokenizer: Any, passages: Sequence[Passage]) -> list[str]:
    longest = max(len(passage.suffix) for passage in passages)
    found = greedy(model, [passage.prefix for passage in passages], longest)
    return [
        _text(tokenizer, tokens[: len(passage.suffix)])
        for passage, tokens in zip(passages, found, strict=True)
    ]


def _text(tokenizer: Any, tokens: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=True)
    return text
