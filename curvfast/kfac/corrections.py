"""EK-FAC corrections: the exact diagonal of the Fisher in the Kronecker-factored eigenbasis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, ClassVar

from torch import Tensor

from curvfast import storage
from curvfast.errors import InputError, ShapeError
from curvfast.kfac.layer_mapping import Summed

_KIND = "curvfast-corrections"
POSITION, SEQUENCE = "position", "sequence"
READINGS = (POSITION, SEQUENCE)


@dataclass(frozen=True, eq=False)
class LayerCorrection:
    """The EK-FAC correction of one layer, as a sum and a count."""

    sum: Tensor
    """Sum of squared gradients in the eigenbasis, [d_out, d_in] float32."""
    count: int
    """Number of samples in it: positions, or sequences."""

    @property
    def mean(self) -> Tensor:
        """Λ, [d_out, d_in] float32."""
        return self.sum / max(1, self.count)


@dataclass(frozen=True, eq=False, repr=False)
class Corrections(Summed[Tensor]):
    """EK-FAC corrections Λ by layer name: [d_out, d_in] float32, in the order of the eigenbasis.

    Λ_ij is the mean, over samples, of the squared gradient of the *summed* loss along eigenpair
    (i, j), where K-FAC has λᵢ μⱼ (George et al., arXiv 1806.03884). With ``per="position"`` a
    sample is a counted row, E[(uᵢᵀg)² (vⱼᵀa)²], which is λᵢ μⱼ where g and a are independent. With
    ``per="sequence"`` it is a sequence of which some row counts, E[(Σ_t uᵢᵀg_t vⱼᵀa_t)²], which is
    λᵢ μⱼ times the rows of a sequence where its positions are independent too and g has mean zero.

    For a basis with leading eigenvectors only, Λ is the leading block that belongs to them. It is
    valid only for the basis it was measured in, in its order. ``first + second`` merges two runs.
    """

    _noun: ClassVar[str] = "correction"
    layers: Mapping[str, LayerCorrection]
    per: str
    """``"position"`` or ``"sequence"``: what a sample is."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Provenance; see :class:`Factors`."""

    def _of(self, layer: LayerCorrection) -> Tensor:
        return layer.mean

    def __add__(self, other: Corrections) -> Corrections:
        """Merge: sums and counts add. Both must be measured in one eigenbasis.

        Raises:
            InputError: If the two do not hold the same layers, are of different samples, or were
                measured by different rules (:attr:`known`).
            ShapeError: If a layer's widths differ.
        """
        if not isinstance(other, Corrections):
            return NotImplemented
        if self.per != other.per:
            raise InputError(
                f"one correction is per {self.per}, the other per {other.per}: measure both alike"
            )
        layers, provenance = self._added(other, _add)
        return Corrections(layers, self.per, provenance)

    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Write sums, counts and provenance to ``directory``, atomically; called on one rank."""
        layers = {n: {"sum": n, "count": layer.count} for n, layer in self.layers.items()}
        storage.write_folder(
            directory, kind=_KIND,
            meta={"per": self.per, "layers": layers, "provenance": dict(self.provenance)},
            tensors={name: layer.sum for name, layer in self.layers.items()},
        )  # fmt: skip

    @classmethod
    def from_pretrained(cls, directory: str | PathLike[str]) -> Corrections:
        """Read what :meth:`save_pretrained` wrote.

        Raises:
            StorageError: If the folder is missing, foreign, damaged, or of a newer format.
        """
        meta, tensors = storage.read_folder(directory, kind=_KIND)
        layers = {
            name: LayerCorrection(tensors[entry["sum"]], entry["count"])
            for name, entry in meta["layers"].items()
        }
        return cls(layers, meta["per"], meta["provenance"])


def _add(name: str, one: LayerCorrection, two: LayerCorrection) -> LayerCorrection:
    if one.sum.shape != two.sum.shape:
        raise ShapeError(
            f"layer {name!r} is {list(one.sum.shape)} in one and {list(two.sum.shape)} in the "
            "other: measured in different bases"
        )
    return LayerCorrection(one.sum + two.sum, one.count + two.count)
