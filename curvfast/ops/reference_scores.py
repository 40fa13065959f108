"""The selection of arbitrary scores, written to be read: the twin of the native core.

A float is an integer mantissa times a power of two that its 16 high bits decide, so sums are exact
among floats of one high half. Those sums are added from the largest half down, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from curvfast.ops.selection import Bits, Kept, ScoreMatrix

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
