"""Verdict: what a measurement's evidence proves, warns of, and refuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from curvfast.errors import EvidenceError, NonFiniteError
from curvfast.kfac.known import CONVENTION, PROVEN, TOLD, Known, weakest

NEGLIGIBLE = 1e-6
"""Share of Σ‖g xᵀ‖² up to which rows that are left out change no figure."""
INFERRED, MASKED, HARMLESS = "inferred", "masked", "harmless"
"""Whether rows follow a rule that was read off the call, a mask that it named, or do not matter."""


@dataclass(frozen=True)
class LeakFound:
    """Curvature in one layer's left-out rows."""

    layer: str
    outside: float
    """Σ‖g‖²‖x‖², or Σ‖g‖² where x is shared."""
    weighted: bool
    kind: str
    cause: str


@dataclass(frozen=True)
class Facts:
    """Evidence of one process, or of several together, as plain values."""

    units: Mapping[str, Known] = field(default_factory=dict)
    """By rule and who said so."""
    unit_refused: str | None = None
    unit_contradicted: str | None = None
    causal: Known | None = None
    causal_contradicted: str | None = None
    rules: Mapping[str, Known] = field(default_factory=dict)
    """By layer, the first batch's."""
    mixed: Mapping[str, str] = field(default_factory=dict)
    """By layer, another rule that a later batch had."""
    leaks: Mapping[str, LeakFound] = field(default_factory=dict)
    """By layer that left rows out."""
    reached: tuple[int, int, int, int] = (0, 0, 0, 0)
    unreached_kind: str = HARMLESS
    unreached_cause: str = ""
    bad_batches: tuple[int, ...] = ()
    bad_layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def bad_of(self, layer: str) -> tuple[int, ...]:
        """Return the numbers of the batches that were not finite, at the loss or at a layer."""
        return tuple(sorted({*self.bad_batches, *self.bad_layers.get(layer, ())}))


@dataclass(frozen=True)
class Energy:
    """What counts of one layer: Σ‖a‖², Σ‖g‖² and rows."""

    inputs: float
    gradients: float
    rows: int


@dataclass(frozen=True)
class Verdict:
    """What follows from evidence."""

    unit: Known
    rows: Mapping[str, Known]
    refusals: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return how unit and rows are known, JSON-able."""
        return {
            "unit": self.unit.to_dict(),
            "rows": {name: known.to_dict() for name, known in self.rows.items()},
        }


def judge(facts: Facts, energies: Mapping[str, Energy], *, driven: bool) -> Verdict:
    """Return what a measurement's evidence proves, warns of and refuses.

    Args:
        facts: Of all processes together.
        energies: Of every layer with rows.
        driven: Whether the labels were made at the rows that count, by the measurement itself.
    """
    refusals = [m for m in (facts.unit_refused, facts.causal_contradicted) if m]
    warned = [facts.unit_contradicted] if facts.unit_contradicted else []
    shares = {name: _share(facts.leaks.get(name), own) for name, own in energies.items()}
    for kind, told in ((INFERRED, refusals), (MASKED, warned)):
        leaking = [
            n
            for n, share in shares.items()
            if share > NEGLIGIBLE and facts.leaks[n].kind == kind and not _told(facts, n)
        ]
        if leaking:
            told.append(_of_leaks(leaking, shares, facts))
    both, unreached, _, _ = facts.reached
    if unreached and both and facts.unreached_kind != HARMLESS:
        told = refusals if facts.unreached_kind == INFERRED else warned
        told.append(
            f"{unreached} of {both + unreached} counted positions reach no label: their gradient "
            f"at the input embedding is exactly zero. {facts.unreached_cause}"
        )
    for name, other in facts.mixed.items():
        refusals.append(
            f"layer {name!r} counted rows by two rules: {facts.rules[name].rule}, and {other}. "
            "Measure what is called in one way and what is called in another apart, or pass rows="
        )
    rows = {name: _known(facts, name, shares.get(name, 0.0), driven) for name in facts.rules}
    return Verdict(_unit(facts), rows, tuple(refusals), tuple(warned))


def require_known(verdict: Verdict, *, strict: bool) -> None:
    """Raise if what was measured is not known.

    Args:
        verdict: What the evidence proves.
        strict: Whether what is warned of is refused too.

    Raises:
        EvidenceError: If so; the message says why and what to pass.
    """
    refusals = [*verdict.refusals, *(verdict.warnings if strict else ())]
    if refusals:
        raise EvidenceError(
            "what was measured is not known, so no figure is given:\n  " + "\n  ".join(refusals)
        )


def require_finite(facts: Facts) -> None:
    """Raise if a batch, or what a layer saw of one, was not finite.

    Raises:
        NonFiniteError: If so; the message says which.
    """
    bad = [f"batch {number}: its loss or logits" for number in facts.bad_batches]
    bad += [
        f"batch {', '.join(map(str, numbers))}: layer {name!r}"
        for name, numbers in facts.bad_layers.items()
    ]
    if bad:
        raise NonFiniteError(
            "NaN or infinity came, and on_nonfinite='error' takes no figure beside it; what was "
            "finite is still here. Pass on_nonfinite='skip' to leave these out, or look at them:"
            "\n  " + "\n  ".join(bad)
        )


def _share(leak: LeakFound | None, inside: Energy) -> float:
    if leak is None or not leak.outside > 0:
        return 0.0
    per_row = inside.inputs / max(1, inside.rows) if leak.weighted else 1.0
    return leak.outside / (leak.outside + inside.gradients * per_row)


def _told(facts: Facts, name: str) -> bool:
    """Return whether the caller told which rows of a layer count: that is obeyed."""
    return name in facts.rules and facts.rules[name].how == TOLD


def _of_leaks(layers: Sequence[str], shares: Mapping[str, float], facts: Facts) -> str:
    worst = max(layers, key=lambda name: shares[name])
    rule = facts.rules.get(worst)
    more = f" and {len(layers) - 1} more layers" if len(layers) > 1 else ""
    return (
        f"rows of {worst!r}{more} that were left out hold {shares[worst]:.2g} of its curvature, "
        f"and a row that reaches no label holds none. The rule was: {rule.rule if rule else '?'}"
        f" ({rule.by if rule else '?'}). {facts.leaks[worst].cause}"
    )


def _known(facts: Facts, name: str, share: float, driven: bool) -> Known:
    known = replace(facts.rules[name], left_out=share)
    if known.how == TOLD:
        return known
    both, unreached, _, _ = facts.reached
    settled = facts.causal is not None and facts.causal.how != CONVENTION
    seen = (
        any(leak.outside == 0 for leak in facts.leaks.values())
        if driven
        else bool(both) and (not unreached or facts.unreached_kind == HARMLESS)
    )
    proven = share <= NEGLIGIBLE and seen and (settled or driven)
    return replace(known, how=PROVEN if proven else CONVENTION)


def _unit(facts: Facts) -> Known:
    units = list(facts.units.values())
    if not units:
        return Known("no gradient came", "nothing", CONVENTION)
    if len(units) == 1:
        return units[0]
    rules = sorted({unit.rule for unit in units})
    return Known(
        "; ".join(rules), "; ".join(sorted({u.by for u in units})), weakest(*(u.how for u in units))
    )
