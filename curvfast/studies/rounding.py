"""Figures as they are kept: four decimals, and nothing where nothing could be measured."""

from __future__ import annotations

import math
from typing import Any


def rounded(value: Any) -> Any:
    """Return nested dicts, lists and tuples with floats of four decimals, NaN as None."""
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 4)
    if isinstance(value, dict):
        return {key: rounded(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(own) for own in value]
    return value
