"""Known: how it is known which rows were counted, and in which unit the gradients are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PROVEN = "proven"
"""The gradients of the measurement itself show it."""
TOLD = "told"
"""The caller said so, by an argument."""
CONVENTION = "convention"
"""The usual reading of a mask, a class name or a loss was taken, and nothing contradicted it."""

_ORDER = (PROVEN, TOLD, CONVENTION)


@dataclass(frozen=True)
class Known:
    """A rule that a measurement followed, who said that it applies, and how sure that is."""

    rule: str
    """What was done, such as "real positions but the last of each sequence"."""
    by: str
    """Who says so, such as "attention_mask of LlamaModel" or "loss_reduction='sum'"."""
    how: str
    """:data:`PROVEN`, :data:`TOLD` or :data:`CONVENTION`."""
    left_out: float = 0.0
    """Of rows: the share of Σ‖g xᵀ‖² that lies in rows that were left out; 0 where nothing does."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-able values."""
        return {"rule": self.rule, "by": self.by, "how": self.how, "left_out": self.left_out}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Known:
        """Return what :meth:`to_dict` gave."""
        return cls(fields["rule"], fields["by"], fields["how"], fields.get("left_out", 0.0))

    def __str__(self) -> str:
        """Return a line for a report."""
        return f"{self.rule} ({self.how}: {self.by})"


def weakest(*hows: str) -> str:
    """Return the least sure of some of :data:`PROVEN`, :data:`TOLD` and :data:`CONVENTION`."""
    return max(hows, key=_ORDER.index)
