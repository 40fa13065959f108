"""Scores of a layer's pairs, computed lazily."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

Term = tuple[Tensor, Tensor]
"""g [d_out] and a [d_in], float64 on the CPU: the curvature gᵢaⱼ."""
CurvatureRows = Callable[[slice], Tensor]
"""Returns rows of a layer's curvature, float64 [rows, d_in] on the CPU."""
# Float32 reaches from 2^-149 to 2^127: the largest curvature is scaled up, with room for C².
_TOP = 60
_BAND = 256


@dataclass(frozen=True, eq=False)
class Scores(Mapping[str, Tensor]):
    """Scores by layer name: curvature, or curvature times C², computed at each access.

    A score is [d_out, d_in] float32, rounded once. All are divided by one power of two, so that
    small curvatures do not underflow and layers can be compared.
    """

    layers: Mapping[str, tuple[int, int]]
    """(d_out, d_in) by layer name."""
    curvature: Callable[[str], CurvatureRows]
    unit: int
    """Exponent of that power of two; see :func:`unit_of`."""
    coefficients: Callable[[str], Tensor] | None = None
    """C [d_out, d_in] of a layer; None: the score is the curvature."""

    def __getitem__(self, name: str) -> Tensor:
        """Return the scores of one layer."""
        out = torch.empty(self.layers[name], dtype=torch.float32, device="cpu")
        rows = self.curvature(name)
        c = None if self.coefficients is None else self.coefficients(name)
        for start in range(0, len(out), _BAND):
            band = slice(start, start + _BAND)
            values = rows(band) * math.ldexp(1.0, -self.unit)
            if c is not None:
                values *= c[band].to("cpu", torch.float64).square()
            out[band] = values
        return out

    def __iter__(self) -> Iterator[str]:
        """Iterate over layer names."""
        return iter(self.layers)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self.layers)


def sum_of(terms: Sequence[Term]) -> CurvatureRows:
    """Return Σ gᵢaⱼ over ``terms``, and 0 where it is negative."""

    def rows(band: slice) -> Tensor:
        return reduce(torch.add, (g[band, None] * a for g, a in terms)).clamp_min_(0)

    return rows


def unit_of(layers: Iterable[Sequence[Term]]) -> int:
    """Return the exponent to divide the scores of ``layers`` by, from their largest products."""
    largest = max(
        (float(g.abs().max() * a.abs().max()) for terms in layers for g, a in terms), default=0.0
    )
    # 2^1023 is the largest power of two there is to multiply by.
    return max(math.frexp(largest)[1] - _TOP, -1023)
