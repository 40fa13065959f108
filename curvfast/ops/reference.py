"""The definitions, written to be read: every backend is tested against this file.

Second moments are plain torch in any dtype, float64 included. The staircase search is the twin of
the native core: the same summation order, so equal to it bit for bit.

A float is an integer mantissa times a power of two that its 16 high bits decide, so sums are exact
among floats of one high half. Those sums are added from the largest half down, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from curvfast.ops.projection import banded_area, transposed_widths
from curvfast.ops.selection import Bits, Found, Kept, ScoreMatrix, Values, Widths

if TYPE_CHECKING:
    from curvfast.ops.projection import ProjectionRequest
    from curvfast.ops.requests import MomentRequest


def second_moment_(call: MomentRequest) -> None:
    """Add ``scale`` · Σ_t w_t x_t x_tᵀ over the rows that count to each sum, in its dtype."""
    rows = call.index()
    for out, weights in call.sums():
        x = call.x.flatten(0, -2).to(out.tiles.dtype)
        w = None if weights is None else weights.flatten().to(x.dtype)
        if rows is not None:
            x, w = x[rows], None if w is None else w[rows]
        matrix = call.scale * (x.T @ (x if w is None else w[:, None] * x))
        for start, stop, panel in out.panels():
            panel += matrix[:stop, start:stop]


def all_finite(x: Tensor, rows: Tensor | None) -> bool:
    """Return whether no value of the counted rows is NaN or infinite."""
    flat = x.flatten(0, -2)
    return bool(torch.isfinite(flat if rows is None else flat[rows]).all())


def pack(matrix: Tensor, tiles: Tensor) -> None:
    """Write every tile: of ``matrix`` [d, d] those on and above the diagonal, zeros past d."""
    tiles.zero_()
    for rows, columns, tile in _tiles(tiles, len(matrix)):
        tile.copy_(matrix[rows, columns])


def unpack(tiles: Tensor, matrix: Tensor) -> None:
    """Write all of ``matrix`` [d, d]: the tiles, and below the diagonal a copy of what is above."""
    for rows, columns, tile in _tiles(tiles, len(matrix)):
        matrix[rows, columns] = tile
    mirror_(matrix)


def mirror_(matrix: Tensor) -> None:
    """Write the entries below the diagonal of ``matrix`` [d, d]: copies of those above."""
    below = torch.ones_like(matrix, dtype=torch.bool).tril(-1)
    matrix.copy_(torch.where(below, matrix.T, matrix))


def scale_(tiles: Tensor, factor: float) -> None:
    """Multiply every value by ``factor``, rounded to their dtype first."""
    tiles.copy_(tiles * torch.tensor(factor, dtype=tiles.dtype))


def _tiles(tiles: Tensor, d: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield rows and columns of each tile, column after column of tiles, and its part within d."""
    width = tiles.shape[1]
    stack = iter(tiles.view(-1, width, width))
    for left in range(0, d, width):
        for top in range(0, left + 1, width):
            rows, columns = slice(top, min(top + width, d)), slice(left, min(left + width, d))
            yield rows, columns, next(stack)[: rows.stop - top, : columns.stop - left]


def project(call: ProjectionRequest) -> Tensor:
    """Evaluate U (M ∘ (Uᵀ W V)) Vᵀ as written, or W minus it where the plan asks for that."""
    coefficients = call.left.T @ call.weight @ call.right
    columns = torch.arange(coefficients.shape[1], device=coefficients.device)
    kept = columns < call.widths.to(coefficients.device)[:, None]
    projected = call.left @ (kept * coefficients) @ call.right.T
    return call.weight - projected if call.plan.complement else projected


def band_energies(x: Tensor, vectors: Tensor, edges: Sequence[int]) -> Tensor:
    """Return ‖x_t V_b‖² for each row t of x [rows, d] and band b of columns of V, in float64."""
    energies = (x.double() @ vectors.double()).square()
    return torch.stack([energies[:, a:b].sum(1) for a, b in pairwise(edges)], dim=1)


def nll_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """Return softmax(logits) - onehot(label) in float64; zero in rows whose label is negative."""
    gradient = logits.double().softmax(-1)
    gradient.scatter_add_(1, labels.clamp_min(0)[:, None], -torch.ones_like(gradient[:, :1]))
    return gradient * (labels >= 0)[:, None]


def staircase_by_mass(values_g: Values, values_a: Values, mass: float) -> Found:
    """As :func:`curvfast.ops.staircase_by_mass`, by bisection over thresholds."""
    products = _Products(values_g, values_a)
    target = mass * products.mass(products.widths(0.0))
    if mass == 1.0:
        tau = float(np.finfo(np.float64).smallest_subnormal)
    else:
        tau = products.largest(lambda widths: bool(products.mass(widths) >= target))
    widths = products.widths(tau)
    used = np.flatnonzero(widths)
    smallest = (products.g[used] * products.a[widths[used] - 1]).min()
    return products.found(widths, float(smallest))


def staircase_by_pairs(values_g: Values, values_a: Values, pairs: int) -> Found:
    """As :func:`curvfast.ops.staircase_by_pairs`, by bisection over thresholds."""
    products = _Products(values_g, values_a)
    if pairs == 0:
        return products.found(np.zeros(len(values_g), np.int32), float("inf"))
    tau = products.largest(lambda widths: int(widths.sum(dtype=np.int64)) >= pairs)
    widths = products.widths(float(np.nextafter(tau, np.inf)))
    ties = (products.widths(tau) - widths).astype(np.int64)
    before = np.cumsum(ties) - ties
    missing = pairs - int(widths.sum(dtype=np.int64))
    widths = widths + np.clip(missing - before, 0, ties).astype(np.int32)
    return products.found(widths, tau)


def staircases_by_mass(
    layers: Sequence[tuple[Values, Values]], masses: Sequence[float], workers: int = 1
) -> list[list[Found]]:
    """As :func:`curvfast.ops.staircases_by_mass`, one search after the other in one thread."""
    return [[staircase_by_mass(g, a, mass) for mass in masses] for g, a in layers]


def staircases_by_common_mass(
    layers: Sequence[tuple[Values, Values]], mass: float
) -> tuple[list[Widths], float]:
    """As :func:`curvfast.ops.staircases_by_common_mass`, by bisection over thresholds."""
    products = [_Products(g, a) for g, a in layers]
    whole = [p.mass(p.widths(0.0)) for p in products]
    unit = max(p.exponent for p, m in zip(products, whole, strict=True) if m > 0)

    def at(tau: float) -> list[Widths]:
        # A threshold beyond a small layer's range is infinite there: it keeps nothing.
        with np.errstate(over="ignore"):
            own = [float(np.ldexp(tau, unit - p.exponent)) for p in products]
        return [p.widths(t) for p, t in zip(products, own, strict=True)]

    def total(kept: list[Widths]) -> float:
        sums = (np.ldexp(p.mass(w), p.exponent - unit) for p, w in zip(products, kept, strict=True))
        return float(np.cumsum(list(sums))[-1])

    if mass == 1.0:
        least = float(np.finfo(np.float64).smallest_subnormal)
        return [p.widths(least) for p in products], 0.0
    target = mass * total(at(0.0))
    top = max(float(np.ldexp(p.g[0] * p.a[0], p.exponent - unit)) for p in products)
    tau = largest_threshold(top, lambda t: total(at(t)) >= target)
    return at(tau), float(np.ldexp(tau, unit))


def largest_threshold(top: float, enough: Callable[[float], bool]) -> float:
    """Return the largest double up to ``top`` that is ``enough``, a condition that only fails once.

    Non-negative doubles are ordered like their bit patterns, so integers are bisected.
    """
    low, high = 0, int(np.float64(top).view(np.int64)) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if enough(float(np.int64(middle).view(np.float64))):
            low = middle
        else:
            high = middle
    return float(np.int64(low).view(np.float64))


class _Products:
    """The products of two descending lists, never formed: a row is searched by bisection."""

    def __init__(self, values_g: Values, values_a: Values) -> None:
        # Scaling by a power of two keeps ties ties; dividing by the maximum would round them apart.
        exponents = [int(np.frexp(values[0])[1]) for values in (values_g, values_a)]
        self.g, self.a = (
            np.ldexp(values, -exponent)
            for values, exponent in zip((values_g, values_a), exponents, strict=True)
        )
        self.exponent = sum(exponents)
        # cumsum adds one by one, as the native core does; sum() would add pairwise.
        self.prefix = np.concatenate([[0.0], np.cumsum(self.a)])

    def widths(self, tau: float) -> Widths:
        """Return for each row how many products are at least ``tau``."""
        low = np.zeros(len(self.g), np.int32)
        high = np.full(len(self.g), len(self.a), np.int32)
        while (open_rows := low < high).any():
            middle = (low + high) // 2
            enough = self.g * self.a[np.minimum(middle, len(self.a) - 1)] >= tau
            low = np.where(open_rows & enough, middle + 1, low)
            high = np.where(open_rows & ~enough, middle, high)
        return low

    def mass(self, widths: Widths) -> float:
        """Return the sum of the products within ``widths``."""
        return float(np.cumsum(self.g * self.prefix[widths])[-1])

    def largest(self, enough: Callable[[Widths], bool]) -> float:
        """Return the largest threshold whose widths are ``enough``: always one of the products."""
        return largest_threshold(float(self.g[0] * self.a[0]), lambda tau: enough(self.widths(tau)))

    def found(self, widths: Widths, threshold: float) -> Found:
        total = self.mass(np.full_like(widths, len(self.a)))
        kept = self.mass(widths) / total if total > 0 else 0.0
        unscaled = float(np.ldexp(threshold, self.exponent))
        return Found(widths, unscaled, int(widths.sum(dtype=np.int64)), kept)


def cheapest_split(widths: npt.NDArray[np.int64], columns: int, band: int) -> tuple[int, int, int]:
    """Return the least FLOPs of a split staircase, and the row and reach of that split.

    Args:
        widths: Columns kept in each row, int64, never increasing, from 0 to ``columns``; not empty.
        columns: i.
        band: Rows or columns evaluated together.

    Returns:
        (FLOPs, split, reach); of equal splits the first.
    """
    rows = len(widths)
    used = int((widths > 0).sum())
    found = []
    for split in (*range(0, used, band), used):
        reach = int(widths[split]) if split < used else 0
        above = banded_area(widths[:split], band)
        below = banded_area(transposed_widths(widths[split:], reach), band)
        work = 4 * (rows * columns * (split + reach) + columns * above + rows * below)
        found.append((work, split, reach))
    return min(found, key=lambda split: split[0])


_HALVES = 1 << 16
_EXPONENTS = np.maximum(np.arange(_HALVES) >> 7, 1) - 150


def scores_by_mass(layers: Sequence[ScoreMatrix], mass: float, workers: int = 1) -> list[Kept]:
    """As :func:`curvfast.ops.scores_by_mass`, in one thread."""
    bits = [_bits(scores) for scores in layers]
    sums = _from_above(np.sum([_mantissas(own) for own in bits], axis=0))
    if not mass * sums[-1] > 0:
        raise ValueError("the mass of the scores is zero")
    target = mass * sums[-1]
    reached = int(np.argmax(sums[1:] >= target))
    half = _HALVES - 1 - reached
    inside = np.sort(np.concatenate([own[own >> 16 == half] for own in bits]))[::-1]
    within = np.cumsum(_mantissa(inside)).astype(np.float64)
    enough = sums[reached] + np.ldexp(within, _EXPONENTS[half]) >= target
    edge = 1 if mass == 1.0 else int(inside[np.argmax(enough)])
    return [
        _kept(own, edge, int((own == edge).sum()), scores.shape)
        for own, scores in zip(bits, layers, strict=True)
    ]


def scores_by_pairs(scores: ScoreMatrix, pairs: int, workers: int = 1) -> Kept:
    """As :func:`curvfast.ops.scores_by_pairs`, in one thread."""
    bits = _bits(scores)
    if pairs == 0:
        return Kept(_packed(np.zeros(scores.shape, bool)), 0, 0.0)
    edge = int(np.sort(bits)[::-1][pairs - 1])
    return _kept(bits, edge, pairs - int((bits > edge).sum()), scores.shape)


def _bits(scores: ScoreMatrix) -> npt.NDArray[np.int64]:
    """Return what orders the scores: their bit patterns, -0 as 0."""
    bits = np.ascontiguousarray(scores, np.float32).view(np.uint32).ravel().astype(np.int64)
    bits[bits == 0x80000000] = 0
    if (bits >= 0x7F800000).any():
        raise ValueError("scores must be finite and non-negative")
    return bits


def _mantissa(bits: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.where(bits >> 23, bits & 0x7FFFFF | 0x800000, bits & 0x7FFFFF)


def _mantissas(bits: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the sum of the mantissas of each high half: integers, exact in float64."""
    sums = np.bincount(bits >> 16, weights=_mantissa(bits), minlength=_HALVES)
    return sums.astype(np.float64, copy=False)


def _from_above(mantissas: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the sum of the scores of the 0, 1, 2, ... largest high halves."""
    return np.concatenate([[0.0], np.cumsum(np.ldexp(mantissas, _EXPONENTS)[::-1])])


def _kept(bits: npt.NDArray[np.int64], edge: int, at_edge: int, shape: tuple[int, ...]) -> Kept:
    """Keep every score above the edge, and the first so many of those at it."""
    tied = bits == edge
    kept = (bits > edge) | (tied & (np.cumsum(tied) <= at_edge))
    half = edge >> 16
    sums = _from_above(_mantissas(bits))
    inside = float(_mantissa(bits[kept & (bits >> 16 == half)]).sum())
    mass = sums[_HALVES - 1 - half] + np.ldexp(inside, _EXPONENTS[half])
    share = float(mass / sums[-1]) if sums[-1] > 0 else 0.0
    return Kept(_packed(kept.reshape(shape)), int(kept.sum()), share)


def _packed(kept: npt.NDArray[np.bool_]) -> Bits:
    return np.packbits(kept, axis=1, bitorder="little")
