"""Figure 2: activation ratios of memorized inputs, by curvature band."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from curvfast.analysis import activation_ratio
from curvfast.core.eigenbasis import Eigenbasis
from curvfast.lab import vit
from curvfast.lab.blocks import mlp_of
from curvfast.lab.images import Images
from curvfast.lab.vit_recipe import RECIPES
from curvfast.report.activations import activations, short
from curvfast.rows import RowRule
from curvfast.studies.reciters import ROWS
from curvfast.studies.rounding import to_four_decimals
from curvfast.studies.study import Figures, Lines, Study, StudyConfig, spread
from curvfast.studies.subjects import demo_lm

BANDS = (0.1, 0.25, 0.5, 1)
ORDERS = {"index": "share of components", "mass": "share of curvature mass"}
_PICTURES_AT_ONCE = 500


def _measure(ask: StudyConfig) -> Figures:
    found = _language(ask) | _vision(ask)
    return {name: to_four_decimals(curves) for name, curves in found.items()}


def _language(ask: StudyConfig) -> Figures:
    """Compare memorized passages with unseen windows, on suffix positions and on all."""
    subject = demo_lm(ask)
    recipe = subject.recipe
    texts = subject.passages.split(ROWS), subject.controls.split(ROWS)
    compared = {
        "language, suffix": _between(recipe.prefix, recipe.prefix + recipe.suffix),
        "language, passage": _between(1, recipe.prefix + recipe.suffix),
    }
    ask.say("comparing passages with windows never seen")
    return {
        name: _ratios(subject.model, subject.basis, *texts, rows) for name, rows in compared.items()
    }


def _vision(ask: StudyConfig) -> Figures:
    """Compare training images with memorized wrong labels with rightly labelled ones."""
    own = replace(RECIPES["mnist"], seed=ask.seed)
    recipe = own.quick() if ask.quick else own
    split = vit.split_of(recipe, ask.data)
    ask.say("the lab's vision transformer, which learnt wrong labels (cached)")
    model = vit.trained_vit(recipe, split, ask.say)
    learnt = vit.classify(model, split.train) == split.given
    known, clean = (split.train.take(learnt & noisy) for noisy in (split.noisy, ~split.noisy))
    found = {}
    for tokens in ("all", "cls"):
        ask.say(f"comparing pictures of wrong labels with those of right ones, tokens: {tokens}")
        statistics = replace(recipe.statistics[0], tokens=tokens)
        basis = vit.vit_basis(model, split, statistics, layers=mlp_of(recipe.blocks), seed=ask.seed)
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
