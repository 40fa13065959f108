"""What the gradient at some rows of logits shows, on the host, and by which tolerances."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

AGREEING = 0.9
"""Of a label that the gradient names in so many rows, the rest is rounding."""
# Odds against as many rows agreeing by chance, each one in as many as there are classes.
_CERTAIN = 1e5
# Fewer rows than this do not tell a shifted label from one in place.
_VOTES = 8
# More is no label smoothing, but a label taken for another class.
_MOST_SMOOTHING = 0.5
# Fewer classes do not tell label smoothing's intercept from its slope.
_SMOOTHED_CLASSES = 10
_FIT = ("scale", "spread", "residual", "row_sum", "least")


@dataclass(frozen=True)
class Tolerance:
    """The largest departures of a true cross-entropy, each relative to its scale s."""

    residual: float
    spread: float
    row_sum: float
    nearest: float
    """Relative error of the mean of s that rounding always explains."""
    farthest: float
    """And the largest that it explains where s differs by row as much."""
    slack: float
    """Relative distance of two candidates that s does not tell apart."""


FINE = Tolerance(
    residual=1e-4, spread=1e-3, row_sum=1e-4, nearest=5e-5, farthest=1e-3, slack=2e-5
)  # fmt: skip
"""Of logits and gradients in float32 or better."""
COARSE = Tolerance(
    residual=0.03, spread=0.05, row_sum=0.03, nearest=5e-3, farthest=1e-2, slack=1e-3
)  # fmt: skip
"""Of logits or gradients in 16 bits."""


@dataclass(frozen=True)
class Fit:
    """How well the gradients of some rows fit s (p − q), q being a row's label."""

    scale: float
    """Mean of s over rows; 0 where no row shows it."""
    spread: float
    """Largest |s of a row / mean − 1|."""
    residual: float
    """Largest departure of a row off its label, relative to s ‖p‖ off the label."""
    row_sum: float
    """Largest |sum of a row's gradient| / s."""
    least: float
    """Smallest s of a row."""

    def error(self, tolerance: Tolerance) -> float:
        """Return the relative error that the mean of s may have."""
        return min(max(self.spread, tolerance.nearest), tolerance.farthest)

    def holds_in_each_row(self, tolerance: Tolerance) -> bool:
        """Return whether every row is one of a cross-entropy, of whatever scale."""
        return (
            self.least > 0
            and self.residual <= tolerance.residual
            and self.row_sum <= tolerance.row_sum
        )

    def holds(self, tolerance: Tolerance) -> bool:
        """Return whether all rows are of one cross-entropy."""
        return (
            math.isfinite(self.scale)
            and self.spread <= tolerance.spread
            and self.holds_in_each_row(tolerance)
        )


@dataclass(frozen=True)
class Votes:
    """How often the smallest entry of a row's gradient is at a label."""

    here: int
    """Rows where it is the label of the row's own position, and not the next one's."""
    ahead: int
    """Rows where it is the label of the next position, and not its own."""
    compared: int
    """Rows whose own label is not the next one."""

    @property
    def shifted(self) -> bool | None:
        """Whether position t predicts label t + 1; None where the rows do not tell."""
        if self.compared < _VOTES:
            return None
        here, ahead = (n >= AGREEING * self.compared for n in (self.here, self.ahead))
        return None if here == ahead else ahead


@dataclass(frozen=True)
class Reading:
    """What some rows of a gradient at logits show, on the host."""

    hard: Fit
    """Fit of a cross-entropy with one label a row."""
    smoothed: Fit
    """Fit of one with label smoothing: s is the slope of the gradient on p off the label."""
    smoothing: float
    """ε of the label smoothing, where that fits."""
    soft: Fit
    """Fit of the soft labels that were given; of scale 0 where none were."""
    votes: Votes
    """Where the labels are."""
    rows: int
    """Rows read whose gradient is large enough to tell s."""
    telling: int
    """Of those the ones not certain of another class, whose gradient there is s, whatever else."""
    moved: int
    """Rows with a gradient, of all that were looked at."""
    complete: bool
    """Whether each row was looked at."""
    finite_logits: bool
    """Whether no logit read is NaN or +∞; −∞ is a class that is ruled out."""
    finite_gradient: bool
    """Whether every entry read of the gradient is finite."""
    classes: int
    """Number of classes."""
    coarse: bool
    """Whether logits or gradient have 16 bits."""
    labels: int | None = None
    """Number of labels that are not ignored, where labels are known."""
    labels_ahead: int | None = None
    """The same without the first position of each sequence, which a shifted loss never scores."""

    @property
    def shifted(self) -> bool | None:
        """Whether position t predicts label t + 1; None where the rows do not tell.

        Of a proven cross-entropy every row's label is certain, so few rows do if that many could
        hardly agree by chance.
        """
        shifted, votes = self.votes.shifted, self.votes
        certain = self.classes**votes.compared >= _CERTAIN and self.hard.holds(self.tolerance)
        if shifted is not None or not certain or not self.finite:
            return shifted
        if votes.compared in (votes.here, votes.ahead):
            return votes.ahead == votes.compared
        return None

    @property
    def tolerance(self) -> Tolerance:
        """The departures that rounding explains."""
        return COARSE if self.coarse else FINE

    @property
    def fit(self) -> Fit | None:
        """The fit that proves a cross-entropy, or None."""
        if not self.finite or not self.rows:
            return None
        fits = [self.hard, self.soft] if self.telling else [self.soft]
        if (
            self.telling
            and self.classes >= _SMOOTHED_CLASSES
            and 0 < self.smoothing <= _MOST_SMOOTHING
        ):
            fits.append(self.smoothed)
        return next((fit for fit in fits if fit.holds(self.tolerance)), None)

    @property
    def is_cross_entropy(self) -> bool:
        """Whether all rows are of one cross-entropy of these logits."""
        return self.fit is not None

    @property
    def weights_differ(self) -> bool:
        """Whether each row is of a cross-entropy, and their scales are not one."""
        return (
            self.finite
            and self.telling > 0
            and not self.is_cross_entropy
            and self.hard.holds_in_each_row(self.tolerance)
        )

    @property
    def finite(self) -> bool:
        """Whether logits and gradient are finite where they were read."""
        return self.finite_logits and self.finite_gradient

    @property
    def silent(self) -> bool:
        """Whether every row was looked at, and each has a gradient of zero."""
        return self.nonzero == 0 and self.finite

    @property
    def nonzero(self) -> int | None:
        """Number of all rows with a gradient, where each was looked at."""
        return self.moved if self.complete else None

    @property
    def counted_labels(self) -> list[int]:
        """Numbers of labels that predictions can be scored by, by where the labels are."""
        shifted = self.shifted
        counts = [self.labels if shifted is False else self.labels_ahead]
        counts += [] if shifted is not None else [self.labels]
        return [count for count in counts if count]

    @classmethod
    def of(
        cls,
        values: Sequence[float],
        *,
        classes: int,
        coarse: bool,
        complete: bool,
    ) -> Reading:
        """Return what a vector of :func:`measure` holds.

        Args:
            values: The vector as a list.
            classes: Number of classes.
            coarse: Whether logits or gradient have 16 bits.
            complete: Whether all rows were among the candidates.
        """
        width = len(_FIT)
        hard, smoothed, soft = (Fit(*values[i * width : (i + 1) * width]) for i in range(3))
        smoothing, here, ahead, compared, rows, telling, moved, logits, gradient = values[
            3 * width :
        ]
        return cls(
            hard=hard,
            smoothed=smoothed,
            smoothing=smoothing,
            soft=soft,
            votes=Votes(int(here), int(ahead), int(compared)),
            rows=int(rows),
            telling=int(telling),
            moved=int(moved),
            complete=complete,
            finite_logits=bool(logits),
            finite_gradient=bool(gradient),
            classes=classes,
            coarse=coarse,
        )


WIDTH = 3 * len(_FIT) + 9
"""Length of a vector of :func:`measure`."""
