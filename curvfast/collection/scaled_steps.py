"""Optimizer steps under a GradScaler: what one added counts once it is known not to be skipped."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Transaction(Protocol):
    """Sums whose newest additions can be taken back."""

    def begin_pending(self) -> None:
        """Keep what is added from here on apart, until it is committed or discarded."""

    def commit(self) -> bool:
        """Add what is pending to the sums, or discard it if it is not finite; say which."""

    def discard(self) -> None:
        """Forget what is pending."""


class ScaledSteps:
    """The steps of a loop whose ``GradScaler`` may skip some.

    A scaler skips the optimizer's step where a gradient of any parameter is not finite; then
    ``update()`` lowers its scale, which is what shows it. Everything that was added since the
    update before belongs to one step, however many forwards and backwards it had, and is left out
    as a whole: by all layers, also if only one of several optimizers was skipped. A scale that
    grows or stays is a step that was taken.

    Whether the scaler was updated is seen without waiting for a device, and only then is its scale
    read: one wait a step, none a layer. A scaler that is disabled leaves nothing pending.
    """

    def __init__(self, scaler: torch.amp.GradScaler, sums: Transaction) -> None:
        """Begin with nothing pending.

        Args:
            scaler: The loop's own; only read.
            sums: What the loop's calls are added to.
        """
        self._scaler = scaler
        self._sums = sums
        self._enabled = scaler.is_enabled()
        self._scale = scaler.get_scale()
        self._updates = self._seen_updates()
        if self._enabled:
            sums.begin_pending()

    @property
    def scale(self) -> float:
        """The factor of the loss since the last update; read once for it."""
        return self._scale

    def settle(self) -> bool:
        """Decide on what is pending if the scaler was updated meanwhile; else it stays pending.

        To be called before every forward, counted or not, at the first gradient of a backward, and
        before the sums are read. A reading leaves out a step that is not decided yet.

        Returns:
            Whether a step was left out.
        """
        updates = self._seen_updates()
        if updates == self._updates:
            return False
        before, self._scale = self._scale, self._scaler.get_scale()
        self._updates = updates
        return self._decide(skipped=self._scale < before)

    def finish(self) -> bool:
        """Decide on what is pending after the last call.

        A step that the scaler did take or skip is decided by that, though ``update()`` was not
        called. Where the loop ended before its step, nothing was skipped: what its backwards added
        is finite, and counts.

        Returns:
            Whether a step was left out.
        """
        left_out = self.settle()
        if self._enabled and not left_out:
            left_out = self._decide(skipped=self._found_inf())
        return left_out

    def _decide(self, *, skipped: bool) -> bool:
        if not skipped:
            return not self._sums.commit()
        self._sums.discard()
        return True

    def _seen_updates(self) -> int:
        # The scale is a tensor, made at the first use and written in place by every update.
        scale = self._scaler._scale if self._enabled else None
        return 0 if scale is None else scale._version

    def _found_inf(self) -> bool:
        """Return whether a step or ``unscale_`` since the last update found infinities."""
        states: Any = self._scaler._per_optimizer_states
        found = [
            each for state in states.values() for each in state["found_inf_per_device"].values()
        ]
        return any(float(each) > 0 for each in found)
