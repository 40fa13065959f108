"""Spectra of curvature by layer: mass curves, effective ranks and power laws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from curvfast.errors import InputError
from curvfast.experiments.studies.study import Figures, Lines, Study, StudyConfig, spread
from curvfast.experiments.studies.subjects import demo_lm, lab_lm, lab_vit
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.kfac.spectrum import effective_rank, mass_curve, participation_ratio, power_law
from curvfast.report.style import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


TITLES = {"demo_lm": "demo's LM", "lab_lm": "lab's LM", "lab_vit": "lab's ViT"}


def spectra(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the spectra of each model's layers with their power laws, and its mass curves.

    Args:
        runs: For each seed, layers by name by model: ``G`` and ``A`` with ``ranks``, ``values``
            and ``law``, and ``fractions`` and ``mass`` of the pairs.

    Returns:
        A row a model: G, A (the first seed's layers, over the largest eigenvalue), and mass curves
        of every seed with their median.
    """
    from matplotlib.figure import Figure

    names = list(runs[0])
    figure = Figure(figsize=(11.5, 3.3 * len(names)), layout="constrained", dpi=140)
    for row, name in zip(figure.subplots(len(names), 3, squeeze=False), names, strict=True):
        for axes, side in zip(row, "GA", strict=False):
            _factor_panel(axes, runs[0][name], side)
            axes.set_title(f"{TITLES[name]}: {_law(runs, name, side)}", **_LEFT)
        _curves(row[2], [run[name] for run in runs])
        row[2].set_title(f"{TITLES[name]}: mass held by the largest pairs", **_LEFT)
    return figure


# Smaller eigenvalues are rounding error of float32 sums.
_LOWEST = 1e-7
_LEFT: dict[str, Any] = {"loc": "left", "fontsize": 9.5}


def _factor_panel(axes: Axes, layers: Mapping[str, Any], side: str) -> None:
    from matplotlib import colormaps

    for number, layer in enumerate(layers.values()):
        own = layer[side]
        top = own["values"][0]
        colour = colormaps["viridis"](0.9 * number / max(1, len(layers) - 1))
        axes.plot(own["ranks"], [v / top for v in own["values"]], color=colour, linewidth=1)
        law = own["law"]
        if law:
            ends = law["first"], law["last"]
            line = [law["scale"] * rank ** -law["exponent"] / top for rank in ends]
            axes.plot(ends, line, color="#c8553d", linewidth=1, linestyle="--", alpha=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    least = min(own[side]["values"][-1] / own[side]["values"][0] for own in layers.values())
    axes.set_ylim(max(_LOWEST, least / 2), 2)
    axes.set_xlabel("rank k (first layers dark; dashed: fits)")
    axes.set_ylabel(f"eigenvalue k of {side} / the largest")
    plain(axes)


def _law(runs: Sequence[Mapping[str, Any]], name: str, side: str) -> str:
    laws = [layer[side]["law"] for run in runs for layer in run[name].values()]
    exponents = [law["exponent"] for law in laws if law]
    if not exponents:
        return f"{side}, no power law"
    ends = f"{min(exponents):.1f} to {max(exponents):.1f}"
    return f"{side}, α = {median(exponents):.1f} ({ends})"


def _curves(axes: Axes, runs: Sequence[Mapping[str, Any]]) -> None:
    layers = [layer for run in runs for layer in run.values()]
    share = [100 * fraction for fraction in layers[0]["fractions"]]
    for layer in layers:
        axes.plot(
            share, [100 * m for m in layer["mass"]], color="#8d99ae", linewidth=0.6, alpha=0.6
        )
    middle = [100 * median(masses) for masses in zip(*(x["mass"] for x in layers), strict=True)]
    axes.plot(share, middle, color="#0b6e4f", linewidth=2, marker=".", label="median of layers")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("largest pairs, % of all")
    axes.set_ylabel("curvature mass, %")
    axes.set_ylim(0, 102)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    plain(axes)


MASSES = (0.5, 0.75, 0.9, 0.95, 0.99)
FRACTIONS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""Shares of all pairs at which mass curves are evaluated."""
MODELS: dict[str, Callable[[StudyConfig], Eigenbasis]] = {
    "demo_lm": lambda config: demo_lm(config).basis,
    "lab_lm": lambda config: lab_lm(config).basis,
    "lab_vit": lambda config: lab_vit(config).basis,
}
_POINTS = 32
_SHORTENED = ("exponent", "scale", "r_squared")
_FACTORS = (
    "effective rank of G", "of A", "participation ratio of G", "of A", "α of G", "of A", "R² of G",
    "of A",
)  # fmt: skip


def _measure(config: StudyConfig) -> Figures:
    return {name: _layers(basis_of(config)) for name, basis_of in MODELS.items()}


def _layers(basis: Eigenbasis) -> Figures:
    """Return the spectral statistics of every layer of a basis."""
    kept = dict(zip(MASSES, basis.keep_each(MASSES), strict=True))
    found = {}
    for name, own in basis.items():
        d_out, d_in = own.shape
        curve = mass_curve(own.values_g, own.values_a, FRACTIONS)
        found[name] = {
            "G": _factor(own.values_g),
            "A": _factor(own.values_a),
            "pairs": {f"{mass:g}": kept[mass][name].pairs for mass in MASSES},
            "of_pairs": d_out * d_in,
            "fractions": list(FRACTIONS),
            "mass": [_short(share) for share in curve],
        }
    return found


def _factor(values: Tensor) -> dict[str, Any]:
    """Return statistics of one factor's eigenvalues; no power law if too few exceed rounding."""
    ranks = np.unique(np.geomspace(1, len(values), _POINTS).round().astype(int))
    try:
        fit = power_law(values)
        law = {**vars(fit), **{key: _short(getattr(fit, key)) for key in _SHORTENED}}
    except InputError:
        law = None
    return {
        "d": len(values),
        "effective_rank": _short(effective_rank(values)),
        "participation_ratio": _short(participation_ratio(values)),
        "law": law,
        "ranks": ranks.tolist(),
        "values": [_short(float(values[rank - 1])) for rank in ranks],
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _tables(found: Sequence[Figures]) -> dict[str, Lines]:
    factors = [["median layer (least to most)", "width", *_FACTORS]]
    pairs = [["pairs that hold, % of all", *(f"{mass:.0%}" for mass in MASSES)]]
    for name, title in TITLES.items():
        factors.append(_factor_line(found, name, title))
        pairs.append(_pairs_line(found, name, title))
    return {"factors": factors, "pairs": pairs}


def _factor_line(found: Sequence[Figures], name: str, title: str) -> list[str]:
    widths = sorted({layer[side]["d"] for layer in found[0][name].values() for side in "GA"})
    cells = [title, " and ".join(map(str, widths))]
    for key, form in (("effective_rank", "{:.0f}"), ("participation_ratio", "{:.1f}")):
        for side in "GA":
            cells.append(
                _range([[v[side][key] for v in run[name].values()] for run in found], form)
            )
    for key in ("exponent", "r_squared"):
        for side in "GA":
            laws = [[v[side]["law"] for v in run[name].values()] for run in found]
            values = [[law[key] for law in run if law] for run in laws]
            cells.append(_range(values, "{:.2f}") if all(values) else "—")
    return cells


def _pairs_line(found: Sequence[Figures], name: str, title: str) -> list[str]:
    cells = [title]
    for mass in MASSES:
        shares = [
            [100 * v["pairs"][f"{mass:g}"] / v["of_pairs"] for v in run[name].values()]
            for run in found
        ]
        cells.append(spread([float(np.median(own)) for own in shares]))
    return cells


def _range(values: Sequence[Sequence[float]], form: str) -> str:
    """Return the median layer, mean ± sd over seeds, and the extremes over layers and seeds."""
    every = [value for own in values for value in own]
    ends = f"{form.format(min(every))} to {form.format(max(every))}"
    return f"{spread([float(np.median(own)) for own in values], form)} ({ends})"


STUDY = Study(_measure, _tables, spectra)
