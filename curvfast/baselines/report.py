"""Reports of baselines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from curvfast.tables import aligned


@dataclass(frozen=True)
class LayerChange:
    """The change of one layer's weight."""

    name: str
    weights: int
    """Its number of weights."""
    changed: float
    """Share of them that were changed."""
    zeroed: float
    """Share of them that were set to zero."""
    relative_change: float
    """‖W' − W‖ / ‖W‖ in Frobenius norm."""


@dataclass(frozen=True)
class ForgetReport:
    """Report of a baseline's ``forget``, layer by layer; prints as a table."""

    method: str
    """Class name of the baseline."""
    settings: Mapping[str, Any]
    """Its hyper-parameters, JSON-able."""
    layers: tuple[LayerChange, ...]
    seconds: float
    """Duration of the call."""
    memorized_loss: tuple[float, ...] = ()
    """Before each step: per-sample mean cross-entropy on that step's memorized rows, in nats."""
    clean_loss: tuple[float, ...] = ()
    """The same on its clean rows; empty where the method reads none."""

    @property
    def changed(self) -> float:
        """Share of all weights of these layers that were changed."""
        return self._share("changed")

    @property
    def zeroed(self) -> float:
        """Share of all weights of these layers that were set to zero."""
        return self._share("zeroed")

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        return {
            "method": self.method,
            "settings": dict(self.settings),
            "changed": self.changed,
            "zeroed": self.zeroed,
            "seconds": self.seconds,
            "memorized_loss": list(self.memorized_loss),
            "clean_loss": list(self.clean_loss),
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        """Return the report as an aligned table."""
        head = ["layer", "weights", "changed %", "zeroed %", "change %"]
        rows = [
            [
                c.name, str(c.weights), f"{100 * c.changed:.3f}", f"{100 * c.zeroed:.3f}",
                f"{100 * c.relative_change:.2f}",
            ]
            for c in self.layers
        ]  # fmt: skip
        return f"{aligned([head, *rows])}\n{self.method}: {self.seconds:.3f} seconds"

    def _share(self, what: str) -> float:
        total = sum(layer.weights for layer in self.layers)
        return float(sum(getattr(c, what) * c.weights for c in self.layers) / max(1, total))
