"""Instruction set of second moments on a CPU: the requested one, or the best available."""

from __future__ import annotations

import os
from functools import cache

from curvfast.errors import BackendUnavailable, InputError
from curvfast.ops import registry
from curvfast.ops.native import extension

ENVIRONMENT = "CURVFAST_ISA"
_PORTABLE = "portable"
_by_name = registry.unless_named("native", f"torch is faster than {_PORTABLE} code")


def chosen() -> str:
    """Return the instruction set rows are multiplied by: CURVFAST_ISA's, or this processor's best.

    Raises:
        InputError: If the environment names none.
        BackendUnavailable: If this processor does not have the one it names.
    """
    return _decided(os.environ.get(ENVIRONMENT) or registry.AUTO)


def refusal() -> str | None:
    """Return why rows are left to torch, or None: plain code runs where it is asked for."""
    if chosen() == _PORTABLE and os.environ.get(ENVIRONMENT) != _PORTABLE:
        return _by_name()
    return None


def status() -> str:
    """Return what multiplies second moments, for :func:`curvfast.backends`.

    Raises:
        InputError: As :func:`chosen`.
        BackendUnavailable: As :func:`chosen`.
    """
    return f"available; second moments by {chosen()}{', where named' if refusal() else ''}"


@cache
def _decided(asked: str) -> str:
    sets = extension.instruction_sets()
    able = [name for name, supported in sets.items() if supported]
    if asked == registry.AUTO:
        return able[-1]
    if asked not in sets:
        raise InputError(
            f"{ENVIRONMENT}: there is no instruction set {asked!r}; "
            f"there are {', '.join(sets)} and {registry.AUTO}"
        )
    if asked not in able:
        raise BackendUnavailable(
            f"{ENVIRONMENT}={asked}: this processor does not have it; "
            f"it has {', '.join(able)}: name one of these, or unset {ENVIRONMENT}"
        )
    return asked
