"""The Kronecker-factored eigenbasis: eigenvectors of A and G, by descending eigenvalue."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor

from curvfast import storage
from curvfast.core.factors import Factors
from curvfast.core.selection import (
    Selection,
    staircase_by_fraction,
    staircase_by_mass,
    staircase_by_pairs,
)
from curvfast.errors import InputError, LayerNotFound, NonFiniteError, NumericalWarning
from curvfast.progress import Bar

_KIND = "curvfast-eigenbasis"
_DTYPES = (torch.float64, torch.float32)


@dataclass(frozen=True, eq=False)
class LayerBasis:
    """Eigenpairs of one layer's Kronecker factors, descending; eigenvectors are columns."""

    values_a: Tensor
    """Eigenvalues μ of A, [d_in] float64, non-negative."""
    vectors_a: Tensor
    """U_A, [d_in, d_in] float32."""
    values_g: Tensor
    """Eigenvalues λ of G, [d_out] float64, non-negative."""
    vectors_g: Tensor
    """U_G, [d_out, d_out] float32."""


@dataclass(frozen=True, eq=False)
class Eigenbasis(Mapping[str, LayerBasis]):
    """Eigenbases of many layers, by layer name."""

    layers: Mapping[str, LayerBasis]

    def __getitem__(self, name: str) -> LayerBasis:
        """Return the basis of one layer.

        Raises:
            LayerNotFound: If there is none.
        """
        if name not in self.layers:
            raise LayerNotFound(
                f"no eigenbasis of layer {name!r}; there are: {', '.join(map(repr, self.layers))}"
            )
        return self.layers[name]

    def __contains__(self, name: object) -> bool:
        """Say whether a layer has a basis."""
        return name in self.layers

    def __iter__(self) -> Iterator[str]:
        """Iterate over layer names."""
        return iter(self.layers)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self.layers)

    def keep(
        self,
        *,
        mass: float | None = None,
        pairs: int | None = None,
        fraction: float | None = None,
    ) -> Selection:
        """Select eigenpair products λᵢμⱼ of every layer, the largest first; pass exactly one rule.

        Args:
            mass: Share ρ in (0, 1] of each layer's curvature mass Σλᵢμⱼ to reach. Every pair that
                ties with the one that reaches it is kept as well.
            pairs: Exactly so many pairs a layer; ties are broken in row order.
            fraction: Exactly this share of each layer's d_out · d_in pairs, rounded.

        Returns:
            A staircase for each layer.

        Raises:
            InputError: If not exactly one rule is given, or it is out of range.
        """
        if sum(rule is not None for rule in (mass, pairs, fraction)) != 1:
            raise InputError("pass exactly one of mass=, pairs= and fraction=")
        kept = {}
        for name, basis in self.items():
            if mass is not None:
                kept[name] = staircase_by_mass(basis.values_g, basis.values_a, mass)
            elif pairs is not None:
                kept[name] = staircase_by_pairs(basis.values_g, basis.values_a, pairs)
            elif fraction is not None:
                kept[name] = staircase_by_fraction(basis.values_g, basis.values_a, fraction)
        return Selection(kept)

    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Write eigenvalues and eigenvectors to ``directory``; shared ones are stored once."""
        tensors: dict[str, Tensor] = {}
        keys: dict[int, str] = {}
        layers = {}
        for name, basis in self.items():
            key = keys.setdefault(id(basis.vectors_a), f"a.{name}")
            tensors |= {f"{key}.values": basis.values_a, f"{key}.vectors": basis.vectors_a}
            tensors |= {f"g.{name}.values": basis.values_g, f"g.{name}.vectors": basis.vectors_g}
            layers[name] = {"a": key, "g": f"g.{name}"}
        storage.write_folder(directory, kind=_KIND, meta={"layers": layers}, tensors=tensors)

    @classmethod
    def from_pretrained(cls, directory: str | PathLike[str]) -> Eigenbasis:
        """Read what :meth:`save_pretrained` wrote.

        Raises:
            StorageError: If the folder is missing, foreign, damaged, or of a newer format.
        """
        meta, tensors = storage.read_folder(directory, kind=_KIND)
        layers = {}
        for name, entry in meta["layers"].items():
            a, g = entry["a"], entry["g"]
            layers[name] = LayerBasis(
                tensors[f"{a}.values"], tensors[f"{a}.vectors"],
                tensors[f"{g}.values"], tensors[f"{g}.vectors"],
            )  # fmt: skip
        return cls(layers)


def decompose(factors: Factors, *, dtype: torch.dtype, progress: bool) -> Eigenbasis:
    """Eigendecompose ``factors``; see :meth:`Factors.eigh`."""
    if dtype not in _DTYPES:
        raise InputError(f"eigh works in float64 (default) or float32, not {dtype}")
    done: dict[int, tuple[Tensor, Tensor]] = {}
    negative: dict[str, float] = {}
    layers = {}
    with Bar("eigendecompositions", 2 * len(factors), "factor", progress) as bar:
        for name, layer in factors.items():
            if id(layer.a_sum) not in done:
                title = f"A of layer {name!r}"
                done[id(layer.a_sum)] = _eigh(title, layer.A, dtype, negative)
            values_a, vectors_a = done[id(layer.a_sum)]
            bar.advance(1)
            values_g, vectors_g = _eigh(f"G of layer {name!r}", layer.G, dtype, negative)
            bar.advance(1)
            layers[name] = LayerBasis(values_a, vectors_a, values_g, vectors_g)
    _warn_negative(negative, factors.rows)
    return Eigenbasis(layers)


def _eigh(
    title: str, factor: Tensor, dtype: torch.dtype, negative: dict[str, float]
) -> tuple[Tensor, Tensor]:
    if not torch.isfinite(factor).all():
        raise NonFiniteError(
            f"{title} holds NaN or infinity: a loss or gradient overflowed while it was collected. "
            "Collect again; under fp16 autocast pass grad_scaler= so that skipped steps are left "
            "out"
        )
    matrix = factor.to(dtype)
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    values, vectors = values.flip(0).double(), vectors.flip(1)
    if values[-1] < 0:
        top = values[0].abs().clamp_min(torch.finfo(torch.float64).tiny)
        negative[title] = float(-values[-1] / top)
    # Signs are free; the largest entry of each vector made positive, one input has one answer.
    largest = vectors.abs().argmax(0, keepdim=True)
    vectors = vectors * vectors.gather(0, largest).sign()
    return values.clamp_min(0), vectors.float().contiguous()


def _warn_negative(negative: dict[str, float], rows: int) -> None:
    if not negative:
        return
    worst = max(negative, key=negative.__getitem__)
    size = negative[worst]
    verdict = (
        "that is the rounding of float32 sums"
        if size < 1e-5
        else f"far beyond rounding: is this a second moment, and are {rows} rows of it enough?"
    )
    warnings.warn(
        f"{len(negative)} factor(s) have negative eigenvalues, set to 0; the most negative is "
        f"-{size:.1e} of the largest, in {worst}: {verdict}",
        NumericalWarning,
        stacklevel=4,
    )
