"""Placement of running sums: on the device of the rows, in host memory, or in memory-mapped files.

A sum away from the device its rows are on is added to in two steps: a scratch sum there takes the
rows of one call, and is copied over while the next call computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from tempfile import NamedTemporaryFile

import torch
from torch import Tensor

from curvfast import ops
from curvfast.errors import CoverageError
from curvfast.ops import MomentRequest, TriangularSum, devices

# A wider sum fills a GPU alone; float32 rows have kernels of their own.
WIDEST = 2048
MOST_CALLS = 64
MOST_BYTES = 128 * 2**20


class LaunchBatch:
    """Second-moment updates that share a launch; each runs once, at the latest by :meth:`flush`."""

    def __init__(self) -> None:
        """Start with none."""
        self._calls: list[tuple[MomentRequest, int]] = []
        self._bytes = 0

    def add(self, request: MomentRequest) -> None:
        """Run an update now, or queue it until there are enough to share a launch.

        Raises:
            CoverageError: As :meth:`flush`.
        """
        x = request.x
        if x.element_size() != 2 or x.shape[-1] > WIDEST or not devices.takes_kernels(x.device):
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


class Placement:
    """Allocates sums at their place, and adds to them there."""

    def __init__(self, place: str = "same", *, overlap: bool = False) -> None:
        """Choose the place of the sums.

        Args:
            place: ``"same"``, ``"cpu"`` or ``"disk"``.
            overlap: Whether updates of sums on a CUDA device run on a separate stream.
        """
        self._place = place
        self._overlap = overlap
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._batch = LaunchBatch()
        self._copies = CopiedSums()

    def new_sum(self, d: int, device: torch.device) -> TriangularSum:
        """Return an empty sum for rows of d features on ``device``."""
        if self._place == "same":
            return ops.new_sum(d, device=device)
        # Its tiles are as wide as the device that computes likes them: they are copied as they are.
        width = ops.tile_width(d, device)
        if self._place == "cpu":
            return TriangularSum.zeros(d, width, device=torch.device("cpu"))
        return TriangularSum(_mapped(ops.sum_bytes(d, device) // 4).view(-1, width), d)

    def like(self, known: TriangularSum) -> TriangularSum:
        """Return an empty sum of the shape, tiles and device of one made here."""
        if self._place != "disk":
            return TriangularSum(torch.zeros_like(known.tiles), known.d)
        return TriangularSum(_mapped(known.tiles.numel()).view_as(known.tiles), known.d)

    def add(self, request: MomentRequest) -> None:
        """Run one update, now or at the latest in :meth:`flush`."""
        # A sum elsewhere than its rows gets them by way of a copy.
        away = request.out.tiles.device != request.x.device
        with self._aside(request):
            (self._copies if away else self._batch).add(request)

    def add_if_finite(self, request: MomentRequest) -> bool:
        """Run one update of rows on the CPU now, unless a counted row is not finite.

        Returns:
            Whether it was run; if not, the sum is as before.
        """
        return ops.second_moment_if_finite_(request)

    def flush(self) -> None:
        """Run all pending updates; needed before a sum is read."""
        with ExitStack() as stack:
            for stream in self._streams.values():
                stack.enter_context(torch.cuda.stream(stream))
            self._batch.flush()
            self._copies.flush()
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)

    @contextmanager
    def _aside(self, request: MomentRequest) -> Iterator[None]:
        """Run the block on the side stream, after what made the rows, which live until then."""
        if not self._overlap:
            yield
            return
        device = request.x.device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        for tensor in request.read():
            tensor.record_stream(stream)
        with torch.cuda.stream(stream):
            yield


def _mapped(values: int) -> Tensor:
    """Return float32 zeros in an unlinked file of the temporary folder, mapped to memory."""
    with NamedTemporaryFile(prefix="curvfast-sums-") as file:
        # A new file reads as zeros; mapped, it outlives its name, and not the process.
        return torch.from_file(
            file.name, shared=True, size=values, dtype=torch.float32, device="cpu"
        )


@dataclass
class _Copy:
    """A sum in transfer: computed on a device, copied to the host, not yet added."""

    scratch: TriangularSum
    host: Tensor
    out: TriangularSum | None = None
    done: torch.cuda.Event | None = None


class CopiedSums:
    """Adds to sums on another device than the rows'; one copy per width is in transfer."""

    def __init__(self) -> None:
        """Start with none."""
        self._copies: dict[tuple[int, torch.device], _Copy] = {}

    def add(self, request: MomentRequest) -> None:
        """Compute one call where its rows are, and begin to copy it to where its sum is."""
        device = request.x.device
        key = (request.d, device)
        if key not in self._copies:
            scratch = ops.new_sum(request.d, device=device)
            # Pinned memory is what copies in the background need.
            host = torch.empty(
                scratch.tiles.shape, dtype=scratch.tiles.dtype, device="cpu",
                pin_memory=device.type == "cuda",
            )  # fmt: skip
            self._copies[key] = _Copy(scratch, host)
        copy = self._copies[key]
        self._finish(copy)
        copy.scratch.tiles.zero_()
        ops.second_moments_([replace(request, out=copy.scratch)])
        copy.host.copy_(copy.scratch.tiles, non_blocking=True)
        copy.out = request.out
        if device.type == "cuda":
            copy.done = torch.cuda.Event()
            copy.done.record(torch.cuda.current_stream(device))

    def flush(self) -> None:
        """Add the sums in transfer."""
        for copy in self._copies.values():
            self._finish(copy)

    @staticmethod
    def _finish(copy: _Copy) -> None:
        if copy.out is None:
            return
        if copy.done is not None:
            copy.done.synchronize()
        copy.out.tiles.add_(copy.host)
        copy.out = copy.done = None
