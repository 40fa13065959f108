"""Evidence: how the rows and the unit of a measurement are known, and which may be mixed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from curvfast import distributed
from curvfast.errors import CurvfastError, InputError
from curvfast.kfac.known import CONVENTION, Known, weakest

KEY = "known"
"""Where evidence stands in provenance."""
_BEFORE = "measured by an earlier version, or made by hand"
_RANKS_BEFORE = "the ranks before it"
_SHOWN = 3


@dataclass(frozen=True)
class Evidence:
    """How the figures of a measurement are known: the unit of G, and the rows of each layer."""

    unit: Known | None = None
    """How a gradient became one of the summed loss; None before the first arrived."""
    rows: Mapping[str, Known] = field(default_factory=dict)
    """Which rows were counted, by the names of the layers that have some."""

    def to_dict(self) -> dict[str, Any]:
        """Return the evidence as JSON-able values."""
        return {
            "unit": self.unit and self.unit.to_dict(),
            "rows": {name: known.to_dict() for name, known in self.rows.items()},
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Evidence:
        """Return what :meth:`to_dict` gave."""
        rows = {name: Known.from_dict(known) for name, known in fields["rows"].items()}
        return cls(fields["unit"] and Known.from_dict(fields["unit"]), rows)


def evidence_of(provenance: Mapping[str, Any], layers: Iterable[str]) -> Evidence:
    """Return the evidence in a provenance, of all ``layers``.

    Args:
        provenance: Of factors, corrections or an eigenbasis.
        layers: Their names.

    Returns:
        What it holds; where it holds nothing, as before evidence was kept, a convention.
    """
    found = Evidence.from_dict(provenance[KEY]) if KEY in provenance else Evidence()
    rule = _rule_before(provenance)
    rows = Known(rule, _BEFORE, CONVENTION)
    unit = found.unit or Known("not recorded", _BEFORE, CONVENTION)
    return Evidence(unit, {name: found.rows.get(name, rows) for name in layers})


def merged(
    one: Evidence, two: Evidence, between: tuple[str, str] = ("the first", "the second")
) -> Evidence:
    """Return the evidence of two measurements together: of each figure, the weakest.

    Args:
        one: The first measurement's.
        two: The second's; a layer or unit that one of them lacks is the other's.
        between: What messages call the two.

    Returns:
        Proven and told by one rule are told; ``left_out`` is the larger share.

    Raises:
        InputError: If a layer's rows were counted by different rules, or a convention meets what is
            proven or told.
    """
    shared = [name for name in one.rows if name in two.rows]
    _require_same_rule({n: (one.rows[n], two.rows[n]) for n in shared}, between)
    unit = one.unit or two.unit
    if one.unit and two.unit:
        _require_as_sure({"the unit of G": (one.unit, two.unit)}, between)
        unit = _together(one.unit, two.unit)
    rows = {**one.rows, **two.rows}
    return Evidence(unit, rows | {n: _together(one.rows[n], two.rows[n]) for n in shared})


def agreed(own: Evidence, group: distributed.Group, error: CurvfastError | None = None) -> Evidence:
    """Return the evidence of all ranks together; called by all, whether or not one has failed.

    Args:
        own: This rank's; of one without batches empty.
        group: The ranks; None is this process alone.
        error: This rank's refusal, if it has one.

    Returns:
        The same on every rank.

    Raises:
        InputError: On every rank, if ranks followed different rules, or another one has refused.
        CurvfastError: ``error``.
        DistributedError: If another rank is gone.
    """
    facts = distributed.gather((own.to_dict(), error and str(error)), group)
    if error is not None:
        raise error
    for rank, (_, message) in enumerate(facts):
        if message:
            raise InputError(f"rank {rank} has no figures to add: {message}")
    together = Evidence.from_dict(facts[0][0])
    for rank, (fields, _) in enumerate(facts[1:], 1):
        together = merged(together, Evidence.from_dict(fields), (_RANKS_BEFORE, f"rank {rank}"))
    return together


def _rule_before(provenance: Mapping[str, Any]) -> str:
    """Return the row rule of a provenance that does not state it, as far as it is recorded."""
    rules = {_rule_before(part) for part in provenance.get("merged", ())}
    if len(rules) == 1:
        return rules.pop()
    last = provenance.get("collect", {}).get("skip_last")
    return "not recorded" if last is None else f"not recorded, skip_last={last}"


def _require_same_rule(rows: Mapping[str, tuple[Known, Known]], between: tuple[str, str]) -> None:
    _require_as_sure({f"the rows of layer {n!r}": pair for n, pair in rows.items()}, between)
    differing = {n: pair for n, pair in rows.items() if pair[0].rule != pair[1].rule}
    if differing:
        name, pair = next(iter(differing.items()))
        raise InputError(
            f"{_said(f'the rows of layer {name!r}', pair, between)}: counted by different rules"
            f"{_more(differing)}, so together they would be of neither. Measure both with the same "
            "options: skip_last=, rows=, and the masks of the calls"
        )


def _require_as_sure(figures: Mapping[str, tuple[Known, Known]], between: tuple[str, str]) -> None:
    unsure = {
        what: pair
        for what, pair in figures.items()
        if (pair[0].how == CONVENTION) != (pair[1].how == CONVENTION)
    }
    if unsure:
        what, pair = next(iter(unsure.items()))
        older = between[pair[1].how == CONVENTION]
        raise InputError(
            f"{_said(what, pair, between)}: a convention may be wrong where what is proven or told "
            f"is not{_more(unsure)}, so they are not mixed. Measure {older} anew, with the options "
            "of the other"
        )


def _said(what: str, pair: tuple[Known, Known], between: tuple[str, str]) -> str:
    return f"{what}: {pair[0]} in {between[0]}, {pair[1]} in {between[1]}"


def _more(figures: Mapping[str, Any]) -> str:
    others = [what.removeprefix("the rows of layer ") for what in figures][1:]
    if not others:
        return ""
    rest = f", … {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
    return f" (and so in {', '.join(others[:_SHOWN])}{rest})"


def _together(one: Known, two: Known) -> Known:
    return Known(
        _joined(one.rule, two.rule), _joined(one.by, two.by), weakest(one.how, two.how),
        max(one.left_out, two.left_out),
    )  # fmt: skip


def _joined(*texts: str) -> str:
    return "; ".join(dict.fromkeys(part for text in texts for part in text.split("; ")))
