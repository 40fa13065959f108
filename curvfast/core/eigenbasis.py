"""The Kronecker-factored eigenbasis: eigenvectors of A and G, by descending eigenvalue."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from torch import Tensor

from curvfast import storage
from curvfast.core.factors import Factors
from curvfast.core.marginals import reordered
from curvfast.core.search import staircases_by_common_mass, staircases_by_mass
from curvfast.core.selection import (
    Mask,
    Selection,
    Staircase,
    staircase_by_fraction,
    staircase_by_pairs,
    used_ranks,
)
from curvfast.errors import InputError, LayerNotFound

KIND = "curvfast-eigenbasis"


@dataclass(frozen=True, eq=False)
class LayerBasis:
    """Eigenpairs of one layer's Kronecker factors, descending; eigenvectors are columns."""

    values_a: Tensor
    """Eigenvalues μ of A, [d_in] float64, non-negative."""
    vectors_a: Tensor
    """U_A, [d_in, d_in] float32; or the leading eigenvectors only, [d_in, k]."""
    values_g: Tensor
    """Eigenvalues λ of G, [d_out] float64, non-negative."""
    vectors_g: Tensor
    """U_G, [d_out, d_out] float32; or the leading eigenvectors only, [d_out, k]."""

    @property
    def ranks(self) -> tuple[int, int]:
        """(eigenvectors of G, eigenvectors of A) that are known."""
        return self.vectors_g.shape[1], self.vectors_a.shape[1]

    @property
    def complete(self) -> bool:
        """Whether every eigenvector is known."""
        return self.ranks == (len(self.values_g), len(self.values_a))

    @property
    def key_a(self) -> Hashable:
        """What the layers that share U_A have in common."""
        return id(self.vectors_a)

    def require(self, name: str, kept: Staircase | Mask) -> None:
        """Raise unless every eigenvector that ``kept`` needs is known, and none was overlooked.

        Raises:
            InputError: If the basis holds too few leading eigenpairs.
        """
        if self.complete:
            return
        used = used_ranks(kept)
        known, shape = self.ranks, kept.shape
        # The pair of the last value found stays out: what lies below it was never looked at.
        if any(u >= k and k < d for u, k, d in zip(used, known, shape, strict=True)):
            raise InputError(
                f"layer {name!r} needs {used[0]} eigenvectors of G and {used[1]} of A for this, "
                f"and the basis holds the leading {known[0]} of {shape[0]} and {known[1]} of "
                f"{shape[1]}: decompose with a larger mass=, or without for all of them"
            )


class StoredBasis(LayerBasis):
    """A layer's eigenpairs on disk: read when used, and not kept."""

    def __init__(self, tensors: storage.StoredTensors, a: str, g: str) -> None:
        """Note where they are.

        Args:
            tensors: The folder's.
            a: Name of the basis of A.
            g: Name of the basis of G.
        """
        object.__setattr__(self, "_tensors", tensors)
        object.__setattr__(self, "_names", (a, g))

    _tensors: storage.StoredTensors
    _names: tuple[str, str]

    @property
    def ranks(self) -> tuple[int, int]:
        """As of :class:`LayerBasis`; no vector is read."""
        a, g = self._names
        return self._tensors.shape(f"{g}.vectors")[1], self._tensors.shape(f"{a}.vectors")[1]

    @property
    def key_a(self) -> Hashable:
        """As of :class:`LayerBasis`; what is read anew each time is told by its name."""
        return id(self._tensors), self._names[0]

    @property
    def values_a(self) -> Tensor:  # type: ignore[override]
        """As of :class:`LayerBasis`."""
        return self._tensors[f"{self._names[0]}.values"]

    @property
    def vectors_a(self) -> Tensor:  # type: ignore[override]
        """As of :class:`LayerBasis`."""
        return self._tensors[f"{self._names[0]}.vectors"]

    @property
    def values_g(self) -> Tensor:  # type: ignore[override]
        """As of :class:`LayerBasis`."""
        return self._tensors[f"{self._names[1]}.values"]

    @property
    def vectors_g(self) -> Tensor:  # type: ignore[override]
        """As of :class:`LayerBasis`."""
        return self._tensors[f"{self._names[1]}.vectors"]


@dataclass(frozen=True, eq=False)
class Eigenbasis(Mapping[str, LayerBasis]):
    """Eigenbases of many layers, by layer name."""

    layers: Mapping[str, LayerBasis]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What the factors were measured on, as of :class:`curvfast.Factors`."""

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
        globally: bool = False,
    ) -> Selection:
        """Select eigenpair products λᵢμⱼ of every layer, the largest first; pass exactly one rule.

        Args:
            mass: Share ρ in (0, 1] of each layer's curvature mass Σλᵢμⱼ to reach. Every pair that
                ties with the one that reaches it is kept as well.
            pairs: Exactly so many pairs a layer; ties are broken in row order.
            fraction: Exactly this share of each layer's d_out · d_in pairs, rounded.
            globally: With ``mass``: one threshold for all layers, and ρ of their mass together; a
                layer of little curvature then keeps little.

        Returns:
            A staircase for each layer.

        Raises:
            InputError: If not exactly one rule is given, it is out of range, or asks for more than
                the leading eigenpairs a basis holds.
        """
        if sum(rule is not None for rule in (mass, pairs, fraction)) != 1:
            raise InputError("pass exactly one of mass=, pairs= and fraction=")
        if globally and mass is None:
            raise InputError("globally=True needs mass=: pairs and fractions are of one layer")
        if mass is not None:
            spectra = self._spectra()
            return self._required(
                staircases_by_common_mass(spectra, mass)
                if globally
                else staircases_by_mass(spectra, [mass])[0]
            )
        kept = {}
        for name, (values_g, values_a) in self._spectra().items():
            if pairs is not None:
                kept[name] = staircase_by_pairs(values_g, values_a, pairs)
            elif fraction is not None:
                kept[name] = staircase_by_fraction(values_g, values_a, fraction)
        return self._required(Selection(kept))

    def keep_each(self, masses: Sequence[float]) -> list[Selection]:
        """Select at several masses in one search, as :meth:`keep` does at one.

        Args:
            masses: ρ, each in (0, 1].

        Returns:
            A selection for each mass.

        Raises:
            InputError: If a mass is out of range.
        """
        return [self._required(each) for each in staircases_by_mass(self._spectra(), masses)]

    def with_marginals(self, factors: Factors) -> Eigenbasis:
        """Return the basis with marginals of the EK-FAC correction in the place of eigenvalues.

        Λ_ij ≈ rᵢ cⱼ / ΣΛ, from the correction's row sums r and column sums c (George et al., arXiv
        1806.03884; per position), known from the pass that measured ``factors`` alone. Values and
        vectors are in descending order of these, so all that takes a basis takes this one: the
        products of its values are the estimate. Where g and a are independent they are λ and μ.

        Layers that shared the eigenvectors of A no longer do: their orders differ.

        Args:
            factors: What this basis was decomposed from, collected with ``marginals=True``.

        Returns:
            A basis of the same layers, in memory.

        Raises:
            InputError: If the weighted moments were not collected, or the basis holds leading
                eigenvectors only.
            LayerNotFound: If the factors lack a layer.
            BasisMismatch: If they are of other widths.
        """
        return Eigenbasis(
            {
                name: LayerBasis(*reordered(name, basis, factors[name]))
                for name, basis in self.items()
            }
        )

    def _required(self, selection: Selection) -> Selection:
        for name, kept in selection.items():
            self[name].require(name, kept)
        return selection

    def _spectra(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: (basis.values_g, basis.values_a) for name, basis in self.items()}

    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Write eigenvalues and eigenvectors to ``directory``, shared ones once; on one rank."""
        with storage.FolderWriter(directory, KIND) as writer:
            keys: dict[Hashable, str] = {}
            layers = {}
            for name, basis in self.items():
                shared = basis.key_a
                if shared not in keys:
                    keys[shared] = f"a.{name}"
                    writer.add(stored_part(f"a.{name}", basis.values_a, basis.vectors_a))
                writer.add(stored_part(f"g.{name}", basis.values_g, basis.vectors_g))
                layers[name] = {"a": keys[shared], "g": f"g.{name}"}
            writer.finish({"layers": layers, "provenance": dict(self.provenance)})

    @classmethod
    def from_pretrained(cls, directory: str | PathLike[str], *, lazy: bool = False) -> Eigenbasis:
        """Read what :meth:`save_pretrained`, or :meth:`Factors.eigh` with a directory, wrote.

        Args:
            directory: The folder.
            lazy: Whether a layer is read from disk each time it is used, and none is kept: for
                bases larger than memory.

        Returns:
            The eigenbasis.

        Raises:
            StorageError: If the folder is missing, foreign, damaged, or of a newer format.
        """
        meta, stored = storage.open_folder(directory, kind=KIND)
        provenance = meta.get("provenance", {})
        layers: dict[str, LayerBasis] = {}
        if lazy:
            layers |= {n: StoredBasis(stored, e["a"], e["g"]) for n, e in meta["layers"].items()}
            return cls(layers, provenance)
        tensors = dict(stored.items())
        for name, entry in meta["layers"].items():
            a, g = entry["a"], entry["g"]
            layers[name] = LayerBasis(
                tensors[f"{a}.values"], tensors[f"{a}.vectors"],
                tensors[f"{g}.values"], tensors[f"{g}.vectors"],
            )  # fmt: skip
        return cls(layers, provenance)


def stored_part(key: str, values: Tensor, vectors: Tensor) -> dict[str, Tensor]:
    """Return the tensors of one basis as they are named on disk."""
    return {f"{key}.values": values, f"{key}.vectors": vectors}
