"""Refusals: errors found inside hooks, raised in the caller's loop or handed to the caller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from curvfast import distributed
from curvfast.errors import CoverageError, CurvfastError

T = TypeVar("T")
OnError = Callable[[CurvfastError], None]


class Refusals:
    """What becomes of an error found inside a hook, which runs within the caller's training step.

    Without a handler it is raised there. With one the loop is never interrupted: the handler is
    called with the first error, hooks do nothing from then on, and :meth:`check` raises it.
    """

    def __init__(self, on_error: OnError | None = None) -> None:
        """Store the handler, which must not raise."""
        self._on_error = on_error
        self.error: CurvfastError | None = None

    def run(self, hook: Callable[..., T], *args: Any, aside: T) -> T:
        """Return what ``hook`` returns for ``args``, or ``aside`` once something was refused.

        Raises:
            CurvfastError: What the hook raises, without a handler.
        """
        if self.error is not None:
            return aside
        try:
            return hook(*args)
        except CurvfastError as error:
            if self._on_error is None:
                raise
            self.note(error)
            return aside

    def note(self, error: CurvfastError) -> None:
        """Take ``error`` as what ends the measurement; with a handler only."""
        # The frames of a traceback would hold the activations of the step.
        error.__cause__ = error.__context__ = None
        self.error = error.with_traceback(None)
        if self._on_error is not None:
            self._on_error(error)

    def check(self) -> None:
        """Raise what was refused, if anything was.

        Raises:
            CurvfastError: The first error.
        """
        if self.error is not None:
            raise self.error

    def check_all(self, group: distributed.Group) -> None:
        """Raise what was refused on this rank or another; every rank of the group calls it.

        Raises:
            CurvfastError: The first error, or that another rank has one.
        """
        told = distributed.gather(self.error and str(self.error), group)
        self.check()
        for rank, message in enumerate(told):
            if message:
                raise CoverageError(f"rank {rank} has no figures to add: {message}")
