"""Rounding of nested figures before they are written as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any


def to_four_decimals(value: Any) -> Any:
    """Return nested mappings and sequences with floats of four decimals, NaN as None."""
    return _mapped(value, lambda number: None if math.isnan(number) else round(number, 4))


def to_six_digits(value: Any) -> Any:
    """Return nested mappings and sequences with floats of six significant digits."""
    return _mapped(value, lambda number: float(f"{number:.6g}"))


def _mapped(value: Any, convert: Callable[[float], float | None]) -> Any:
    """Return nested dicts and lists with ``convert`` applied to every float."""
    if isinstance(value, Mapping):
        return {key: _mapped(each, convert) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(each, convert) for each in value]
    return convert(value) if isinstance(value, float) else value
