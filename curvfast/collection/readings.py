"""Readings: inputs of layers, between the first gradient of their readers and the last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from curvfast.collection.hooks import Arrival, SharedInput
from curvfast.errors import CoverageError
from curvfast.model.batch import Batch
from curvfast.model.rows import Rows


@dataclass(eq=False)
class Reading:
    """One tensor that layers read."""

    batch: Batch
    x: Tensor
    rows: Rows
    finite: bool
    version: int
    """Of x, when its first gradient came."""
    arrived: set[str] = field(default_factory=set)
    """Readers whose gradient came."""
    counted: set[str] = field(default_factory=set)
    """Readers whose gradient counts, and so their input."""


class Readings:
    """Inputs that wait until it is known for which of their readers they count."""

    def __init__(self, count: Callable[[Reading], None]) -> None:
        """Start with none; ``count`` adds one to the sums of its counted readers."""
        self._count = count
        self._open: dict[SharedInput, Reading] = {}

    def of(self, arrival: Arrival, finite: Callable[[Tensor, Rows], bool]) -> Reading:
        """Return the reading of a call; inputs of other batches wait no longer.

        Args:
            arrival: The call, with its input.
            finite: Says whether the counted rows of an input are; asked once for each.
        """
        batch, shared, x = arrival.batch, arrival.shared, arrival.x
        assert x is not None
        whole = batch.batch
        self.end(other_than=whole)
        shared.added = True
        reading = self._open.get(shared)
        if reading is None:
            rows = batch.rows(arrival.layer, x.shape[:-1], x.device)
            reading = Reading(whole, x, rows, finite(x, rows), x._version)
            self._open[shared] = reading
        return reading

    def arrived(self, arrival: Arrival, reading: Reading, *, counts: bool) -> None:
        """Note that the gradient of a reader came; the last one ends the reading."""
        reading.arrived.add(arrival.layer)
        if counts:
            reading.counted.add(arrival.layer)
        if reading.arrived >= arrival.shared.readers:
            self._end(self._open.pop(arrival.shared))

    def end(self, other_than: Batch | None = None) -> None:
        """End the readings whose last gradient never came, but those of a batch."""
        ended = [s for s, reading in self._open.items() if reading.batch is not other_than]
        for shared in ended:
            self._end(self._open.pop(shared))

    def clear(self) -> None:
        """Forget every one."""
        self._open.clear()

    def _end(self, reading: Reading) -> None:
        if not reading.counted:
            return
        if reading.x._version != reading.version:
            raise CoverageError(
                f"the input of {', '.join(map(repr, sorted(reading.counted)))} was modified in "
                "place before it was counted: another layer reads it too, and no gradient of that "
                "one came; leave that layer out, or use an operation out of place"
            )
        self._count(reading)
