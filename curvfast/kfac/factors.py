"""Kronecker factors: second moments of a layer's inputs and of its output gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from curvfast import distributed, storage
from curvfast.errors import InputError, ShapeError
from curvfast.kfac.layer_factors import LayerFactors
from curvfast.kfac.layer_mapping import Summed

if TYPE_CHECKING:
    from curvfast.kfac.eigenbasis import Eigenbasis


_KIND = "curvfast-factors"
_WEIGHTED = ("a_weighted", "g_weighted")


@dataclass(frozen=True, eq=False, repr=False)
class Factors(Summed[LayerFactors]):
    """Kronecker factors of many layers, by layer name.

    ``factors["layer"].A`` reads one; ``first + second`` merges the sums of two runs, ranks or
    corpora; :meth:`eigh` computes the eigenbasis.
    """

    _noun: ClassVar[str] = "factors"
    layers: Mapping[str, LayerFactors]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Provenance: model, layers, label mode, rows, seed, coverage, library versions; and how rows
    and unit are known, which :attr:`known` reads."""

    def __add__(self, other: Factors) -> Factors:
        """Merge: sums and counts add; an A shared in both stays shared.

        Raises:
            InputError: If the two do not hold the same layers, or weighted moments in one alone; or
                if a layer's rows were counted by different rules, or a convention meets what is
                proven or told (:attr:`known`).
            ShapeError: If a layer's widths differ.
        """
        if not isinstance(other, Factors):
            return NotImplemented
        _require_same_moments(self, other)
        sums: dict[tuple[int, int], Tensor] = {}
        return Factors(*self._added(other, partial(_add, sums)))

    @property
    def rows(self) -> int:
        """Smallest number of rows over all layers."""
        return min((layer.rows_g for layer in self.values()), default=0)

    def eigh(
        self,
        *,
        dtype: torch.dtype = torch.float64,
        progress: bool = False,
        workers: int = 1,
        directory: str | PathLike[str] | None = None,
        mass: float | None = None,
        start: Eigenbasis | None = None,
        group: Any = None,
        device: str | torch.device | None = None,
    ) -> Eigenbasis:
        """Eigendecompose both factors of every layer; an A that layers share is decomposed once.

        A factor of d features needs some 5 d² numbers of ``dtype`` while it is decomposed. A solver
        that fails, or whose result fails verification, is followed by the next, with a warning:
        on the factor's device, then on the CPU in float64.

        Args:
            dtype: Precision of the decomposition. float32 is faster and resolves eigenvalues down
                to about 2e-5 of the largest, float64 to about 4e-8 of float32 sums.
            progress: Whether a bar counts the factors.
            workers: How many factors are decomposed at a time, the largest first.
            directory: Where to write each basis once it is computed; the result then reads a layer
                from there at each use, so that the bases are never in memory together.
            mass: The largest ρ of later edits. A factor of which these need few leading eigenpairs,
                such as one with massive activations, is then decomposed only that far, which is
                faster; the pairs are certified to be the leading ones. What is kept at any
                mass up to this one is the same; a selection that needs more raises.
            start: With ``mass``: an earlier basis of the same layers, whose leading eigenvectors
                initialise the search.
            group: Process group whose ranks, all of them calling this with the same factors, divide
                the decompositions by d³ and share the results; ``"auto"`` is the default group.
                With ``directory`` rank 0 writes. None decomposes here.
            device: Where to decompose, such as ``"cuda"`` for factors whose sums were kept on the
                host; the results return to the factors' device. None: on the factors' device.

        Returns:
            Eigenvalues (float64) and eigenvectors (float32) in descending order.

        Raises:
            NonFiniteError: If a factor holds NaN or infinity.
            DecompositionError: If no solver could decompose a factor.
            InputError: If an argument is out of range, or ``start`` comes without ``mass``.
            StorageError: If ``directory`` cannot be written.
        """
        from curvfast.kfac.eigh import decompose

        return decompose(
            self, dtype=dtype, progress=progress, workers=workers, directory=directory, mass=mass,
            start=start, group=distributed.group_of(group),
            device=None if device is None else torch.device(device),
        )  # fmt: skip

    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Write sums and provenance to ``directory``, atomically; called on one rank."""
        tensors: dict[str, Tensor] = {}
        keys: dict[int, str] = {}
        layers = {}
        for name, layer in self.items():
            key_a = keys.setdefault(id(layer.a_sum), f"a.{name}")
            tensors[key_a], tensors[f"g.{name}"] = layer.a_sum, layer.g_sum
            layers[name] = {
                "a": key_a, "g": f"g.{name}", "rows_a": layer.rows_a, "rows_g": layer.rows_g
            }  # fmt: skip
            for side in _WEIGHTED:
                moment = getattr(layer, side)
                if moment is not None:
                    layers[name][side] = f"{side}.{name}"
                    tensors[f"{side}.{name}"] = moment
        meta = {"layers": layers, "provenance": dict(self.provenance)}
        storage.write_folder(directory, kind=_KIND, meta=meta, tensors=tensors)

    @classmethod
    def from_pretrained(cls, directory: str | PathLike[str]) -> Factors:
        """Read what :meth:`save_pretrained` wrote.

        Raises:
            StorageError: If the folder is missing, foreign, damaged, or of a newer format.
        """
        meta, tensors = storage.read_folder(directory, kind=_KIND)
        layers = {
            name: LayerFactors(
                tensors[e["a"]], tensors[e["g"]], e["rows_a"], e["rows_g"],
                # Folders written before marginals= existed name none.
                *(tensors[e[side]] if side in e else None for side in _WEIGHTED),
            )
            for name, e in meta["layers"].items()
        }  # fmt: skip
        return cls(layers, meta["provenance"])


def _require_same_moments(one: Factors, two: Factors) -> None:
    weighted = {layer.g_weighted is not None for layer in (*one.values(), *two.values())}
    if len(weighted) > 1:
        raise InputError(
            "one of these factors has the weighted moments of marginals=True and the other has "
            "not, so their sum would be of different rows: collect both with it, or both without"
        )


def _add(
    sums: dict[tuple[int, int], Tensor], name: str, one: LayerFactors, two: LayerFactors
) -> LayerFactors:
    if one.a_sum.shape != two.a_sum.shape or one.g_sum.shape != two.g_sum.shape:
        raise ShapeError(
            f"layer {name!r} is {list(one.g_sum.shape[:1] + one.a_sum.shape[:1])} in one and "
            f"{list(two.g_sum.shape[:1] + two.a_sum.shape[:1])} in the other: different models"
        )
    pair = (id(one.a_sum), id(two.a_sum))
    if pair not in sums:
        sums[pair] = one.a_sum + two.a_sum
    weighted = (
        None if mine is None or other is None else mine + other
        for mine, other in ((getattr(one, side), getattr(two, side)) for side in _WEIGHTED)
    )  # fmt: skip
    return LayerFactors(
        sums[pair], one.g_sum + two.g_sum, one.rows_a + two.rows_a, one.rows_g + two.rows_g,
        *weighted,
    )  # fmt: skip
