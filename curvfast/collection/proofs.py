"""Proofs: what the gradients of a running measurement have shown of its rows and its unit.

Numbers stay on the device until figures are read; nothing here waits for it before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from curvfast.collection.causality import Causality
from curvfast.collection.causes import cause_of_leak, cause_unreached
from curvfast.collection.hooks import Arrival
from curvfast.collection.leaks import Leaks
from curvfast.collection.reach import Reach
from curvfast.collection.unit import Unit, Unknown
from curvfast.collection.verdict import HARMLESS, INFERRED, MASKED, Facts, LeakFound
from curvfast.kfac.known import PROVEN, Known

_SEVERITY = (HARMLESS, MASKED, INFERRED)
DRIVEN = Known(
    "gradients of the summed negative log-likelihood", "the measurement made them itself", PROVEN
)


class Proofs:
    """The evidence of one process, added up batch by batch."""

    def __init__(self, model: nn.Module, causality: Causality, *, driven: bool) -> None:
        """Start without any.

        Args:
            model: Whose config tells of router losses.
            causality: What is known of it before the first batch.
            driven: Whether the measurement makes the gradients itself.
        """
        self._model = model
        self._driven = driven
        self.causality = causality
        self.leaks = Leaks()
        self.reach = Reach()
        self._units: dict[str, Known] = {}
        self._refused: str | None = None
        self._contradicted: str | None = None
        self._rules: dict[str, Known] = {}
        self._mixed: dict[str, str] = {}
        self._bad_batches: list[int] = []
        self._bad_layers: dict[str, list[int]] = {}
        self._earlier = Facts()

    def note_unit(self, unit: Unit | Unknown, batch: int) -> None:
        """Note how the unit of a batch is known, or why it is not."""
        if isinstance(unit, Unknown):
            self._refused = self._refused or f"batch {batch}: {unit.message}"
            return
        self._units.setdefault(unit.known.rule, unit.known)
        if unit.contradicted is not None and self._contradicted is None:
            self._contradicted = (
                f"batch {batch}: {unit.known.by} says that a gradient times {unit.value:.6g} is of "
                f"the summed loss, and the logits' gradient is that of a cross-entropy, of whose "
                f"sum it is the gradient times {unit.contradicted:.6g}. G follows what was said"
            )

    def note_bad(self, batch: int, layer: str | None = None) -> None:
        """Note a batch that is not finite: at its loss or logits, or from a layer downwards."""
        found = self._bad_batches if layer is None else self._bad_layers.setdefault(layer, [])
        if batch not in found:
            found.append(batch)

    def note_rows(self, arrival: Arrival, unit: float) -> None:
        """Note by which rule the rows of a call were counted, and what those left out hold."""
        said = arrival.batch.known(arrival.layer, arrival.g.shape[:-1])
        known = Known(said.rule, said.by, said.how)
        first = self._rules.setdefault(arrival.layer, known)
        if first.rule != known.rule:
            self._mixed.setdefault(arrival.layer, known.rule)
        self.leaks.note(arrival, unit)

    @property
    def bad_layers(self) -> Mapping[str, list[int]]:
        """The batches, by number, that each layer left out because it was not finite there."""
        return self._bad_layers

    @property
    def bad_batches(self) -> list[int]:
        """The batches whose loss or logits were not finite."""
        return self._bad_batches

    def facts(self) -> Facts:
        """Return all of it as plain values; waits for the device."""
        causality = self.causality
        rule = "the token after a position" if causality.causal else "the token at a position"
        kind, cause = self._unreached()
        own = Facts(
            units={"driven": DRIVEN} if self._driven else dict(self._units),
            unit_refused=self._refused,
            unit_contradicted=self._contradicted,
            causal=Known(f"predicts {rule}", causality.by, causality.how),
            causal_contradicted=causality.contradicted,
            rules=dict(self._rules),
            mixed=dict(self._mixed),
            leaks={name: self._leak(name) for name in self.leaks.layers()},
            reached=self.reach.read(),
            unreached_kind=kind,
            unreached_cause=cause,
            bad_batches=tuple(self._bad_batches),
            bad_layers={name: tuple(found) for name, found in self._bad_layers.items()},
        )
        return together([self._earlier, own])

    def _leak(self, name: str) -> LeakFound:
        leak = self.leaks.of(name)
        outside = float(leak.outside.sum())
        kind, cause = cause_of_leak(self._model, leak) if outside > 0 else (INFERRED, "")
        return LeakFound(name, outside, leak.weighted, kind, cause)

    def _unreached(self) -> tuple[str, str]:
        if self.reach.example is None or not self.reach.read()[1]:
            return HARMLESS, ""
        return cause_unreached(*self.reach.example)

    def restore(self, facts: Facts, causality: Causality) -> None:
        """Go on from the evidence of an earlier process."""
        self._earlier, self.causality = facts, causality


def together(parts: list[Facts]) -> Facts:
    """Return evidence of several processes, or of earlier and later batches, as one."""
    first, *rest = parts
    for each in rest:
        mixed = dict(first.mixed)
        for name, known in each.rules.items():
            if name in first.rules and first.rules[name].rule != known.rule:
                mixed.setdefault(name, known.rule)
        leaks = dict(first.leaks)
        for name, leak in each.leaks.items():
            known_leak = leaks.get(name)
            if known_leak is None:
                leaks[name] = leak
                continue
            worse = leak if leak.outside > 0 and not known_leak.cause else known_leak
            leaks[name] = replace(worse, outside=known_leak.outside + leak.outside)
        bad = dict(first.bad_layers)
        for name, numbers in each.bad_layers.items():
            bad[name] = (*bad.get(name, ()), *numbers)
        a, b, c, d = (x + y for x, y in zip(first.reached, each.reached, strict=True))
        worst = max(first, each, key=lambda part: _SEVERITY.index(part.unreached_kind))
        first = Facts(
            units={**each.units, **first.units},
            unit_refused=first.unit_refused or each.unit_refused,
            unit_contradicted=first.unit_contradicted or each.unit_contradicted,
            causal=first.causal or each.causal,
            causal_contradicted=first.causal_contradicted or each.causal_contradicted,
            rules={**each.rules, **first.rules},
            mixed={**each.mixed, **mixed},
            leaks=leaks,
            reached=(a, b, c, d),
            unreached_kind=worst.unreached_kind,
            unreached_cause=worst.unreached_cause,
            bad_batches=(*first.bad_batches, *each.bad_batches),
            bad_layers=bad,
        )
    return first


def to_json(facts: Facts) -> dict[str, Any]:
    """Return evidence as JSON-able values."""
    return asdict(facts)


def from_json(fields: Mapping[str, Any]) -> Facts:
    """Return what :func:`to_json` gave."""
    known = Known.from_dict
    both, unreached, leaking, neither = fields["reached"]
    return Facts(
        units={key: known(value) for key, value in fields["units"].items()},
        unit_refused=fields["unit_refused"],
        unit_contradicted=fields["unit_contradicted"],
        causal=known(fields["causal"]) if fields["causal"] else None,
        causal_contradicted=fields["causal_contradicted"],
        rules={name: known(value) for name, value in fields["rules"].items()},
        mixed=dict(fields["mixed"]),
        leaks={name: LeakFound(**value) for name, value in fields["leaks"].items()},
        reached=(both, unreached, leaking, neither),
        unreached_kind=fields["unreached_kind"],
        unreached_cause=fields["unreached_cause"],
        bad_batches=tuple(fields["bad_batches"]),
        bad_layers={name: tuple(found) for name, found in fields["bad_layers"].items()},
    )
