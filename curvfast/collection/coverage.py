"""Coverage: which parameters have factors, by which rows; and why others have none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from curvfast.kfac.evidence import Evidence
from curvfast.kfac.known import Known
from curvfast.model.families import LinearLayer, unsupported_reason
from curvfast.model.layers import LEFT_OUT, bare_names, linear_layers

_NOT_CHOSEN = "not chosen by layers="
_NEVER_CALLED = "the model never called it"
_SHOWN = 8


@dataclass(frozen=True)
class Skipped:
    """The batches in which a layer's gradient held NaN or infinity, and which counted nowhere."""

    count: int
    """How many."""
    batches: tuple[int, ...]
    """Their numbers, as far as they are kept: the first ones."""

    def __str__(self) -> str:
        """Return the count, and the numbers of the first."""
        first = ", ".join(map(str, self.batches[:_SHOWN]))
        more = ", …" if self.count > len(self.batches[:_SHOWN]) else ""
        return f"{self.count} batches that were not finite (number {first}{more})"


@dataclass(frozen=True)
class Coverage:
    """Coverage report: the parameters that have factors, and the reasons of those without.

    A row of a layer counts if its position is real and can reach a label: it is no padding; in a
    causal stream of tokens it is not after the last label of its sequence or packed document, or,
    where labels are not seen, not the last real position; in a decoder without a mask it is not
    after its last label that is not ignored. Positions before that count although they have no
    label themselves. In a stream that is not causal every real position counts. ``rows`` says
    which of these was done, layer by layer, who said that it applies, and how sure that is.
    """

    covered: dict[str, int]
    """Weights with factors: parameter name, or layer name of an expert -> rows counted so far."""
    uncovered: dict[str, str]
    """Every other parameter: name -> reason."""
    fraction: float
    """Share of the model's parameters that is covered."""
    sum_bytes: int
    """Upper bound of the bytes of all sums, float32 (layers that share an A need less)."""
    rows: dict[str, Known] = field(default_factory=dict)
    """Layer name -> which rows were counted, proven, told or by convention; ``left_out`` is the
    share of Σ‖g xᵀ‖² in the others."""
    unit: Known | None = None
    """How a gradient became one of the summed loss; None before the first."""
    skipped: dict[str, Skipped] = field(default_factory=dict)
    """Layer name -> its batches that were not finite, of layers that had such."""

    def to_dict(self) -> dict[str, Any]:
        """Return the coverage as JSON-able values."""
        return {
            "covered": self.covered,
            "uncovered": self.uncovered,
            "fraction": self.fraction,
            "sum_bytes": self.sum_bytes,
            **Evidence(self.unit, self.rows).to_dict(),
            "skipped": {name: asdict(skipped) for name, skipped in self.skipped.items()},
        }

    def __str__(self) -> str:
        """Return a short account: the share, rows and unit, then the reasons with their counts."""
        lines = [f"{len(self.covered)} weights covered, {self.fraction:.1%} of all parameters"]
        rules = Counter(map(str, self.rows.values()))
        lines += [f"  {count:>5} layers: {rule}" for rule, count in rules.items()]
        shares = {name: known.left_out for name, known in self.rows.items() if known.left_out}
        if shares:
            worst = max(shares, key=shares.__getitem__)
            lines.append(
                f"  {len(shares):>5} layers have a gradient in rows left out, up to "
                f"{shares[worst]:.2g} of Σ‖g xᵀ‖² in {worst!r}"
            )
        if self.unit is not None:
            lines.append(f"  unit of G: {self.unit}")
        bad = Counter(map(str, self.skipped.values()))
        lines += [f"  {count:>5} layers left out {skipped}" for skipped, count in bad.items()]
        reasons = Counter(self.uncovered.values())
        lines += [f"  {count:>5} not covered: {reason}" for reason, count in reasons.items()]
        return "\n".join(lines)


def describe(
    model: nn.Module,
    chosen: Mapping[str, LinearLayer],
    rows: Mapping[str, int],
    unrouted: Collection[str],
    sum_bytes: int,
    *,
    uncalled: Collection[str] = (),
    evidence: Evidence | None = None,
    skipped: Mapping[str, Skipped] | None = None,
) -> Coverage:
    """Return the coverage of ``chosen`` layers.

    A stacked parameter of experts counts as one, by its own name, if no expert of it was chosen,
    and otherwise expert by expert, by the names of the layers.

    Args:
        model: The model.
        chosen: Layers by name.
        rows: How many rows of each were counted.
        unrouted: Those that no counted token was routed to.
        sum_bytes: An upper bound for all sums.
        uncalled: Those that the model never called although it ran.
        evidence: How rows and unit are known so far.
        skipped: The batches of each that were not finite.
    """
    known = evidence or Evidence()
    supported: dict[int, list[LinearLayer]] = {}
    for layer in linear_layers(model).values():
        supported.setdefault(id(layer.parameter), []).append(layer)
    covered: dict[str, int] = {}
    uncovered: dict[str, str] = {}
    seen: set[int] = set()
    inside = total = 0
    names = bare_names(model)
    for full_name, module in model.named_modules():
        owner = names[full_name]
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{owner}.{leaf}" if owner else leaf
            # A tied parameter is named once, where it stands first, as torch does.
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            total += parameter.numel()
            layers = [x for x in supported.get(id(parameter), []) if x.module is module]
            if not any(layer.name in chosen or layer.name in uncalled for layer in layers):
                uncovered[name] = _reason(leaf, module, layers)
                continue
            for layer in layers:
                own = name if len(layers) == 1 else layer.name
                if layer.name in uncalled:
                    uncovered[own] = _NEVER_CALLED
                elif layer.name not in chosen:
                    uncovered[own] = _NOT_CHOSEN
                elif layer.name in unrouted:
                    uncovered[own] = "no counted token was routed to this expert"
                else:
                    covered[own] = rows.get(layer.name, 0)
                    inside += parameter.numel() // len(layers)
    return Coverage(
        covered, uncovered, inside / max(1, total), sum_bytes,
        {name: known.rows[name] for name in chosen if name in known.rows}, known.unit,
        {name: each for name, each in (skipped or {}).items() if each.count},
    )  # fmt: skip


def _reason(leaf: str, module: nn.Module, layers: list[LinearLayer]) -> str:
    if layers:
        left_out = LEFT_OUT.get(layers[0].kind)
        return f"{left_out}: left out unless named in layers=" if left_out else _NOT_CHOSEN
    if leaf.endswith("bias"):
        return "bias: edits leave it untouched"
    return unsupported_reason(module)
