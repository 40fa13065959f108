"""Which eigenpairs of a layer are kept: a staircase, or an explicit mask.

Both eigenvalue lists descend, so {(i, j): λᵢ μⱼ ≥ τ} is a Young diagram: row i keeps its first
width[i] columns, and widths never increase. d_out integers say it all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from curvfast import ops, storage
from curvfast.core.by_layer import ByLayer
from curvfast.core.mask import Mask as Mask
from curvfast.core.rule import check_mass, share_of, within
from curvfast.errors import InputError
from curvfast.ops.selection import Found, Values

Frame = Literal["curvature", "singular", "standard"]
_KIND = "curvfast-selection"
_REST = "complement of "


@dataclass(frozen=True, eq=False)
class Staircase:
    """The kept pairs of one layer, as the number of columns each row keeps."""

    widths: Tensor
    """[d_out] int32, never increasing: row i keeps columns 0 … widths[i] - 1."""
    columns: int
    """d_in."""
    threshold: float
    """Smallest product kept."""
    mass: float
    """Share of the curvature mass kept."""

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return len(self.widths), self.columns

    @property
    def pairs(self) -> int:
        """Number of pairs kept."""
        return int(self.widths.sum(dtype=torch.int64))

    @property
    def fraction(self) -> float:
        """Kept share of all pairs."""
        return self.pairs / (len(self.widths) * self.columns)

    def dense(self) -> Tensor:
        """Return the staircase as a mask, [d_out, d_in] bool: for tests and pictures."""
        return torch.arange(self.columns, device=self.widths.device) < self.widths[:, None]

    def complement(self) -> Mask:
        """Return what is removed."""
        return Mask.pack(~self.dense(), 1 - self.mass)


@dataclass(frozen=True, eq=False)
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


def staircase_by_mass(values_g: Any, values_a: Any, mass: float) -> Staircase:
    """Keep the largest products λᵢμⱼ until their sum reaches ``mass`` of the total.

    The pair that reaches it is kept, and so is every pair that ties with it; exact and
    deterministic in float64. ``mass=1`` keeps every pair with any mass.

    Args:
        values_g: λ, [d_out], descending and non-negative; any float dtype.
        values_a: μ, [d_in], likewise.
        mass: ρ in (0, 1].

    Returns:
        The staircase.

    Raises:
        InputError: If ``mass`` is outside (0, 1], or a list is not a spectrum.
    """
    check_mass(mass)
    g, a = massive(None, (values_g, values_a))
    return found_staircase(ops.staircase_by_mass(g, a, float(mass)), len(a))


def staircase_by_pairs(values_g: Any, values_a: Any, pairs: int) -> Staircase:
    """Keep exactly ``pairs`` products λᵢμⱼ, the largest; ties at the end go in row order.

    Args:
        values_g: λ, [d_out], descending and non-negative; any float dtype.
        values_a: μ, [d_in], likewise.
        pairs: From 0 to d_out · d_in.

    Returns:
        The staircase.

    Raises:
        InputError: If ``pairs`` is out of range, or a list is not a spectrum.
    """
    g, a = spectrum("values_g", values_g), spectrum("values_a", values_a)
    return found_staircase(ops.staircase_by_pairs(g, a, within(pairs, len(g), len(a))), len(a))


def staircase_by_fraction(values_g: Any, values_a: Any, fraction: float) -> Staircase:
    """Keep the share ``fraction`` of all pairs, rounded to the nearest number of pairs.

    Args:
        values_g: λ, [d_out], descending and non-negative; any float dtype.
        values_a: μ, [d_in], likewise.
        fraction: In [0, 1].

    Returns:
        The staircase.

    Raises:
        InputError: If ``fraction`` is outside [0, 1], or a list is not a spectrum.
    """
    pairs = share_of(fraction, len(values_g) * len(values_a))
    return staircase_by_pairs(values_g, values_a, pairs)


def used_ranks(kept: Staircase | Mask) -> tuple[int, int]:
    """Return how many leading rows and columns of the eigenbasis hold all that is kept."""
    if isinstance(kept, Staircase):
        return int((kept.widths > 0).sum()), int(kept.widths[0])
    return kept.ranks()


def massive(name: str | None, pair: tuple[Any, Any]) -> tuple[Values, Values]:
    """Return both spectra of a layer, checked, their products not all zero."""
    where = "" if name is None else f" of layer {name!r}"
    g, a = spectrum(f"values_g{where}", pair[0]), spectrum(f"values_a{where}", pair[1])
    if g[0] == 0 or a[0] == 0:
        raise InputError(
            f"every eigenvalue{where} is zero, so there is no curvature mass: was data collected?"
        )
    return g, a


def _record(kept: Staircase | Mask) -> dict[str, Any]:
    """Return what JSON can say of a layer; it has neither NaN nor infinity."""
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


def found_staircase(found: Found, columns: int) -> Staircase:
    """Return what a search found, as a staircase."""
    return Staircase(torch.from_numpy(found.widths), columns, found.threshold, found.kept)


def spectrum(name: str, values: Any) -> Values:
    """Return a list of eigenvalues as float64, checked."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    array = np.ascontiguousarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise InputError(f"{name} must be a list of eigenvalues [d], got shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds NaN or infinity; decompose finite factors")
    if array[-1] < 0 or (np.diff(array) > 0).any():
        raise InputError(
            f"{name} must be non-negative and in descending order, as Factors.eigh() returns them"
        )
    return array
