"""Figure of the detector: AUC of each layer, and token scores of passages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

from curvfast.report.activations import short
from curvfast.report.style import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#0b6e4f", "#3a7ca5")
_GROUND = "#d64541"
_COLUMNS, _LINES = 56, 5


@dataclass(frozen=True)
class Passages:
    """A text with a score for each token."""

    pieces: Sequence[str]
    scores: Sequence[float]


def telling(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], texts: Mapping[str, Passages]
) -> Figure:
    """Draw the AUC of each layer, and texts whose background is redder for flatter tokens.

    Args:
        curves: For each model its figures, one a seed: ``layers`` and ``chosen``.
        texts: What is shown below; all share one scale of colour.

    Returns:
        A panel a model, a thin line a seed, over a panel a text.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.4), layout="constrained", dpi=160)
    halves = figure.subfigures(2, 1, height_ratios=(2, 1), squeeze=False)[:, 0]
    panels = halves[0].subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axes, colour, (label, runs) in zip(panels, _COLOURS, curves.items(), strict=False):
        _layers(axes, runs, colour)
        chosen = mean(run["chosen"] for run in runs)
        axes.set_title(
            f"{label}: AUC {chosen:.3f} on passages not used to choose the layer", loc="left",
            fontsize=9,
        )  # fmt: skip
    panels[0].set_ylabel("AUC, all passages")
    every = [score for text in texts.values() for score in text.scores]
    grid = halves[1].subplots(1, len(texts), squeeze=False)[0]
    for axes, (label, text) in zip(grid, texts.items(), strict=True):
        _text(axes, text, min(every), max(every))
        axes.set_title(label, loc="left", fontsize=9)
    return figure


def _layers(axes: Axes, runs: Sequence[Mapping[str, Any]], colour: str) -> None:
    names = [*runs[0]["layers"]]
    for run in runs:
        axes.plot([run["layers"][n] for n in names], ".-", color=colour, linewidth=0.8, alpha=0.7)
    axes.axhline(0.5, color="#1b1b1e", linewidth=0.8)
    axes.set_xticks(range(len(names)), [short(name) for name in names], rotation=45, fontsize=7.5)
    plain(axes)


def _text(axes: Axes, text: Passages, low: float, high: float) -> None:
    """Draw tokens in lines of monospaced text, each on its background colour."""
    line, column = 0, 0
    for piece, score in zip(text.pieces, text.scores, strict=True):
        letters = piece.replace("\n", "¶")
        if column + len(letters) > _COLUMNS:
            line, column, letters = line + 1, 0, letters.lstrip()
        strength = (score - low) / (high - low) if high > low else 0.0
        axes.add_patch(_ground(column, line, len(letters), strength))
        for offset, letter in enumerate(letters):
            axes.text(
                column + offset + 0.5, line + 0.5, letter, family="monospace", fontsize=7,
                ha="center", va="center",
            )  # fmt: skip
        column += len(letters)
    axes.set_xlim(0, _COLUMNS)
    axes.set_ylim(max(line + 1, _LINES), 0)
    axes.axis("off")


def _ground(column: int, line: int, width: int, strength: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column, line + 0.05), width, 0.9, color=_GROUND, alpha=0.9 * strength, lw=0)
