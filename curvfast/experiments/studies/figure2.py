"""Figure 2: activation ratios of memorized inputs, by curvature band."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvfast.analysis import activation_ratio
from curvfast.experiments.data.images import Images
from curvfast.experiments.models.vit import classify, split_of, trained_vit
from curvfast.experiments.recipes import RECIPES
from curvfast.experiments.runs import lab_vit
from curvfast.experiments.runs.comparison import mlp_of
from curvfast.experiments.studies.study import (
    Figures,
    Lines,
    Study,
    StudyConfig,
    spread,
    to_four_decimals,
)
from curvfast.experiments.studies.subjects import ROWS, demo_lm
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.model.rows import RowRule
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


BANDS = (0.1, 0.25, 0.5, 1)
ORDERS = {"index": "share of components", "mass": "share of curvature mass"}
_PICTURES_AT_ONCE = 500


def _measure(config: StudyConfig) -> Figures:
    found = _language(config) | _vision(config)
    return {name: to_four_decimals(curves) for name, curves in found.items()}


def _language(config: StudyConfig) -> Figures:
    """Compare memorized passages with unseen windows, on suffix positions and on all."""
    subject = demo_lm(config)
    recipe = subject.recipe
    texts = subject.passages.split(ROWS), subject.controls.split(ROWS)
    compared = {
        "language, suffix": _between(recipe.prefix, recipe.prefix + recipe.suffix),
        "language, passage": _between(1, recipe.prefix + recipe.suffix),
    }
    config.report_stage("comparing passages with windows never seen")
    return {
        name: _ratios(subject.model, subject.basis, *texts, rows) for name, rows in compared.items()
    }


def _vision(config: StudyConfig) -> Figures:
    """Compare training images with memorized wrong labels with rightly labelled ones."""
    own = replace(RECIPES["mnist"], seed=config.seed)
    recipe = own.quick() if config.quick else own
    split = split_of(recipe, config.data)
    config.report_stage("the lab's vision transformer, which learnt wrong labels (cached)")
    model = trained_vit(recipe, split, config.report_stage)
    learnt = classify(model, split.train) == split.given
    known, clean = (split.train.take(learnt & noisy) for noisy in (split.noisy, ~split.noisy))
    found = {}
    for tokens in ("all", "cls"):
        config.report_stage(
            f"comparing pictures of wrong labels with those of right ones, tokens: {tokens}"
        )
        statistics = replace(recipe.statistics[0], tokens=tokens)
        basis = lab_vit.vit_basis(
            model, split, statistics, layers=mlp_of(recipe.blocks), seed=config.seed
        )
        rows = None if tokens == "all" else _between(0, 1)
        found[f"vision, {tokens}"] = _ratios(model, basis, _batches(known), _batches(clean), rows)
    return found


def _ratios(
    model: Any,
    basis: Eigenbasis,
    known: Sequence[Any],
    clean: Sequence[Any],
    rows: RowRule | None,
) -> Figures:
    return {
        by: activation_ratio(model, basis, known, clean, bands=BANDS, by=by, rows=rows).to_dict()
        for by in ORDERS
    }


def _between(first: int, end: int) -> RowRule:
    """Return the rule that counts positions ``first`` to ``end`` - 1 of each text."""

    def rows(_: str, shape: torch.Size) -> Tensor:
        keep = torch.zeros(shape, dtype=torch.bool)
        keep[:, first:end] = True
        return keep

    return rows


def _batches(images: Images) -> list[dict[str, Tensor]]:
    return [{"pixel_values": part} for part in images.pixels.split(_PICTURES_AT_ONCE)]


def _tables(found: Sequence[Figures]) -> dict[str, Lines]:
    tables = {}
    for name in found[0]:
        for by, meaning in ORDERS.items():
            runs = [run[name][by]["layers"] for run in found]
            edges = [0, *BANDS]
            heads = [f"{100 * a:g}-{100 * b:g} %" for a, b in zip(edges, BANDS, strict=False)]
            lines = [[f"bands by {meaning}", *heads, "intervals off 1: first, last"]]
            lines += [[short(layer), *_row([run[layer] for run in runs])] for layer in runs[0]]
            tables[f"{name}, by {by}"] = lines
    return tables


def _row(curves: Sequence[Figures]) -> list[str]:
    """Return ratios by band over seeds, and the number of seeds whose interval excludes 1."""
    cells = [_spread(curve["ratio"][band] for curve in curves) for band in range(len(BANDS))]
    below = sum(curve["high"][0] is not None and curve["high"][0] < 1 for curve in curves)
    above = sum(curve["low"][-1] is not None and curve["low"][-1] > 1 for curve in curves)
    return [*cells, f"{below} below, {above} above"]


def _spread(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return spread(known) if known else "none"


STUDY = Study(_measure, _tables, activations)
