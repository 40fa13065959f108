"""Temporary buffers of second moments, allocated on the meta device."""

from __future__ import annotations

import torch
from torch import Tensor

from curvfast import devices, pending
from curvfast.ops import blocked, packed_rows


class Scratch:
    """Allocates on the meta device the temporary buffers that adding rows needs on ``device``.

    On a CPU rows pass through a buffer: packed where the native core multiplies them unasked, in
    float32 elsewhere. GPU kernels read rows in place, and keep narrow ones alive until enough are
    queued for one launch (:mod:`curvfast.pending`).
    """

    def __init__(self, device: torch.device) -> None:
        """Start with an empty queue."""
        self._device = device
        self._waiting: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Allocate the buffers for adding rows x [..., d]."""
        d, rows = x.shape[-1], x.shape[:-1].numel()
        if not devices.takes_kernels(self._device):
            torch.empty(self._buffer(x, rows, d), dtype=torch.uint8, device="meta")
        elif d <= pending.WIDEST and x.element_size() == 2:
            self._waiting.append(x)
            enough = sum(y.nbytes for y in self._waiting) >= pending.MOST_BYTES
            if enough or len(self._waiting) >= pending.MOST_CALLS:
                self._waiting.clear()

    @staticmethod
    def _buffer(x: Tensor, rows: int, d: int) -> int:
        if packed_rows.packs(x.dtype, d):
            # The row offsets, and the packed rows.
            return 8 * rows + 4 * packed_rows.room_words(x.dtype, rows, d)
        gathered = 0 if x.element_size() == 4 else x.element_size()
        return min(rows, blocked.chunk_rows(d)) * d * (4 + gathered)
