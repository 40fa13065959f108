"""PendingMoments: batches small second-moment updates on a GPU into one launch."""

from __future__ import annotations

from curvfast import devices, ops
from curvfast.errors import CoverageError
from curvfast.ops import MomentRequest

# A wider sum fills a GPU alone; float32 rows have kernels of their own.
WIDEST = 2048
MOST_CALLS = 64
MOST_BYTES = 128 * 2**20


class PendingMoments:
    """A queue of second-moment updates; each is run once, at the latest by :meth:`flush`."""

    def __init__(self) -> None:
        """Start with an empty queue."""
        self._calls: list[tuple[MomentRequest, int]] = []
        self._bytes = 0

    def run(self, request: MomentRequest) -> None:
        """Run an update now, or queue it until there are enough to share a launch.

        Raises:
            CoverageError: As :meth:`flush`.
        """
        x = request.x
        if not devices.takes_kernels(x.device) or request.d > WIDEST or x.element_size() != 2:
            ops.second_moments_([request])
            return
        self._calls.append((request, x._version))
        self._bytes += x.numel() * x.element_size()
        if len(self._calls) >= MOST_CALLS or self._bytes >= MOST_BYTES:
            self.flush()

    def flush(self) -> None:
        """Run every queued update.

        Raises:
            CoverageError: If a tensor was modified while it was queued.
        """
        calls, self._calls, self._bytes = self._calls, [], 0
        if any(request.x._version != version for request, version in calls):
            raise CoverageError(
                "an activation or gradient was modified in place before it was counted, by an "
                "operation after the backward that produced it; use an operation out of place"
            )
        ops.second_moments_([request for request, _ in calls])
