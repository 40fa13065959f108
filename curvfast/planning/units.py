"""Parsing and formatting of quantities: "141GB", "80GiB", "1M", "400T"."""

from __future__ import annotations

import math
import re

from curvfast.errors import InputError

_DECIMAL = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "b": 10**9,
    "t": 10**12,
    "p": 10**15,
    "e": 10**18,
}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SHOWN = {"E": 1e18, "P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}
_PATTERN = re.compile(r"\s*(\d[\d_]*(?:\.\d*)?(?:e[+-]?\d+)?)\s*([a-z/]*)\s*", re.IGNORECASE)


def parse_bytes(text: str | int) -> int:
    """Parse a number of bytes: "141GB" (10⁹), "80GiB" (2³⁰), "512M" or a bare number.

    Raises:
        InputError: If it is no positive size.
    """
    return int(_parse(text, r"b(ytes?)?", "a size such as '141GB', '80GiB' or 80e9"))


def parse_count(text: str | int) -> int:
    """Parse a count: "1M", "250k", "1.5B" or a bare number.

    Raises:
        InputError: If it is no positive number.
    """
    return int(_parse(text, r"", "a number such as '1M', '250k' or 20000"))


def parse_rate(text: str | float) -> float:
    """Parse FLOP/s: "400T", "400TFLOP/s", "989 TFLOPS" or a bare number.

    Raises:
        InputError: If it is no positive rate.
    """
    return _parse(text, r"flops?(/s)?", "FLOP/s such as '400T', '400TFLOP/s' or 4e14")


def show_bytes(count: float) -> str:
    """Return bytes in decimal units with three digits: "97.2 GB"."""
    return show(count, "B")


def show(value: float, unit: str) -> str:
    """Return a quantity with a decimal prefix and three digits: "1.34 PFLOP"."""
    for prefix, scale in _SHOWN.items():
        # 1000 of one prefix is written as 1 of the next.
        if value >= 0.9995 * scale:
            return f"{value / scale:#.3g}".rstrip(".") + f" {prefix}{unit}"
    return f"{value:.0f} {unit}"


def _parse(text: str | float, unit: str, wanted: str) -> float:
    match = _PATTERN.fullmatch(str(text))
    for prefix, scale in (_DECIMAL | _BINARY).items() if match else ():
        if match and re.fullmatch(f"{prefix}({unit})?", match[2].lower()):
            value = float(match[1]) * scale
            if 1 <= value < math.inf:
                return value
    raise InputError(f"{text!r} is not {wanted}")
