"""Registry of backends: an operation is run by the requested one, or the best available."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from curvfast.errors import BackendUnavailable, CurvfastError, InputError

log = logging.getLogger(__name__)

AUTO = "auto"
_ENVIRONMENT = "CURVFAST_BACKEND"
# Operations on lists in host memory. A backend that has none of them, such as "torch", has no say
# in how they run.
SEARCHES = frozenset(
    {
        "staircase_by_mass", "staircase_by_pairs", "staircases_by_mass",
        "staircases_by_common_mass", "scores_by_mass", "scores_by_pairs", "cheapest_split",
    }
)  # fmt: skip
_chosen: ContextVar[str | None] = ContextVar("curvfast_backend", default=None)
_backends: dict[str, Backend] = {}
_told: set[tuple[str, str, str]] = set()


@dataclass(frozen=True, eq=False)
class Backend:
    """One set of implementations."""

    name: str
    operations: Mapping[str, Callable[..., Any]]
    refusals: Mapping[str, Callable[..., str | None]]
    """For an operation that cannot take everything: (its arguments) -> why it cannot, or None."""
    unavailable: Callable[[], str | None] = field(default=lambda: None)
    """Why it cannot run on this machine at all, or None; asked at every call, so cheap."""
    status: Callable[[], str] = field(default=lambda: "available")
    """What there is to say where it can run; raises if a choice of its own cannot be honoured."""
    variables: tuple[str, ...] = ()
    """Environment variables that its refusals depend on."""


def register(backend: Backend) -> None:
    """Make a backend known; "auto" prefers those registered first."""
    _backends[backend.name] = backend


def backends() -> dict[str, str]:
    """Return every backend and that it is ``"available"``, or the reason it is not.

    The native one says as well by which instruction set its second moments are multiplied.
    """
    return {name: _state(backend)[1] for name, backend in _backends.items()}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operations inside the ``with`` block on one backend.

    The searches behind a selection and a projection's plan run on lists in host memory, and only
    ``"native"`` and ``"reference"`` have them: under another name the choice between those two is
    automatic.

    Args:
        name: ``"triton"``, ``"native"``, ``"torch"``, ``"reference"``, or ``"auto"``. A named one
            that cannot take an operation raises there; only ``"auto"`` goes on to the next.

    Yields:
        Nothing.

    Raises:
        InputError: If there is no backend of that name.
        BackendUnavailable: If it cannot run on this machine.
    """
    if name != AUTO:
        reason, _ = _state(_named(name, "use_backend"))
        if reason:
            raise BackendUnavailable(f"backend {name!r} cannot be used: {reason}")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def resolve(operation: str, *arguments: Any) -> Callable[..., Any]:
    """Return the implementation that will run ``operation`` on ``arguments``.

    Order: :func:`use_backend`, then the environment's CURVFAST_BACKEND, then automatic.

    Raises:
        InputError: If the environment names no backend.
        BackendUnavailable: If a named backend cannot take the arguments, or none can.
    """
    name = _name()
    if name != AUTO:
        backend = _named(name, _ENVIRONMENT)
        if operation in backend.operations or operation not in SEARCHES:
            reason = _refusal(backend, operation, arguments)
            if reason:
                raise BackendUnavailable(
                    f"backend {name!r} cannot run {operation}: {reason}; use backend 'auto'"
                )
            return backend.operations[operation]
    reasons = []
    for backend in _backends.values():
        if operation not in backend.operations:
            continue
        reason = _refusal(backend, operation, arguments)
        if reason is None:
            return backend.operations[operation]
        reasons.append(f"{backend.name}: {reason}")
        _tell(backend.name, operation, reason)
    raise BackendUnavailable(f"no backend can run {operation}:\n  " + "\n  ".join(reasons))


def resolve_alike(operation: str, traits: Hashable) -> Callable[..., Any]:
    """Return what :func:`resolve` does, asked once for all calls alike in ``traits``.

    The refusals of ``operation`` see these traits alone. Other backends, another name and other
    values of their environment variables are asked anew.

    Raises:
        InputError: As :func:`resolve`.
        BackendUnavailable: As :func:`resolve`.
    """
    backends = tuple(_backends.values())
    variables = (_ENVIRONMENT, *(name for backend in backends for name in backend.variables))
    state = (backends, _chosen.get(), *map(os.environ.get, variables))
    return _resolved(operation, traits, state)


@lru_cache(maxsize=4096)
def _resolved(operation: str, traits: Hashable, _: Hashable) -> Callable[..., Any]:
    return resolve(operation, traits)


def unless_named(name: str, reason: str) -> Callable[..., str | None]:
    """Return a refusal of any arguments that "auto" hears, and who names the backend does not."""
    return lambda *_: None if _name() == name else f"{reason}; name it to use it"


def _name() -> str:
    return _chosen.get() or os.environ.get(_ENVIRONMENT) or AUTO


def _state(backend: Backend) -> tuple[str | None, str]:
    """Return why a backend cannot be used here, or None, and its status."""
    reason = backend.unavailable()
    if reason is None:
        try:
            return None, backend.status()
        except CurvfastError as error:
            reason = str(error)
    return reason, reason


def _refusal(backend: Backend, operation: str, arguments: tuple[Any, ...]) -> str | None:
    if operation not in backend.operations:
        return f"it does not implement {operation}"
    reason = backend.unavailable()
    if reason is None and operation in backend.refusals:
        reason = backend.refusals[operation](*arguments)
    return reason


def _named(name: str, source: str) -> Backend:
    if name not in _backends:
        raise InputError(
            f"{source}: there is no backend {name!r}; there are {', '.join(_backends)} and auto"
        )
    return _backends[name]


def _tell(name: str, operation: str, reason: str) -> None:
    searching = operation in SEARCHES
    told = name, "a search" if searching else operation, reason
    if told in _told:
        return
    _told.add(told)
    if searching:
        log.info("selection in Python, about 30 times slower than the native core: %s", reason)
    else:
        log.info("%s does not run on backend %r: %s", operation, name, reason)
