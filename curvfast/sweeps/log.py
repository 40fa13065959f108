"""The append-only log of a sweep: a header line that identifies it, then a line for each point.

``{"kind", "version", "of": {...}, "totals": {...}}``, then ``{"importance", "layers", "names",
"mass", "fraction", "kept_fraction", "metrics", "seconds"}`` a line. Non-finite values are null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from os import PathLike
from typing import Any

from curvfast.errors import FormatError, InputError
from curvfast.kfac.select import differing
from curvfast.model.identity import model_facts
from curvfast.storage import append_line, checksum, finished_lines, record_of
from curvfast.sweeps.frontier import UNEDITED, SweepPoint
from curvfast.sweeps.trials import Trials

KIND = "curvfast-sweep"
VERSION = 1
Key = tuple[object, ...]


class SweepLog:
    """The points of one sweep, read from its file and appended to it; or in memory only."""

    def __init__(self, path: str | PathLike[str] | None, trials: Trials, note: str = "") -> None:
        """Read the points measured earlier.

        Args:
            path: The file, created by the first point if missing; None for none.
            trials: The edits to measure.
            note: Further text that must be the same.

        Raises:
            InputError: If the file is of another sweep.
            FormatError: If it is no file of a sweep, or of a newer format.
            StorageError: If it cannot be read.
        """
        self._path = path
        self._known: dict[Key, SweepPoint] = {}
        self._header: str | None = None
        if path is None:
            return
        head = {"kind": KIND, "version": VERSION, **_facts(trials, note)}
        lines = finished_lines(path)
        if not lines:
            self._header = json.dumps(head, ensure_ascii=False)
            return
        _require_same(str(path), _read_header(str(path), lines[0]), head)
        self._known = {point.key: point for point in _points(str(path), lines)}

    def __contains__(self, key: Key) -> bool:
        """Return whether a point was measured."""
        return key in self._known

    def __getitem__(self, key: Key) -> SweepPoint:
        """Return a measured point."""
        return self._known[key]

    def add(self, point: SweepPoint) -> None:
        """Append a point; it is on the disk when this returns.

        Raises:
            InputError: If its metrics differ from those of earlier points.
            StorageError: If it cannot be written.
        """
        for earlier in self._known.values():
            if set(earlier.metrics) != set(point.metrics):
                raise InputError(
                    f"evaluate= returned {sorted(point.metrics)}, and before "
                    f"{sorted(earlier.metrics)}: every point must have the same metrics; with "
                    "another evaluate= pass another out="
                )
            break
        if self._path is not None:
            if self._header is not None:
                append_line(self._path, self._header)
                self._header = None
            append_line(self._path, _line(point))
        self._known[point.key] = point


def read_points(path: str | PathLike[str]) -> tuple[SweepPoint | None, list[SweepPoint]]:
    """Read the file of a sweep, finished or not.

    Returns:
        The unedited model's point, if it was measured, and the others in the order of the file.

    Raises:
        FormatError: If it is no file of a sweep, or of a newer format.
        StorageError: If it cannot be read.
    """
    lines = finished_lines(path)
    if not lines:
        raise FormatError(f"{str(path)!r} is missing or empty: no file of a sweep")
    _read_header(str(path), lines[0])
    points = _points(str(path), lines)
    unedited = next((point for point in points if point.importance == UNEDITED), None)
    return unedited, [point for point in points if point.importance != UNEDITED]


def _facts(trials: Trials, note: str) -> dict[str, Any]:
    """Return the facts that points depend on, besides rule, importance and ``evaluate``."""
    model = model_facts(trials.model)
    del model["versions"], model["dtype"]
    basis, corrections = trials.basis, trials.corrections
    totals = basis.totals()
    for number, task in enumerate(basis.tasks):
        totals |= {
            f"{n}, task {number}": float(g.sum() * a.sum()) for n, (g, a) in task.spectra.items()
        }
    if corrections is not None:
        totals |= {f"{n}, corrections": float(corrections[n].double().sum()) for n in basis}
    of = {
        "model": model,
        "weights": {name: checksum([trials.weight(name)]) for name in basis},
        "tasks": [[task.weight, task.normalize] for task in basis.tasks],
        "corrections": corrections is not None,
        "seed": trials.seed,
        "note": note,
    }
    return {"of": of, "totals": totals}


def _read_header(path: str, line: bytes) -> dict[str, Any]:
    head = record_of(line, repr(path), KIND, VERSION)
    if not all(isinstance(head.get(part), dict) for part in ("of", "totals")):
        raise FormatError(f"line 1 of {path!r} is damaged: it does not say of what the sweep is")
    return head


def _require_same(path: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    one, two = there["of"], here["of"]
    other = [name for name in two if one.get(name) != two[name]]
    if set(there["totals"]) != set(here["totals"]) or differing(there["totals"], here["totals"]):
        other.append("basis")
    if other:
        raise InputError(
            f"{path!r} holds another sweep: {', '.join(other)} differ. Pass another out=, or what "
            "it was made with; mass=, fraction= and importance= may grow"
        )


def _line(point: SweepPoint) -> str:
    record = asdict(point)
    record["metrics"] = {n: v if math.isfinite(v) else None for n, v in point.metrics.items()}
    return json.dumps(record, ensure_ascii=False)


def _points(path: str, lines: list[bytes]) -> list[SweepPoint]:
    found = []
    for number, line in enumerate(lines[1:], 2):
        try:
            record = json.loads(line)
            record["names"] = tuple(record["names"])
            record["metrics"] = {
                name: math.nan if value is None else value
                for name, value in record["metrics"].items()
            }
            found.append(SweepPoint(**record))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"line {number} of {path!r} is damaged: {error}") from error
    return found
