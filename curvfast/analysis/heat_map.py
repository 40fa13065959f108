"""Memorization scores of single tokens, and their HTML heat map."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.analysis.activations import Seen, readers, watching
from curvfast.analysis.detector import FLATTEST, FlatEnergy, share
from curvfast.errors import CoverageError, InputError
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.model.layers import LayerSpec, basis_layers

_COLOUR = "214, 69, 65"


def token_scores(
    model: nn.Module,
    basis: Eigenbasis,
    batch: Mapping[str, Any] | Tensor,
    layers: LayerSpec | None = None,
    *,
    flattest: float = FLATTEST,
) -> Tensor:
    """Score every token of a batch, as :func:`memorization_scores` does texts.

    Args:
        model: The model the basis was measured on.
        basis: Its eigenbases, by layer name.
        batch: As in :func:`curvfast.collect_from`.
        layers: Which layers of the basis, the score being the mean over them; None means all.
        flattest: Share of the components that counts as flat.

    Returns:
        float64 [texts, positions] on the CPU, in [0, 1]; NaN where nothing is measured, such as at
        padding. The last token of a text has a score too.

    Raises:
        InputError: If an argument is out of range, the layers disagree about positions, or the
            basis holds too few eigenvectors.
        BasisMismatch: If the basis is of another model.
        LayerNotFound: If ``layers`` matches nothing in the basis.
        CoverageError: If the forward calls no chosen layer.
    """
    chosen = basis_layers(model, basis, layers)
    leader = readers(basis, chosen)
    weights = Counter(leader.values())
    flat = FlatEnergy(basis, flattest)
    sums: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def add(seen: Seen) -> None:
        if seen.shape not in sums:
            zeros = torch.zeros(seen.shape, dtype=torch.float64, device=seen.rows.device)
            sums[seen.shape] = zeros, zeros.clone()
        scores = share(flat(seen.layer, seen.rows)).double()
        place, weight = (seen.texts, seen.positions), float(weights[seen.layer])
        for total, amount in zip(sums[seen.shape], (scores, torch.ones_like(scores)), strict=True):
            total.index_put_(place, weight * amount, accumulate=True)

    with watching(model, {n: chosen[n] for n in weights}, add, skip_last=False) as run:
        run(batch)
    if not sums:
        raise CoverageError(
            f"no row of {', '.join(map(repr, weights))} is seen: the forward calls none of them, "
            "or no token was routed to one; name others in layers="
        )
    if len(sums) != 1:
        raise InputError(
            f"the chosen layers see positions of {len(sums)} forms, {list(sums)}, not of one: name "
            "layers of one kind in layers="
        )
    ((total, count),) = sums.values()
    return (total / count).cpu()


def heat_map(
    pieces: Sequence[str],
    scores: Iterable[float],
    *,
    low: float | None = None,
    high: float | None = None,
) -> str:
    """Return a heat map of a passage as HTML: the higher a token's score, the redder it is.

    Args:
        pieces: The text of each token.
        scores: A score for each; NaN leaves a token uncoloured.
        low: Score without colour; None takes the least.
        high: Score of full colour; None takes the greatest.

    Returns:
        One ``<div>`` of escaped ``<span>`` elements, whose titles hold the scores.

    Raises:
        InputError: If there are not as many scores as pieces.
    """
    values = [float(score) for score in scores]
    if len(values) != len(pieces):
        raise InputError(f"{len(pieces)} pieces and {len(values)} scores: pass one score a piece")
    known = [value for value in values if not math.isnan(value)]
    least = min(known, default=0.0) if low is None else low
    most = max(known, default=1.0) if high is None else high
    spans = (_span(piece, v, least, most) for piece, v in zip(pieces, values, strict=True))
    return f'<div style="white-space: pre-wrap">{"".join(spans)}</div>'


def _span(piece: str, value: float, low: float, high: float) -> str:
    text = html.escape(piece)
    if math.isnan(value):
        return f"<span>{text}</span>"
    strength = min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.0
    ground = f"background: rgba({_COLOUR}, {strength:.3f})"
    return f'<span style="{ground}" title="{value:.4g}">{text}</span>'
