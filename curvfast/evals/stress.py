"""Stress test of recitation: prompts shifted, lengthened, or with offset positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.display import aligned
from curvfast.errors import InputError
from curvfast.evals.memorization import Passage
from curvfast.evals.recitation import Ids, leading_matches, predictions

AS_IS = "as is"
# Tolerances relative to the largest logit; rotary angles of large positions round more.
_ROUNDING = 1e-3
_EPSILONS = 16


@dataclass(frozen=True, eq=False)
class StressReport:
    """Recited lengths of passages for each variant of their prompts."""

    variants: tuple[str, ...]
    """``"as is"`` first."""
    lengths: Tensor
    """int64 [passages, variants]: tokens recited before the first mismatch."""
    possible: Tensor
    """int64 [passages, variants]: length of the text to recite."""
    offset_change: dict[int, float]
    """For each offset: the largest change of a logit, over the largest logit."""
    rounding: float
    """Largest change that counts as rounding, for the dtype of the model."""

    @property
    def longest(self) -> Tensor:
        """The score of each passage, int64 [passages]: the longest match of any variant."""
        return self.lengths.amax(1)

    @property
    def offsets_are_void(self) -> bool:
        """Whether offsets changed logits by rounding only: the positions are then relative."""
        return bool(self.offset_change) and max(self.offset_change.values()) <= self.rounding

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON-able values."""
        return {
            "variants": list(self.variants),
            "lengths": self.lengths.tolist(),
            "possible": self.possible.tolist(),
            "longest": self.longest.tolist(),
            "offset_change": {str(offset): c for offset, c in self.offset_change.items()},
            "offsets_are_void": self.offsets_are_void,
        }

    def __str__(self) -> str:
        """Return a line a variant: the share recited to its end, and the mean length."""
        whole = (self.lengths == self.possible).double().mean(0).tolist()
        mean = self.lengths.double().mean(0).tolist()
        rows = [
            [name, f"{w:.1%}", f"{m:.1f}"]
            for name, w, m in zip(self.variants, whole, mean, strict=True)
        ]
        lines = [aligned([["prompt", "recited", "mean length"], *rows])]
        if self.offsets_are_void:
            lines.append(
                f"Offsets changed logits by at most {max(self.offset_change.values()):.1e} of the "
                "largest: rounding. This model knows relative positions only (RoPE, ALiBi), so a "
                "constant shift of all positions tests nothing."
            )
        return "\n".join(lines)


def stress(
    model: nn.Module,
    passages: Sequence[Passage],
    *,
    left: Sequence[int] = (),
    right: Sequence[int] = (4, 8),
    offsets: Sequence[int] = (),
    contexts: Sequence[Ids] | None = None,
    opening: int = 0,
    batch_size: int = 32,
) -> StressReport:
    """Recite passages from changed prompts; the score of each is its longest match.

    A model that recites from one prompt alone may only look as if it had forgotten. Prompts are
    lengthened to the *left* by the true text before them, and moved to the *right* into the suffix:
    the first k tokens are dropped and k of the suffix given. Unequal prompts are padded on the left
    under an attention mask, and their position ids count real tokens, so padding moves nothing. An
    *offset* renumbers all positions; with rotary positions that is an exact no-op up to rounding,
    and the report says so where it is. Sources: Huang et al., "Demystifying Verbatim Memorization",
    2024; arXiv 2510.24256, appendix.

    Args:
        model: A causal language model of transformers; in eval mode meanwhile.
        passages: Prompts and continuations.
        left: By how many tokens prompts are lengthened.
        right: By how many they are moved; at least one token of each suffix must be left.
        offsets: What is added to all position ids.
        contexts: For ``left``: the true tokens before each prefix, the nearest last.
        opening: How many first tokens of each prefix, such as a BOS, stay in front.
        batch_size: Passages at a time.

    Returns:
        Lengths of exact matches from the first token on, by passage and variant.

    Raises:
        InputError: If there is no passage, one is too short for a variant, or the model takes no
            position ids.
    """
    _check(passages, left, right, offsets, contexts)
    cases: list[tuple[str, list[Ids], list[Ids], int]] = []
    prompts: list[Ids] = [p.prefix for p in passages]
    suffixes: list[Ids] = [p.suffix for p in passages]
    cases.append((AS_IS, prompts, suffixes, 0))
    for k in left:
        longer = [
            (*p.prefix[:opening], *c[-k:], *p.prefix[opening:])
            for c, p in zip(contexts or (), passages, strict=True)
        ]
        cases.append((f"left {k}", list(longer), suffixes, 0))
    for k in right:
        moved = [
            (*p.prefix[:opening], *(*p.prefix, *p.suffix[:k])[opening + k :]) for p in passages
        ]
        cases.append((f"right {k}", list(moved), [p.suffix[k:] for p in passages], 0))
    cases += [(f"offset {k}", prompts, suffixes, k) for k in offsets]
    lengths = [
        leading_matches(model, given, rest, offset=offset, batch_size=batch_size)
        for _, given, rest, offset in cases
    ]
    return StressReport(
        tuple(case[0] for case in cases),
        torch.tensor(lengths).T,
        torch.tensor([[len(rest) for rest in case[2]] for case in cases]).T,
        {k: _change(model, prompts, suffixes, k, batch_size) for k in offsets},
        max(_ROUNDING, _EPSILONS * torch.finfo(next(model.parameters()).dtype).eps),
    )


def _change(
    model: nn.Module, prompts: list[Ids], suffixes: list[Ids], offset: int, batch_size: int
) -> float:
    """Return the largest change of a logit under an offset, over the largest, in one batch."""
    n = batch_size
    one, other = (
        next(predictions(model, prompts[:n], suffixes[:n], offset=k, batch_size=n)).logits.float()
        for k in (0, offset)
    )
    return float((one - other).abs().max() / one.abs().max())


def _check(
    passages: Sequence[Passage],
    left: Sequence[int],
    right: Sequence[int],
    offsets: Sequence[int],
    contexts: Sequence[Ids] | None,
) -> None:
    if not passages:
        raise InputError("stress() needs passages to recite; got none")
    if min((*left, *right, *offsets), default=1) < 1:
        raise InputError(
            f"left={tuple(left)}, right={tuple(right)}, offsets={tuple(offsets)}: pass numbers of "
            "tokens from 1 on; the unchanged prompt is always tried"
        )
    shortest = min(len(p.suffix) for p in passages)
    if max(right, default=0) >= shortest:
        raise InputError(
            f"right={tuple(right)} leaves nothing of a suffix of {shortest} tokens; pass less"
        )
    if left and (
        contexts is None or len(contexts) != len(passages) or min(map(len, contexts)) < max(left)
    ):
        raise InputError(
            f"left={tuple(left)} needs contexts=, for each of the {len(passages)} passages at "
            f"least {max(left)} tokens that stand before it; mine(context={max(left)}) keeps them"
        )
