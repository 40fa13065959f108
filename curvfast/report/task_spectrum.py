"""Figure 4: tasks by their activation of flat components, and by their loss under an edit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from statistics import mean
from typing import TYPE_CHECKING

from curvfast.report.style import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {
    "memorization": "#c8553d",
    "arithmetic": "#e09f3e",
    "closed_book": "#6a4c93",
    "open_book": "#3a7ca5",
    "logic": "#0b6e4f",
}
_MARKS = "osD^v"
"""Of the tasks of one kind, in order."""


@dataclass(frozen=True)
class Point:
    """One task."""

    name: str
    kind: str
    x: Sequence[float]
    """Its measure at each seed."""
    y: Sequence[float]
    """Loss of accuracy at each seed, in per cent."""


def task_spectrum(panels: Mapping[str, tuple[Sequence[Point], str]]) -> Figure:
    """Draw what an edit takes of each task against a measure of its activations.

    Args:
        panels: Tasks and a note, by the name of the measure.

    Returns:
        Two panels a row; a large mark is a task's mean, dots are seeds.
    """
    from matplotlib.figure import Figure

    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(11, 4.4 * rows), layout="constrained", dpi=160)
    grid = figure.subplots(rows, 2, sharey=True, squeeze=False)
    for (label, (points, note)), axes in zip(panels.items(), grid.flat, strict=False):
        _panel(axes, points)
        axes.set_xlabel(label)
        axes.set_title(note, loc="left", fontsize=9)
        plain(axes)
    for row in grid:
        row[0].set_ylabel("accuracy lost to the edit, %")
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5,
        frameon=False, fontsize=9,
    )  # fmt: skip
    return figure


def _panel(axes: Axes, points: Sequence[Point]) -> None:
    marks: dict[str, Iterator[str]] = {}
    for point in points:
        colour = _COLOURS[point.kind]
        mark = next(marks.setdefault(point.kind, cycle(_MARKS)))
        axes.plot(point.x, point.y, ".", color=colour, alpha=0.4, markersize=5)
        axes.plot(
            mean(point.x), mean(point.y), mark, color=colour, markersize=7, alpha=0.85,
            linestyle="none", label=point.name.replace("_", " "),
        )  # fmt: skip
