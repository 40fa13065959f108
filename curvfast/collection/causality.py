"""Causality: whether position t predicts the token at t + 1, read off the logits' gradient.

The smallest entry of a cross-entropy's gradient at a row is at its label: p - 1 there, p elsewhere.
Where it is the label of the next position, in all rows, the token stream is causal.
"""

from __future__ import annotations

from dataclasses import dataclass

from curvfast.kfac.known import CONVENTION, PROVEN, TOLD

_GRADIENT = "the logits' gradient"


@dataclass
class Causality:
    """What is known of a measurement's causality; the first batch that shows it decides."""

    causal: bool
    by: str
    """Who says so."""
    how: str = CONVENTION
    contradicted: str | None = None
    """What a later batch showed instead, if one did."""

    @classmethod
    def of(cls, told: bool | None, convention: tuple[bool, str]) -> Causality:
        """Return what is known before the first batch.

        Args:
            told: The caller's ``skip_last``.
            convention: What the model's class says, and who says it.
        """
        if told is not None:
            return cls(told, f"skip_last={told}", TOLD)
        return cls(*convention)

    def see(self, shifted: bool | None, batch: int) -> None:
        """Take what the gradient of one batch shows.

        Args:
            shifted: Whether position t predicts label t + 1; None where the rows do not tell.
            batch: Its number, for messages.
        """
        if shifted is None:
            return
        if shifted == self.causal:
            if self.how == CONVENTION:
                self.by, self.how = _GRADIENT, PROVEN
        elif self.how == CONVENTION and batch == 1:
            self.causal, self.by, self.how = shifted, _GRADIENT, PROVEN
        elif self.contradicted is None:
            predicts = "the token after it" if shifted else "the token at its own place"
            self.contradicted = (
                f"the logits' gradient of batch {batch} shows that a position predicts {predicts}, "
                f"and rows were counted by {self.by}, as if it did not. Pass skip_last={shifted}"
            )
