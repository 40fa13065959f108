"""What a study is: figures of one seed, and a table and a picture over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Protocol

Figures = dict[str, Any]
Lines = list[list[str]]


class MatplotlibFigure(Protocol):
    """A figure of matplotlib."""

    def savefig(self, path: Path, /) -> None:
        """Write it."""


@dataclass(frozen=True)
class StudyConfig:
    """Options of one run of a study."""

    seed: int
    quick: bool
    """Whether to cut it to seconds, which proves nothing."""
    say: Callable[[str], None]
    """Called with one line before each stage."""
    data: Path | None = None
    """Folder of Fashion-MNIST's files; None looks in the usual places."""


@dataclass(frozen=True)
class Study:
    """One claim, and how it is measured."""

    measure: Callable[[StudyConfig], Figures]
    """Returns JSON-able figures of one seed."""
    tables: Callable[[Sequence[Figures]], dict[str, Lines]]
    """Returns tables over seeds by name, each a head and rows of cells."""
    picture: Callable[[Sequence[Figures]], MatplotlibFigure]
    """Draws the figures of one or more seeds."""


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """Return mean ± standard deviation over seeds as text; of one value, the value."""
    middle = form.format(mean(values))
    return f"{middle} ± {form.format(stdev(values))}" if len(values) > 1 else middle
