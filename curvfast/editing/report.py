"""Reports of an edit, layer by layer, with its provenance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from curvfast.display import aligned


def as_json(entry: Any) -> dict[str, Any]:
    """Return the fields of a layer's entry; None for NaN, which JSON cannot hold."""
    return {key: None if value != value else value for key, value in asdict(entry).items()}


@dataclass(frozen=True)
class LayerEdit:
    """The effect of an edit on one layer."""

    name: str
    pairs: int
    """Eigenpairs kept."""
    fraction: float
    """Kept share of the layer's eigenpairs."""
    mass: float
    """Kept share of the layer's curvature mass."""
    relative_change: float
    """‖W + α (W' − W) − W‖ / ‖W‖ in Frobenius norm."""
    work: float
    """Executed share of a dense projection's FLOPs."""
    seconds: float


@dataclass(frozen=True)
class EditReport:
    """Report of :func:`curvfast.edit`, layer by layer; prints as a table."""

    layers: tuple[LayerEdit, ...]
    total_pairs: int
    """All eigenpairs of the edited layers: their number of weights."""
    strength: float = 1.0
    """The α of W + α (W' − W)."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Provenance, JSON-able: model, rule, factors."""

    @property
    def kept_fraction(self) -> float:
        """Kept share of all eigenpairs of the edited layers."""
        return sum(layer.pairs for layer in self.layers) / max(1, self.total_pairs)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        return {
            "kept_fraction": self.kept_fraction,
            "total_pairs": self.total_pairs,
            "strength": self.strength,
            "layers": [as_json(layer) for layer in self.layers],
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EditReport:
        """Return the report that :meth:`to_dict` gave ``values`` of."""
        layers = tuple(_read(entry) for entry in values["layers"])
        return cls(layers, values["total_pairs"], values["strength"], values["provenance"])

    def __str__(self) -> str:
        """Return the report as an aligned table."""
        head = ["layer", "pairs", "kept %", "mass %", "change %", "work %", "seconds"]
        rows = [
            [
                e.name, str(e.pairs), f"{100 * e.fraction:.2f}", f"{100 * e.mass:.2f}",
                f"{100 * e.relative_change:.2f}", f"{100 * e.work:.2f}", f"{e.seconds:.3f}",
            ]
            for e in self.layers
        ]  # fmt: skip
        lines = [aligned([head, *rows])]
        if self.strength != 1:
            lines.append(f"at strength {self.strength:g}")
        return "\n".join(lines)


def _read(entry: Mapping[str, Any]) -> LayerEdit:
    values: dict[str, Any] = {each.name: entry[each.name] for each in fields(LayerEdit)}
    values |= {key: math.nan for key, value in values.items() if value is None}
    return LayerEdit(**values)
