"""Blocks on the provenance of factors; every missing entry is tolerated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from curvfast.kfac.known import Known
from curvfast.report.document import Facts, Table
from curvfast.report.numbers import count, flat, percent, said

MEASURED = "What was measured"
_LABELS = {
    "sampled": "sampled from the model's own prediction (the true Fisher)",
    "given": "those of the data (the empirical Fisher)",
}


def collected(provenance: Mapping[str, Any]) -> Facts | None:
    """Return the facts of a collection: model, layers, rows, tokens, labels, precision.

    Args:
        provenance: The provenance of :class:`curvfast.Factors`; missing entries are left out.

    Returns:
        The facts; None if there are none.
    """
    model = _mapping(provenance, "model")
    collect = _mapping(provenance, "collect")
    covered = _mapping(_mapping(provenance, "coverage"), "covered")
    known = _mapping(provenance, "known")
    data = provenance.get("data")
    labels = provenance.get("labels")
    entries = [
        ("model", _model(model)),
        ("weights in", model.get("dtype")),
        ("layers", _layers(collect, covered)),
        ("share of parameters", _share(_mapping(provenance, "coverage").get("fraction"))),
        ("rows", _rows(list(covered.values()))),
        ("tokens", _number(provenance.get("tokens"))),
        ("batches", _number(provenance.get("batches"))),
        ("labels", _LABELS.get(str(labels), labels)),
        ("gradients", _gradients(collect, known)),
        ("rows that count", _rules(known)),
        ("unit of G", _unit(known)),
        ("sums in", "float32, counts in integers" if collect else None),
        ("processes", provenance.get("ranks") if provenance.get("ranks") != 1 else None),
        ("seed", provenance.get("seed")),
        ("data", said(data) if data else None),
    ]
    facts = tuple((name, str(value)) for name, value in entries if value not in (None, ""))
    return Facts(facts) if facts else None


def uncovered(provenance: Mapping[str, Any]) -> Table | None:
    """Return the reasons why parameters were not measured, with counts; None if unknown."""
    reasons = Counter(_mapping(_mapping(provenance, "coverage"), "uncovered").values())
    if not reasons:
        return None
    rows = tuple((str(reason), count(number)) for reason, number in sorted(reasons.items()))
    return Table("Parameters that were not measured", ("why", "parameters"), rows, folded=True)


def versions(provenance: Mapping[str, Any]) -> Facts | None:
    """Return the library versions of the collection; None if unknown."""
    model = _mapping(provenance, "model")
    found = _mapping(model, "versions") or _mapping(provenance, "versions")
    return Facts(tuple((name, str(v)) for name, v in found.items())) if found else None


def recipe(values: Mapping[str, Any], title: str) -> Table:
    """Return a collapsed table of every field of a recipe."""
    return Table(title, ("field", "value"), tuple(flat(values)), folded=True)


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = values.get(key)
    return found if isinstance(found, Mapping) else {}


def _model(model: Mapping[str, Any]) -> str | None:
    if not model:
        return None
    name, parameters = model.get("name"), model.get("parameters")
    parts = [
        str(model.get("class", "")),
        f"{parameters:,} parameters" if isinstance(parameters, int) else "",
        Path(str(name or "")).name,
    ]
    return ", ".join(part for part in parts if part)


def _layers(collect: Mapping[str, Any], covered: Mapping[str, Any]) -> str | None:
    chosen = collect.get("layers")
    if not covered:
        return None if chosen is None else said(chosen)
    return f"{len(covered)}" + ("" if chosen is None else f" (layers={said(chosen)})")


def _rows(rows: Sequence[Any]) -> str | None:
    if not rows or not all(isinstance(row, int) for row in rows):
        return None
    low, high = min(rows), max(rows)
    return f"{count(low)} a layer" if low == high else f"{count(low)} to {count(high)} a layer"


def _gradients(collect: Mapping[str, Any], known: Mapping[str, Any]) -> str | None:
    if not collect:
        return None
    told = collect.get("skip_last") and not known
    last = " The last position of each sequence is left out." if told else ""
    return f"of the summed loss.{last}"


def _rules(known: Mapping[str, Any]) -> str | None:
    """Return each row rule, with who said so and how sure it is, and how many layers have it."""
    rules = Counter(_line(each) for each in _mapping(known, "rows").values())
    rules.pop(None, None)
    if len(rules) == 1:
        return next(iter(rules))
    return "; ".join(f"{rule}: {count(n)} layers" for rule, n in rules.items()) or None


def _unit(known: Mapping[str, Any]) -> str | None:
    return _line(known.get("unit"))


def _line(fields: Any) -> str | None:
    try:
        return str(Known.from_dict(fields))
    except (KeyError, TypeError):
        return None


def _number(value: Any) -> str | None:
    return count(value) if isinstance(value, int) else None


def _share(value: Any) -> str | None:
    return percent(value) if isinstance(value, int | float) else None
