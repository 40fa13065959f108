"""Which eigenpairs of a layer are kept: a staircase, or an explicit mask.

Both eigenvalue lists descend, so {(i, j): λᵢ μⱼ ≥ τ} is a Young diagram: row i keeps its first
width[i] columns, and widths never increase. d_out integers say it all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvfast import ops
from curvfast.errors import InputError, LayerNotFound
from curvfast.ops.reference import Found, Values


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
        return torch.arange(self.columns) < self.widths[:, None]

    def complement(self) -> Mask:
        """Return what is removed."""
        return Mask(~self.dense(), 1 - self.mass)


@dataclass(frozen=True, eq=False)
class Mask:
    """Kept pairs of one layer that form no staircase."""

    kept: Tensor
    """[d_out, d_in] bool."""
    mass: float = float("nan")
    """Share of the curvature mass kept, where it is known."""

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.kept.shape[0], self.kept.shape[1]

    @property
    def pairs(self) -> int:
        """Number of pairs kept."""
        return int(self.kept.sum())

    @property
    def fraction(self) -> float:
        """Kept share of all pairs."""
        return self.pairs / self.kept.numel()

    def dense(self) -> Tensor:
        """Return the mask, [d_out, d_in] bool."""
        return self.kept

    def complement(self) -> Mask:
        """Return what is removed."""
        return Mask(~self.kept, 1 - self.mass)


@dataclass(frozen=True, eq=False)
class Selection(Mapping[str, Staircase | Mask]):
    """What is kept of many layers, by layer name."""

    layers: Mapping[str, Staircase | Mask]

    def __getitem__(self, name: str) -> Staircase | Mask:
        """Return what is kept of one layer.

        Raises:
            LayerNotFound: If the selection says nothing about it.
        """
        if name not in self.layers:
            raise LayerNotFound(f"the selection has no layer {name!r}; it has {list(self.layers)}")
        return self.layers[name]

    def __contains__(self, name: object) -> bool:
        """Say whether the selection has a layer."""
        return name in self.layers

    def __iter__(self) -> Iterator[str]:
        """Iterate over layer names."""
        return iter(self.layers)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self.layers)


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
    if not 0 <= pairs <= len(g) * len(a):
        raise InputError(f"pairs={pairs}: this layer has {len(g)} x {len(a)} = {len(g) * len(a)}")
    return found_staircase(ops.staircase_by_pairs(g, a, int(pairs)), len(a))


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
    if not 0 <= fraction <= 1:
        raise InputError(f"fraction={fraction}: pass the share of eigenpairs to keep, in [0, 1]")
    pairs = int(fraction * (len(values_g) * len(values_a)) + 0.5)
    return staircase_by_pairs(values_g, values_a, pairs)


def random_mask(rows: int, columns: int, pairs: int, seed: int) -> Mask:
    """Keep exactly ``pairs`` of rows × columns pairs, uniformly at random.

    Args:
        rows: d_out.
        columns: d_in.
        pairs: From 0 to rows · columns.
        seed: Seed of a generator of its own.

    Returns:
        The mask.

    Raises:
        InputError: If ``pairs`` is out of range.
    """
    if not 0 <= pairs <= rows * columns:
        raise InputError(f"pairs={pairs}: there are {rows} x {columns} = {rows * columns}")
    generator = torch.Generator().manual_seed(seed)
    kept = torch.zeros(rows * columns, dtype=torch.bool)
    kept[torch.randperm(rows * columns, generator=generator)[:pairs]] = True
    return Mask(kept.view(rows, columns))


def used_ranks(kept: Staircase | Mask) -> tuple[int, int]:
    """Return how many leading rows and columns of the eigenbasis hold all that is kept."""
    if isinstance(kept, Staircase):
        return int((kept.widths > 0).sum()), int(kept.widths[0])
    rows, columns = (kept.kept.any(dim).nonzero() for dim in (1, 0))
    return int(rows[-1]) + 1 if len(rows) else 0, int(columns[-1]) + 1 if len(columns) else 0


def check_mass(mass: float) -> None:
    """Raise unless ``mass`` is a share."""
    if not 0 < mass <= 1:
        raise InputError(
            f"mass={mass}: pass the share of curvature mass to keep, in (0, 1]; 0.6 to 0.95 is "
            "usual"
        )


def massive(name: str | None, pair: tuple[Any, Any]) -> tuple[Values, Values]:
    """Return both spectra of a layer, checked, their products not all zero."""
    where = "" if name is None else f" of layer {name!r}"
    g, a = spectrum(f"values_g{where}", pair[0]), spectrum(f"values_a{where}", pair[1])
    if g[0] == 0 or a[0] == 0:
        raise InputError(
            f"every eigenvalue{where} is zero, so there is no curvature mass: was data collected?"
        )
    return g, a


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
