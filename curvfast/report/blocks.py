"""Blocks shared by several kinds of results: spectra, staircases, edits, passages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TypeVar

from curvfast.editing.report import EditReport
from curvfast.kfac.spectrum import CurvatureSpectrum
from curvfast.report.curvature import LayerCurvature, Stairs
from curvfast.report.document import Block, Gallery, Picture, Recitals, Table, Text
from curvfast.report.inline import inline
from curvfast.report.numbers import count, decimal, percent, said, significant
from curvfast.report.panels import mass_curves, spectrum_panel, staircase_panel
from curvfast.report.recitals import Continuation, recital

_PANELS = 24
T = TypeVar("T")


def spectra(layers: Mapping[str, LayerCurvature]) -> list[Block]:
    """Return blocks of layers' spectra: mass curves, a panel per layer, and a table."""
    if not layers:
        return []
    few = _few(layers)
    panels = tuple(
        Picture(
            inline(partial(spectrum_panel, layer)),
            f"Eigenvalues of A and G of {name}, falling over their number, both axes logarithmic.",
            name,
        )
        for name, layer in few.items()
    )
    rows = tuple(_spectrum_row(name, layer.spectrum) for name, layer in layers.items())
    head = (
        "layer", "d_out × d_in", "Σλ", "Σμ", "effective rank of G", "of A", "of all pairs",
        "mass in the flattest half",
    )  # fmt: skip
    return [
        Picture(
            inline(lambda: mass_curves(layers)),
            "Share of the curvature mass in the largest eigenpairs, and its median over layers.",
            "How few eigenpairs hold the curvature mass. A thin line is a layer, the first ones "
            "dark; the thick line is their median. An edit at ρ keeps what lies left of where a "
            "layer's line reaches ρ.",
        ),
        Gallery(
            "Eigenvalues of A = E[aaᵀ] and G = E[ggᵀ] over their number, as shares of the largest, "
            f"both axes logarithmic{_left_out(layers, few)}.",
            panels,
        ),
        Table("Spectra in numbers", head, rows, folded=True),
    ]


def staircases(kept: Mapping[str, Stairs]) -> list[Block]:
    """Return a gallery of each layer's staircase."""
    few = _few(kept)
    panels = tuple(_staircase(name, stairs) for name, stairs in few.items())
    if not panels:
        return []
    caption = (
        "Pairs (i, j) of eigenvectors of G and of A, the largest at the upper left. The shaded "
        f"area is what is kept, and its share of the square the kept share{_left_out(kept, few)}."
    )
    return [Gallery(caption, panels)]


def _staircase(name: str, stairs: Stairs) -> Picture:
    share = percent(stairs.pairs / (stairs.rows * stairs.columns))
    mass = "" if math.isnan(stairs.mass) else f", {percent(stairs.mass)} of the mass"
    return Picture(
        inline(lambda: staircase_panel(stairs)),
        f"The staircase of {name}: {share} of the pairs are kept{mass}.",
        f"{name}: {share} of the pairs{mass}",
    )


def edit_table(report: EditReport) -> list[Block]:
    """Return tables of an edit, in total and layer by layer."""
    rows = tuple(
        (
            e.name, count(e.pairs), percent(e.fraction), percent(e.mass),
            percent(e.relative_change), percent(e.work),
        )
        for e in report.layers
    )  # fmt: skip
    rule = report.provenance.get("rule", {})
    asked = ", ".join(f"{'ρ' if k == 'mass' else k} = {said(v)}" for k, v in rule.items())
    strength = "" if report.strength == 1 else f" at strength {report.strength:g}"
    return [
        Text(
            f"{len(report.layers)} weights were edited{strength}"
            f"{f' at {asked}' if asked else ''}: {percent(report.kept_fraction)} of "
            f"{count(report.total_pairs)} eigenpairs are kept."
        ),
        Table(
            "The edit, layer by layer",
            (
                "layer", "pairs kept", "of all pairs", "of the curvature mass", "change of W",
                "work of a dense product",
            ),
            rows,
        ),
    ]  # fmt: skip


def recited(passages: Sequence[Continuation], chosen: str) -> list[Block]:
    """Return passages before and after, side by side."""
    how = f"{chosen} " if chosen else ""
    return [
        Text(f"{how}Words that are not the true text's, in its order, are marked."),
        Recitals(tuple(recital(passage) for passage in passages)),
    ]


def _few(layers: Mapping[str, T]) -> dict[str, T]:
    """Return at most 24 layers, spread evenly."""
    names = list(layers)
    step = max(1.0, len(names) / _PANELS)
    return {n: layers[n] for n in (names[int(i * step)] for i in range(min(_PANELS, len(names))))}


def _left_out(layers: Mapping[str, T], few: Mapping[str, T]) -> str:
    return "" if len(few) == len(layers) else f"; {len(few)} of {len(layers)} layers, evenly spread"


def _spectrum_row(name: str, s: CurvatureSpectrum) -> tuple[str, ...]:
    return (
        name, f"{s.d_out} × {s.d_in}", significant(s.trace_g), significant(s.trace_a),
        decimal(s.effective_rank_g, 1), decimal(s.effective_rank_a, 1),
        percent(s.effective_rank / (s.d_out * s.d_in), 2), percent(s.flattest_half, 3),
    )  # fmt: skip
