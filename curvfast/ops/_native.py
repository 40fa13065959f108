"""The only door to the extension ``curvfast._C``: NumPy arrays in, their addresses passed on."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from curvfast.ops.reference import Found, Values

try:
    from curvfast import _C
except ImportError as _error:
    _reason: str | None = f"the extension is not built ({_error}); reinstall with a C++ compiler"
else:
    _reason = None


def unavailable() -> str | None:
    """Return why the native core cannot be used, or None if it can."""
    if os.environ.get("CURVFAST_NATIVE") == "0":
        return "CURVFAST_NATIVE=0 is set"
    return _reason


def staircase_by_mass(values_g: Values, values_a: Values, mass: float) -> Found:
    """As :func:`curvfast.ops.reference.staircase_by_mass`, in C++."""
    return _search(_C.staircase_by_mass, values_g, values_a, mass)


def staircase_by_pairs(values_g: Values, values_a: Values, pairs: int) -> Found:
    """As :func:`curvfast.ops.reference.staircase_by_pairs`, in C++."""
    return _search(_C.staircase_by_pairs, values_g, values_a, pairs)


def _search(
    function: Callable[..., tuple[float, int, float]],
    values_g: Values,
    values_a: Values,
    rule: float,
) -> Found:
    g, a = (np.ascontiguousarray(values, np.float64) for values in (values_g, values_a))
    widths = np.zeros(len(g), np.int32)
    threshold, pairs, kept = function(
        g.ctypes.data, len(g), a.ctypes.data, len(a), rule, widths.ctypes.data
    )
    return Found(widths, threshold, pairs, kept)
