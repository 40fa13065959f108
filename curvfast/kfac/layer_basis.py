"""The eigenpairs of one layer's Kronecker factors, in memory or on disk."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from curvfast import storage
from curvfast.errors import InputError
from curvfast.kfac.selection.mask import Mask
from curvfast.kfac.selection.staircase import Staircase, used_ranks

# Number of eigenvectors converted to float64 at a time.
_BAND = 1024


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
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return len(self.values_g), len(self.values_a)

    @property
    def ranks(self) -> tuple[int, int]:
        """(eigenvectors of G, eigenvectors of A) that are known."""
        return self.vectors_g.shape[1], self.vectors_a.shape[1]

    @property
    def complete(self) -> bool:
        """Whether every eigenvector is known."""
        return self.ranks == self.shape

    @property
    def key_a(self) -> Hashable:
        """A key that is equal for layers that share one A."""
        return id(self.vectors_a)

    def require(self, name: str, kept: Staircase | Mask) -> None:
        """Raise unless every eigenvector that ``kept`` needs is known.

        Raises:
            InputError: If the basis holds too few leading eigenpairs.
        """
        if self.complete:
            return
        used = used_ranks(kept)
        known, shape = self.ranks, kept.shape
        # Pairs at the last value found do not qualify: smaller eigenvalues were never computed.
        if any(u >= k and k < d for u, k, d in zip(used, known, shape, strict=True)):
            raise InputError(
                f"layer {name!r} needs {used[0]} eigenvectors of G and {used[1]} of A for this, "
                f"and the basis holds the leading {known[0]} of {shape[0]} and {known[1]} of "
                f"{shape[1]}: decompose with a larger mass=, or without for all of them"
            )


class StoredBasis(LayerBasis):
    """A layer's eigenpairs on disk, read at each use and not cached."""

    def __init__(self, tensors: storage.StoredTensors, a: str, g: str) -> None:
        """Store the keys of the tensors.

        Args:
            tensors: The tensors of the folder.
            a: Name of the basis of A.
            g: Name of the basis of G.
        """
        object.__setattr__(self, "_tensors", tensors)
        object.__setattr__(self, "_names", (a, g))

    _tensors: storage.StoredTensors
    _names: tuple[str, str]

    @property
    def ranks(self) -> tuple[int, int]:
        """(eigenvectors of G, eigenvectors of A) that are known, from shapes alone."""
        a, g = self._names
        return self._tensors.shape(f"{g}.vectors")[1], self._tensors.shape(f"{a}.vectors")[1]

    @property
    def key_a(self) -> Hashable:
        """The name of A's tensors: equal for layers that share one A."""
        return id(self._tensors), self._names[0]

    @property
    def values_a(self) -> Tensor:  # type: ignore[override]
        """Eigenvalues μ of A, read from disk."""
        return self._tensors[f"{self._names[0]}.values"]

    @property
    def vectors_a(self) -> Tensor:  # type: ignore[override]
        """U_A, read from disk."""
        return self._tensors[f"{self._names[0]}.vectors"]

    @property
    def values_g(self) -> Tensor:  # type: ignore[override]
        """Eigenvalues λ of G, read from disk."""
        return self._tensors[f"{self._names[1]}.values"]

    @property
    def vectors_g(self) -> Tensor:  # type: ignore[override]
        """U_G, read from disk."""
        return self._tensors[f"{self._names[1]}.vectors"]


def diagonal(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Return uᵀ M u of each column u, float64, on the CPU; computed on the matrix's device."""
    wide = matrix.double()
    bands = (band.to(wide) for band in vectors.split(_BAND, dim=1))
    return torch.cat([(band * (wide @ band)).sum(0) for band in bands]).cpu()
