"""activation_ratio(): activation of bands of components by two sets of texts, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvfast.analysis.activations import Vectors, readers, text_sums
from curvfast.analysis.bands import band_ends, check_bands, row_energies
from curvfast.analysis.statistics import Floats, draws, interval, pooled
from curvfast.display import aligned
from curvfast.errors import InputError
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.model.layers import LayerSpec, basis_layers
from curvfast.model.rows import RowRule

SIDES = ("inputs", "outputs")
TOKENS = ("mean", "rms", "last")


@dataclass(frozen=True, eq=False)
class ActivationRatio:
    """Activation ratios of texts A over texts B, by layer and band, with intervals."""

    layers: tuple[str, ...]
    bands: tuple[float, ...]
    """Upper ends of the bands; each begins where the one before ends."""
    ratio: Tensor
    """float64 [layers, bands]; NaN where a band holds no component."""
    low: Tensor
    """Lower end of the bootstrap interval, [layers, bands]; NaN without one."""
    high: Tensor
    """Its upper end."""
    confidence: float
    texts: tuple[int, int]
    """How many texts of A and of B."""

    def to_dict(self) -> dict[str, Any]:
        """Return the curves as JSON-able values."""
        return {
            "bands": list(self.bands),
            "confidence": self.confidence,
            "texts": list(self.texts),
            "layers": {
                name: {
                    key: [None if v != v else v for v in getattr(self, key)[row].tolist()]
                    for key in ("ratio", "low", "high")
                }
                for row, name in enumerate(self.layers)
            },
        }

    def __str__(self) -> str:
        """Return the curves as an aligned table."""
        edges = [0.0, *self.bands]
        heads = [f"{100 * a:g}-{100 * b:g} %" for a, b in zip(edges, self.bands, strict=False)]
        curves = zip(self.ratio, self.low, self.high, strict=True)
        rows = [
            [name, *(f"{r:.3f} [{lo:.3f} {hi:.3f}]" for r, lo, hi in zip(*curve, strict=True))]
            for name, curve in zip(self.layers, curves, strict=True)
        ]
        return aligned([["layer", *heads], *rows])


def activation_ratio(
    model: nn.Module,
    basis: Eigenbasis,
    texts_a: Iterable[Mapping[str, Any] | Tensor],
    texts_b: Iterable[Mapping[str, Any] | Tensor],
    layers: LayerSpec | None = None,
    *,
    bands: Sequence[float] = (0.1, 0.25, 0.5, 1),
    by: str = "index",
    side: str = "inputs",
    tokens: str = "mean",
    rows: RowRule | None = None,
    skip_last: bool | None = None,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool = True,
) -> ActivationRatio:
    """Compare how strongly two sets of texts excite bands of the eigenbasis.

    With U_b the eigenvectors of A in band b and a the inputs of a layer, the ratio is ‖U_bᵀ a‖ over
    texts A, divided by ‖U_bᵀ a‖ over texts B. Memorized text lies above 1 in the last, flattest
    band, and below 1 in the first. All tokens have equal weight, so the result does not depend on
    batches, padding or order. Source: arXiv 2510.24256, Figures 2 and 4. Forward only; modes,
    gradients and the global random state are as before.

    Args:
        model: The model the basis was measured on.
        basis: Its eigenbases, by layer name; leading eigenvectors suffice if they reach the start
            of the last band.
        texts_a: Batches as in :func:`curvfast.collect_from`; each row is one text.
        texts_b: Likewise.
        layers: Which layers of the basis, as in :func:`curvfast.collect`; None means all.
        bands: Where bands end, rising within (0, 1], the most curved components first.
        by: ``"index"``: ends are shares of the number of components, as in the paper; ``"mass"``:
            of the curvature mass Σμ they hold.
        side: ``"inputs"`` in the eigenvectors of A, or ``"outputs"``, bias included, in those of G.
        tokens: How token norms are averaged: ``"mean"`` of ‖U_bᵀ a‖ over all tokens; ``"rms"``, its
            root mean square, which one massive activation may dominate; ``"last"``, the mean over
            the last counted token of each text.
        rows: As in :func:`curvfast.collect`.
        skip_last: As in :func:`curvfast.collect`.
        samples: Bootstrap resamples of both sets of texts; 0 gives no interval.
        confidence: Confidence level of the percentile interval.
        seed: Seed of the generator that draws them.
        progress: Whether a bar counts texts (on a terminal only).

    Returns:
        Ratios and intervals, for every layer and band.

    Raises:
        InputError: If an argument is out of range, there is no text, or a band needs more
            eigenvectors than the basis holds.
        BasisMismatch: If the basis is of another model.
        LayerNotFound: If ``layers`` matches nothing in the basis.
        CoverageError: If a layer got no row.
    """
    check_bands(bands, by)
    _check(side, tokens, samples, confidence)
    chosen = basis_layers(model, basis, layers)
    outputs = side == "outputs"
    # Layers that share an A read one tensor: it is projected once.
    leader = {name: name for name in chosen} if outputs else readers(basis, chosen)
    watched = {name: layer for name, layer in chosen.items() if leader[name] == name}
    ends = {
        name: band_ends(basis[name].values_g if outputs else basis[name].values_a, bands, by)
        for name in watched
    }
    vectors = Vectors(basis, of_outputs=outputs)

    def norms(name: str, x: Tensor) -> Tensor:
        energies = row_energies(x, vectors.of(name, x.device), ends[name], layer=name)
        # The last column counts rows.
        return nn.functional.pad(energies if tokens == "rms" else energies.sqrt(), (0, 1), value=1)

    measure = partial(
        text_sums, model, watched, values=norms, last=tokens == "last", outputs=outputs, rows=rows,
        skip_last=skip_last, title="activations", progress=progress,
    )  # fmt: skip
    groups = [
        {name: v.numpy() for name, v in measure(texts).items()} for texts in (texts_a, texts_b)
    ]
    generator = np.random.default_rng(seed)
    sizes = tuple(len(next(iter(group.values()))) for group in groups)
    weights = [draws(size, samples, generator) for size in sizes]
    curves = {
        name: _curve(groups[0][name], groups[1][name], weights, confidence, root=tokens == "rms")
        for name in watched
    }
    ratio, low, high = (
        torch.from_numpy(np.stack([curves[leader[name]][part] for name in chosen]))
        for part in range(3)
    )
    return ActivationRatio(
        tuple(chosen), tuple(map(float, bands)), ratio, low, high, confidence, (sizes[0], sizes[1])
    )


def _curve(
    a: Floats, b: Floats, weights: Sequence[Floats], confidence: float, *, root: bool
) -> tuple[Floats, Floats, Floats]:
    """Return ratio and interval of one layer, from sums over the tokens of each text."""

    def ratio(of_a: Floats | None, of_b: Floats | None) -> Floats:
        with np.errstate(invalid="ignore", divide="ignore"):
            found = pooled(a[:, :-1], a[:, -1:], of_a) / pooled(b[:, :-1], b[:, -1:], of_b)
        return np.asarray(np.sqrt(found) if root else found)

    return ratio(None, None), *interval(ratio(*weights), confidence)


def _check(side: str, tokens: str, samples: int, confidence: float) -> None:
    if side not in SIDES:
        raise InputError(f"side={side!r}: pass 'inputs' or 'outputs'")
    if tokens not in TOKENS:
        raise InputError(f"tokens={tokens!r}: pass {', '.join(map(repr, TOKENS))}")
    if samples < 0 or not 0 < confidence < 1:
        raise InputError(
            f"samples={samples}, confidence={confidence}: pass a number of resamples, 0 for none, "
            "and a confidence inside (0, 1)"
        )
