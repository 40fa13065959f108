"""Spectra of curvature by layer: mass curves, effective ranks and power laws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from curvfast.core.eigenbasis import Eigenbasis
from curvfast.core.power_law import power_law
from curvfast.core.spectrum import effective_rank, mass_curve, participation_ratio
from curvfast.errors import InputError
from curvfast.report.spectra import TITLES, spectra
from curvfast.studies.study import Figures, Lines, Study, StudyConfig, spread
from curvfast.studies.subjects import demo_lm, lab_lm, lab_vit

MASSES = (0.5, 0.75, 0.9, 0.95, 0.99)
FRACTIONS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""Shares of all pairs at which mass curves are evaluated."""
MODELS: dict[str, Callable[[StudyConfig], Eigenbasis]] = {
    "demo_lm": lambda ask: demo_lm(ask).basis,
    "lab_lm": lambda ask: lab_lm(ask).basis,
    "lab_vit": lambda ask: lab_vit(ask).basis,
}
_POINTS = 32
_SHORTENED = ("exponent", "scale", "r_squared")
_FACTORS = (
    "effective rank of G", "of A", "participation ratio of G", "of A", "α of G", "of A", "R² of G",
    "of A",
)  # fmt: skip


def _measure(ask: StudyConfig) -> Figures:
    return {name: _layers(basis_of(ask)) for name, basis_of in MODELS.items()}


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
