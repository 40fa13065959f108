"""Selection: the kept eigenpairs of many layers, a staircase or a mask of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any, ClassVar, Literal

from torch import Tensor

from curvfast import storage
from curvfast.kfac.layer_mapping import ByLayer
from curvfast.kfac.selection.mask import Mask as Mask
from curvfast.kfac.selection.staircase import Staircase

Frame = Literal["curvature", "singular", "standard"]
_KIND = "curvfast-selection"
_REST = "complement of "


@dataclass(frozen=True, eq=False, repr=False)
class Selection(ByLayer[Staircase | Mask]):
    """What is kept of many layers, by layer name, and what its rows and columns refer to."""

    _noun: ClassVar[str] = "selection"
    layers: Mapping[str, Staircase | Mask]
    importance: str = "custom"
    """What pairs were ranked by; see :func:`curvfast.select`."""
    frame: Frame = "curvature"
    """What pairs are of: ``"curvature"``, eigenvectors of G and A; ``"singular"``, left and right
    singular vectors of the weight; ``"standard"``, rows and columns of the weight itself."""
    totals: Mapping[str, float] = field(default_factory=dict)
    """ΣλΣμ of each layer's eigenbasis, by which it is known again; empty if nothing is known."""

    @property
    def pairs(self) -> dict[str, int]:
        """Number of pairs kept of each layer: ``pairs=`` of another selection as large."""
        return {name: kept.pairs for name, kept in self.items()}

    @property
    def fractions(self) -> dict[str, float]:
        """Kept share of each layer's pairs: ``fraction=`` of another selection as large."""
        return {name: kept.fraction for name, kept in self.items()}

    def complement(self) -> Selection:
        """Return what this selection removes.

        ``select(..., mass=0.1).complement()`` drops the top tenth of the mass and keeps the rest:
        what generalises should go, and what is memorized stay.
        """
        other = self.importance.removeprefix(_REST)
        return replace(
            self,
            layers={name: kept.complement() for name, kept in self.items()},
            importance=other if other != self.importance else _REST + other,
        )

    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Write widths (int32) or packed masks, and what they refer to; called on one rank.

        Raises:
            StorageError: If a file cannot be written; nothing saved before is lost.
        """
        tensors = {n: k.widths if isinstance(k, Staircase) else k.kept for n, k in self.items()}
        layers = {name: _record(kept) for name, kept in self.items()}
        meta = {
            "layers": layers, "importance": self.importance, "frame": self.frame,
            "totals": dict(self.totals),
        }  # fmt: skip
        storage.write_folder(directory, kind=_KIND, meta=meta, tensors=tensors)

    @classmethod
    def from_pretrained(cls, directory: str | PathLike[str]) -> Selection:
        """Read what :meth:`save_pretrained` wrote.

        Raises:
            StorageError: If the folder is missing, foreign, damaged, or of a newer format.
        """
        meta, tensors = storage.read_folder(directory, kind=_KIND)
        layers = {name: _kept(tensors[name], **record) for name, record in meta["layers"].items()}
        return cls(layers, meta["importance"], meta["frame"], meta["totals"])


def _record(kept: Staircase | Mask) -> dict[str, Any]:
    """Return a layer's entry in config.json, without NaN or infinity, which JSON lacks."""
    record: dict[str, Any] = {"columns": kept.columns}
    record["mass"] = kept.mass if math.isfinite(kept.mass) else None
    if isinstance(kept, Staircase):
        record["threshold"] = kept.threshold if math.isfinite(kept.threshold) else None
    return record


def _kept(tensor: Tensor, columns: int, mass: float | None, **more: Any) -> Staircase | Mask:
    share = math.nan if mass is None else mass
    if "threshold" not in more:
        return Mask(tensor, columns, share)
    threshold = more["threshold"]
    return Staircase(tensor, columns, math.inf if threshold is None else threshold, share)
