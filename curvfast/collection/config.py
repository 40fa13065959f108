"""CollectConfig: the validated configuration of a collection, saved with every result."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from curvfast.errors import InputError

REDUCTIONS = ("mean", "sum")
STREAMS = ("one", "overlap")
PLACES = ("same", "cpu", "disk")
NONFINITE = ("skip", "error")


@dataclass(frozen=True)
class CollectConfig:
    """Configuration of a collection: the arguments of :func:`curvfast.collect`."""

    layers: str
    """The layers asked for."""
    loss_reduction: str | None = None
    """Whether the caller's loss is the "mean" or the "sum" over its labels; None: it is read."""
    loss_scale: float | None = None
    """A further factor of the caller's loss; None: it is read."""
    skip_last: bool | None = None
    """Whether position t predicts the token at t + 1; None: it is read."""
    share_inputs: bool = True
    """Whether layers fed by one tensor share one A."""
    spill_every: int | None = None
    """After how many calls a float32 sum is moved into a float64 one; None: never."""

    rows_per_step: float | None = None
    """Share below 1, or number, of each batch's rows that are counted; None: all."""
    every: int = 1
    """One in this many calls of the model is counted."""
    sums_device: str = "same"
    """Where sums live: beside the activations, on the "cpu", or on "disk"."""
    streams: str = "one"
    """Whether moments run on the stream of the step, or "overlap" it on another (CUDA)."""
    seed: int = 0
    """Seed of the generator that draws ``rows_per_step``."""
    marginals: bool = False
    """Whether the moments weighted by the other side's squared norms are summed too."""
    on_nonfinite: str = "skip"
    """Whether a batch with NaN or infinity is left out and told ("skip"), or an "error"."""
    strict: bool = False
    """Whether what is warned of otherwise is an error."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            InputError: If one is out of range.
        """
        if self.loss_reduction not in (None, *REDUCTIONS):
            raise InputError(
                f"loss_reduction={self.loss_reduction!r}: pass 'mean' if the loss is averaged over "
                "its labels (the default of torch and transformers), 'sum' if it is summed, or "
                "None to read it off the gradient"
            )
        scale = self.loss_scale
        if scale is not None and not (math.isfinite(scale) and scale > 0):
            raise InputError(
                f"loss_scale={self.loss_scale}: pass the positive factor the loss is multiplied "
                "by, such as 1/4 when four accumulated batches are averaged"
            )
        if self.spill_every is not None and self.spill_every < 1:
            raise InputError(
                f"spill_every={self.spill_every}: pass after how many calls a float32 sum moves "
                "into float64, such as 64, or None to keep float32"
            )

        if self.rows_per_step is not None and not (
            0 < self.rows_per_step < 1 or self.rows_per_step == int(self.rows_per_step) >= 1
        ):
            raise InputError(
                f"rows_per_step={self.rows_per_step}: pass a share of each batch's rows, such as "
                "0.25, a whole number of them, or None for all"
            )
        if self.every < 1:
            raise InputError(
                f"every={self.every}: pass 1 to count every call of the model, n for one in n"
            )
        if self.sums_device not in PLACES:
            raise InputError(
                f"sums_device={self.sums_device!r}: pass one of {', '.join(map(repr, PLACES))}"
            )

        if self.on_nonfinite not in NONFINITE:
            raise InputError(
                f"on_nonfinite={self.on_nonfinite!r}: pass 'skip' to leave out what is NaN or "
                "infinite, or 'error'"
            )
        if self.streams not in STREAMS:
            raise InputError(f"streams={self.streams!r}: pass 'one', or 'overlap' on a CUDA device")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-able values."""
        return asdict(self)
