"""Comparison of a model's scores before and after an edit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """One score of a model."""

    task: str
    metric: str
    value: float
    stderr: float | None = None
    """Standard error of ``value``, if known."""


@dataclass(frozen=True)
class Change:
    """One score of a model before and after an edit."""

    before: Score
    after: Score | None
    """None where there was no edit."""

    @property
    def ratio(self) -> float | None:
        """After / before; None if it is undefined."""
        if self.after is None or self.before.value == 0:
            return None
        return self.after.value / self.before.value

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON-able values; None for NaN and infinities."""
        after = self.after or Score("", "", math.nan)
        figures = {
            "before": self.before.value, "before_stderr": self.before.stderr,
            "after": after.value, "after_stderr": after.stderr, "ratio": self.ratio,
        }  # fmt: skip
        return {"task": self.before.task, "metric": self.before.metric} | {
            key: value if value is not None and math.isfinite(value) else None
            for key, value in figures.items()
        }


def changes(before: Sequence[Score], after: Sequence[Score] | None) -> list[Change]:
    """Pair scores by task and metric, in the order of ``before``.

    Args:
        before: Scores of the unedited model.
        after: Scores of the edited one on the same tasks; None where there was no edit.
    """
    found = {(score.task, score.metric): score for score in after or ()}
    return [Change(score, found.get((score.task, score.metric))) for score in before]


def table_of(compared: Sequence[Change]) -> list[list[str]]:
    """Return cells by line, headings first; without an edit there is one column of figures."""
    edited = any(change.after for change in compared)
    metric = max(6, *(len(change.before.metric) for change in compared))
    lines = [["task", "metric".ljust(metric), *_HEADINGS[edited]]]
    for change in compared:
        figures = [_shown(change.before)]
        if edited:
            ratio = "" if change.ratio is None else f"{change.ratio:.3f}"
            figures += ["" if change.after is None else _shown(change.after), ratio]
        lines.append([change.before.task, change.before.metric.ljust(metric), *figures])
    return lines


def flat(scores: Sequence[Score]) -> Mapping[str, float]:
    """Return values by ``task.metric``, and standard errors by ``task.metric_stderr``."""
    found = {}
    for score in scores:
        found[f"{score.task}.{score.metric}"] = score.value
        if score.stderr is not None:
            found[f"{score.task}.{score.metric}_stderr"] = score.stderr
    return found


_HEADINGS = {False: ["value"], True: ["before", "after", "after/before"]}


def _shown(score: Score) -> str:
    error = "" if score.stderr is None else f" ± {score.stderr:.2g}"
    return f"{score.value:.4g}{error}"
