"""Scores of a layer's pairs, computed lazily."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from curvfast import ops
from curvfast.errors import InputError
from curvfast.kfac.selection.mask import Mask
from curvfast.kfac.selection.rule import Rule
from curvfast.ops.selection import Kept

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
        out = torch.empty(self.layers[name], dtype=torch.float32, device="cpu")  # [d_out, d_in]
        rows = self.curvature(name)
        c = None if self.coefficients is None else self.coefficients(name)
        for start in range(0, len(out), _BAND):
            band = slice(start, start + _BAND)
            values = rows(band) * math.ldexp(1.0, -self.unit)  # curvature: [band, d_in]
            if c is not None:
                values *= c[band].to("cpu", torch.float64).square()  # times C²: [band, d_in]
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


def masks(scores: Mapping[str, Tensor], rule: Rule) -> dict[str, Mask]:
    """Select the largest of arbitrary scores, without sorting.

    Args:
        scores: [d_out, d_in] by layer name, finite and non-negative, taken as float32.
        rule: How much to keep. ``mass`` is a share of the summed score: every score that ties with
            the one that reaches it is kept as well, and 1 keeps every score above zero. Numbers and
            fractions are exact; ties go in row order. ``globally`` holds the scores of all layers.

    Returns:
        A mask for each layer.

    Raises:
        InputError: If scores are negative or not finite, or the rule is out of range.
        LayerNotFound: If the rule is by layer name, and one is missing.
    """
    workers = torch.get_num_threads()
    if rule.globally and rule.mass is not None:
        held = {name: _checked(name, values) for name, values in scores.items()}
        if not any(top > 0 for _, top in held.values()):
            raise InputError("every score of every layer is zero, so there is no mass to share")
        found = ops.scores_by_mass([v.numpy() for v, _ in held.values()], rule.mass, workers)
        return {
            name: _mask(own, held[name][0].shape[1]) for name, own in zip(held, found, strict=True)
        }
    kept = {}
    for name in scores:
        values, top = _checked(name, scores[name])
        if rule.mass is None:
            count = rule.count(name, *values.shape)
            own = ops.scores_by_pairs(values.numpy(), count, workers)
        elif top > 0:
            own = ops.scores_by_mass([values.numpy()], rule.mass, workers)[0]
        else:
            raise InputError(
                f"every score of layer {name!r} is zero, so there is no mass to share: is its "
                "weight zero, or was no data collected? Pass fraction= or pairs=, or leave it out"
            )
        kept[name] = _mask(own, values.shape[1])
    return kept


def _checked(name: str, values: Tensor) -> tuple[Tensor, float]:
    """Return scores as float32 on the CPU, and the largest of them."""
    scores = values.detach().to("cpu", torch.float32).contiguous()
    if scores.dim() != 2 or not scores.numel():
        raise InputError(f"scores of layer {name!r} must be [d_out, d_in], got {[*scores.shape]}")
    low, high = (float(edge) for edge in scores.aminmax())
    if not 0 <= low <= high < math.inf:
        raise InputError(
            f"scores of layer {name!r} must be finite and non-negative, and are from {low} to "
            f"{high}: is there NaN or infinity in its weight or curvature?"
        )
    return scores, high


def _mask(kept: Kept, columns: int) -> Mask:
    return Mask(torch.from_numpy(kept.mask), columns, kept.mass)
