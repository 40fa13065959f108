"""Formatting of numbers for report pages; None is a dash."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

DASH = "–"


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share as a percentage; a dash if it is not known."""
    return DASH if share is None or share != share else f"{share:.{digits}%}"


def decimal(value: float | None, digits: int = 2) -> str:
    """Return a number with so many decimals; a dash if it is not known."""
    return DASH if value is None or value != value else f"{value:,.{digits}f}"


def significant(value: float | None) -> str:
    """Return a number with three significant digits; a dash if it is not known."""
    return DASH if value is None or value != value else f"{value:.3g}"


def count(number: int) -> str:
    """Return a whole number with separated thousands."""
    return f"{number:,}"


def said(value: Any) -> str:
    """Format any JSON value for readers."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {said(each)}" for key, each in value.items()) or DASH
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(said(each) for each in value) or DASH
    return str(value)


def flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Flatten nested mappings to names and formatted values."""
    found = []
    for key, value in values.items():
        name = f"{before}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            found += flat(value, f"{name}: ")
        else:
            # A seed is an identifier: its thousands are not separated.
            found.append((name, str(value) if name.endswith("seed") else said(value)))
    return found
