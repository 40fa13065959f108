"""evaluate(): memorization and perplexity, the measures of the paper's tables, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from curvfast.errors import InputError
from curvfast.evals.memorization import Passage, memorization
from curvfast.evals.perplexity import perplexity


@dataclass(frozen=True)
class EvalReport:
    """Memorization scores and perplexity of a model; None for what was not requested."""

    strict: float | None = None
    """Share of passages continued exactly."""
    loose: float | None = None
    """Share of passages continued with at most a quarter of the suffix edited."""
    levenshtein: float | None = None
    """Mean edit distance over suffix length."""
    perplexity: float | None = None
    """exp of the token-weighted mean loss."""

    def to_dict(self) -> dict[str, float]:
        """Return the measures that were taken."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        """Return the measures on one line."""
        return "  ".join(f"{key} {value:.4g}" for key, value in self.to_dict().items())


def evaluate(
    model: nn.Module,
    *,
    passages: Sequence[Passage] | None = None,
    text: Iterable[Mapping[str, Any] | Tensor] | None = None,
    batch_size: int = 32,
) -> EvalReport:
    """Measure memorization of ``passages`` and perplexity on ``text``.

    Args:
        model: A causal language model of transformers.
        passages: Passages to recite, as token ids.
        text: Batches of held-out text: dicts with ``input_ids`` and ``attention_mask``, or tensors.
        batch_size: Passages at a time.

    Returns:
        The measures asked for.

    Raises:
        InputError: If neither is given, or one is empty.
    """
    if passages is None and text is None:
        raise InputError("evaluate() needs passages= to recite, text= to predict, or both")
    found: dict[str, float] = {}
    if passages is not None:
        scores = memorization(model, passages, batch_size=batch_size)
        found |= {k: getattr(scores, k) for k in ("strict", "loose", "levenshtein")}
    if text is not None:
        found["perplexity"] = perplexity(model, text)
    return EvalReport(**found)
