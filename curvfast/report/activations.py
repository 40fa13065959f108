"""Figure 2: activation ratios by layer, for the most curved and the flattest band."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from curvfast.report.style import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BANDS = {0: ("most curved", "#0b6e4f", "o"), -1: ("flattest", "#c8553d", "s")}
_WIDTH = 0.36


def short(layer: str) -> str:
    """Return the number of a layer's block and its last name: ``0 gate`` of a ``gate_proj``."""
    parts = layer.split(".")
    number = next((part for part in parts if part.isdigit()), "")
    return f"{number} {parts[-1].removesuffix('_proj')}".strip()


def activations(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the ratio of the first and the last band over layers.

    Args:
        runs: For each seed, by what is compared and by how bands are formed (``"index"`` or
            ``"mass"``), :meth:`curvfast.analysis.ActivationRatio.to_dict`.

    Returns:
        A row of panels for each way to form bands; a mark a seed, with its bootstrap interval.
    """
    from matplotlib.figure import Figure

    compared, orders = list(runs[0]), list(next(iter(runs[0].values())))
    figure = Figure(figsize=(4.2 * len(compared), 3.3 * len(orders)), layout="constrained", dpi=160)
    panels = figure.subplots(len(orders), len(compared), squeeze=False)
    for by, row in zip(orders, panels, strict=True):
        for name, axes in zip(compared, row, strict=True):
            _panel(axes, [run[name][by] for run in runs])
            axes.set_title(f"{name}; bands by {by}", loc="left", fontsize=9)
        row[0].set_ylabel("‖activation‖, by heart / clean")
    panels[0][0].legend(frameon=False, fontsize=8)
    return figure


def _panel(axes: Axes, curves: Sequence[Mapping[str, Any]]) -> None:
    groups = _alike(curves[0]["layers"])
    bands = [0, *curves[0]["bands"]]
    for band, (label, colour, marker) in _BANDS.items():
        start = band if band >= 0 else len(bands) - 2
        share = f"{100 * bands[start]:g}-{100 * bands[start + 1]:g} %"
        for number, curve in enumerate(curves):
            shift = _WIDTH * ((number + 1) / (len(curves) + 1) - 0.5)
            own = [curve["layers"][group[0]] for group in groups]
            points = [
                (place + shift, *(layer[key][band] for key in ("ratio", "low", "high")))
                for place, layer in enumerate(own)
            ]
            known = [point for point in points if None not in point]
            if not known:
                continue
            x, y, low, high = zip(*known, strict=True)
            errors = [
                [max(0.0, a - b) for a, b in zip(y, low, strict=True)],
                [max(0.0, b - a) for a, b in zip(y, high, strict=True)],
            ]
            axes.errorbar(
                x, y, errors, color=colour, marker=marker, markersize=3, linewidth=0.8,
                elinewidth=1, capsize=1.5, alpha=0.8,
                label=f"{label} ({share})" if number == 0 else None,
            )  # fmt: skip
    axes.axhline(1, color="#1b1b1e", linewidth=0.8)
    labels = [
        ", ".join([short(first), *(short(n).split()[-1] for n in rest)]) for first, *rest in groups
    ]
    axes.set_xticks(range(len(groups)), labels, rotation=45, fontsize=7.5)
    plain(axes)


def _alike(layers: Mapping[str, Any]) -> list[list[str]]:
    """Group neighbours with equal curves, which read one tensor."""
    groups: list[list[str]] = []
    for name, curve in layers.items():
        if groups and layers[groups[-1][0]] == curve:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups
