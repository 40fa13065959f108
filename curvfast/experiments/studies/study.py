"""Study: figures of one seed, and tables and a picture over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Protocol

Figures = dict[str, Any]
Lines = list[list[str]]


class MatplotlibFigure(Protocol):
    """The interface used of matplotlib's figures."""

    def savefig(self, path: Path, /) -> None:
        """Write the figure to a file."""


@dataclass(frozen=True)
class StudyConfig:
    """Options of one run of a study."""

    seed: int
    quick: bool
    """Whether to run a version of seconds, whose results mean nothing."""
    report_stage: Callable[[str], None]
    """Called with one line before each stage."""
    data: Path | None = None
    """Folder of Fashion-MNIST's files; None looks in the usual places."""


@dataclass(frozen=True)
class Study:
    """A study of one claim."""

    measure: Callable[[StudyConfig], Figures]
    """Returns JSON-able figures of one seed."""
    tables: Callable[[Sequence[Figures]], dict[str, Lines]]
    """Returns tables over seeds by name, each a head and rows of cells."""
    picture: Callable[[Sequence[Figures]], MatplotlibFigure]
    """Draws the figures of one or more seeds."""


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """Format mean ± standard deviation over seeds; a single value without deviation."""
    middle = form.format(mean(values))
    return f"{middle} ± {form.format(stdev(values))}" if len(values) > 1 else middle


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
