"""Tables of the comparison, from the JSON of its runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from frontier.matched import Matched, at_rise, furthest, over_seeds
from frontier.methods import METHODS, Method

RESULTS = Path(__file__).parents[1] / "results" / "frontier"
RISES = (0.05, 0.10, 0.20)
DETAILED = 0.10
Run = dict[str, Any]
Lines = list[list[str]]
_HALVES = ("seen", "unseen")


def runs(setting: str, folder: Path = RESULTS) -> list[Run]:
    """Read the runs of a setting, by seed."""
    paths = sorted(folder.glob(f"{setting}-seed*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def recited(found: Sequence[Run]) -> Lines:
    """Strict recitation of both halves at each perplexity."""
    head = ["recited word for word, %"]
    head += [f"{rise:+.0%}, {half}" for rise in RISES for half in _HALVES]

    def cells(method: Method) -> list[str]:
        return [
            cell
            for rise in RISES
            for cell in _halves(_matched(found, method, rise), "strict", _percent)
        ]

    return [head, ["unedited", *_unedited(found, "strict", _percent) * len(RISES)],
            *_by_method(found, cells)]  # fmt: skip


def detailed(found: Sequence[Run]) -> Lines:
    """Every measure at one perplexity, and the cost of the change."""
    head = [f"perplexity {DETAILED:+.0%}", "nearly recited, seen, %", "unseen", "distance, seen"]
    head += ["unseen", "CPU seconds"]

    def cells(method: Method) -> list[str]:
        matched = _matched(found, method, DETAILED)
        cost, _ = over_seeds(matched, "cpu_seconds")
        near, distance = (
            _halves(matched, measure, text)
            for measure, text in (("loose", _percent), ("levenshtein", _distance))
        )
        return [*near, *distance, f"{cost:.0f}" if cost >= 10 else f"{cost:.2g}"]

    near, distance = _unedited(found, "loose", _percent), _unedited(found, "levenshtein", _distance)
    return [head, ["unedited", *near, *distance, ""], *_by_method(found, cells)]


def _by_method(found: Sequence[Run], cells: Callable[[Method], list[str]]) -> Lines:
    """Return a line for each method that every run has measured in full."""
    return [
        [method.label, *cells(method)]
        for method in METHODS[found[0]["name"]]
        if all(
            {*map(str, method.strengths)} <= {*run["points"].get(method.name, ())} for run in found
        )
    ]


def _matched(found: Sequence[Run], method: Method, rise: float) -> list[Matched]:
    points = [[run["points"][method.name][str(s)] for s in method.strengths] for run in found]
    return [at_rise(run["base"], own, rise) for run, own in zip(found, points, strict=True)]


def _halves(
    found: Sequence[Matched], measure: str, text: Callable[[float, float | None], str]
) -> list[str]:
    cells = [text(*over_seeds(found, f"{measure}_{half}")) for half in _HALVES]
    short = furthest(found)
    return cells if short is None else [f"{cell} (at {short:+.0%})" for cell in cells]


def _unedited(
    found: Sequence[Run], measure: str, text: Callable[[float, float | None], str]
) -> list[str]:
    whole = [Matched(run["base"], 0, True) for run in found]
    return _halves(whole, measure, text)


def _percent(mean: float, spread: float | None) -> str:
    return f"{100 * mean:.0f}" + ("" if spread is None else f" ± {100 * spread:.0f}")


def _distance(mean: float, spread: float | None) -> str:
    return f"{mean:.2f}" + ("" if spread is None else f" ± {spread:.2f}")
