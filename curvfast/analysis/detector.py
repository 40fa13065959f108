"""Detection of memorized text by the share of input energy in the flattest components."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.analysis.activations import Vectors, readers, text_sums
from curvfast.analysis.bands import row_energies
from curvfast.analysis.statistics import auc
from curvfast.errors import InputError, LayerNotFound
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.model.layers import LayerSpec, basis_layers, matches_name
from curvfast.model.rows import RowRule

TOKENS = ("mean", "energy", "last")
FLATTEST = 0.6


@dataclass(frozen=True, eq=False)
class TextScores:
    """Memorization scores: the share of input energy in the flattest components."""

    layers: tuple[str, ...]
    shares: Tensor
    """float64 [texts, layers], in [0, 1]; NaN for an expert that no token of a text went to."""
    flattest: float
    """Share of the components that counts as flat."""

    def of(self, layers: str | Iterable[str] | None = None) -> Tensor:
        """Return one score a text: the mean over layers.

        Args:
            layers: Kinds, names or globs; None takes all.

        Returns:
            float64 [texts].

        Raises:
            LayerNotFound: If ``layers`` matches nothing.
        """
        wanted = "*" if layers is None else layers
        wanted = wanted if isinstance(wanted, str) else list(wanted)
        chosen = [i for i, name in enumerate(self.layers) if matches_name(wanted, name)]
        if not chosen:
            raise LayerNotFound(f"layers={layers!r} matches none of {', '.join(self.layers)}")
        return self.shares[:, chosen].nanmean(1)

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as JSON-able values."""
        columns = self.shares.T.tolist()
        return {
            "flattest": self.flattest,
            "layers": {
                name: [None if v != v else v for v in column]
                for name, column in zip(self.layers, columns, strict=True)
            },
        }


def memorization_scores(
    model: nn.Module,
    basis: Eigenbasis,
    batches: Iterable[Mapping[str, Any] | Tensor],
    layers: LayerSpec | None = None,
    *,
    flattest: float = FLATTEST,
    tokens: str = "mean",
    rows: RowRule | None = None,
    skip_last: bool | None = None,
    progress: bool = True,
) -> TextScores:
    """Score how much each text looks memorized, from its activations alone.

    The score is the share of ‖a‖² that lies in the flattest eigenvectors of A, a being the inputs
    of a layer: memorized text excites directions that are rarely used. No label and no list of
    memorized text is needed, and one forward a batch; modes, gradients and the global random state
    are as before.

    Args:
        model: The model the basis was measured on.
        basis: Its eigenbases; leading eigenvectors suffice if they reach the flattest share.
        batches: As in :func:`curvfast.collect_from`; each row is one text.
        layers: Which layers of the basis, as in :func:`curvfast.collect`; None means all.
        flattest: Share of the components that counts as flat, in (0, 1).
        tokens: How tokens are combined: ``"mean"`` of each token's share; ``"energy"``, flat energy
            over all energy of the text, which one massive activation may dominate; ``"last"``,
            the share of the last counted token.
        rows: As in :func:`curvfast.collect`.
        skip_last: As in :func:`curvfast.collect`.
        progress: Whether a bar counts texts (on a terminal only).

    Returns:
        A share for every text and layer.

    Raises:
        InputError: If an argument is out of range, there is no text, or the basis holds too few
            eigenvectors.
        BasisMismatch: If the basis is of another model.
        LayerNotFound: If ``layers`` matches nothing in the basis.
        CoverageError: If a layer got no row.
    """
    if tokens not in TOKENS:
        raise InputError(f"tokens={tokens!r}: pass {', '.join(map(repr, TOKENS))}")
    chosen = basis_layers(model, basis, layers)
    leader = readers(basis, chosen)
    watched = {name: layer for name, layer in chosen.items() if leader[name] == name}
    flat = FlatEnergy(basis, flattest)

    def values(name: str, x: Tensor) -> Tensor:
        energies = flat(name, x)
        if tokens == "energy":
            return energies
        return nn.functional.pad(share(energies)[:, None], (0, 1), value=1)

    sums = text_sums(
        model, watched, batches, values, last=tokens == "last", rows=rows, skip_last=skip_last,
        title="scores", progress=progress,
    )  # fmt: skip
    shares = {name: each[:, 0] / each[:, 1] for name, each in sums.items()}
    columns = torch.stack([shares[leader[name]] for name in chosen], dim=1)
    return TextScores(tuple(chosen), columns, flattest)


def discriminative_layers(memorized: TextScores, clean: TextScores, count: int) -> tuple[str, ...]:
    """Return the layers whose shares separate two known sets best (by AUC), the best first.

    The chosen layers must be evaluated on other texts. For an expert only the texts routed to it
    count; one without texts of a set has an AUC of 0.5.

    Args:
        memorized: Scores of texts known to be memorized.
        clean: Scores of texts known not to be, of the same layers.
        count: How many layers.

    Returns:
        Their names, to be passed to :meth:`TextScores.of`; ties stay in the order of the model.

    Raises:
        InputError: If the layers differ, or there are fewer.
    """
    if memorized.layers != clean.layers or not 1 <= count <= len(clean.layers):
        raise InputError(
            f"count={count} of {len(clean.layers)} layers: pass a number from 1 to that, and "
            "scores of the same layers"
        )
    areas = {
        name: _told_apart(memorized.shares[:, i], clean.shares[:, i])
        for i, name in enumerate(clean.layers)
    }
    return tuple(sorted(areas, key=lambda name: -areas[name])[:count])


def telling_layers(memorized: TextScores, clean: TextScores, count: int) -> tuple[str, ...]:
    """Return :func:`discriminative_layers`, of which this is the earlier, deprecated name."""
    warnings.warn(
        "telling_layers is now called discriminative_layers", DeprecationWarning, stacklevel=2
    )
    return discriminative_layers(memorized, clean, count)


def _told_apart(memorized: Tensor, clean: Tensor) -> float:
    """Return the AUC of one layer's shares, NaN left out; 0.5 where that leaves a set empty."""
    high, low = (shares[~shares.isnan()] for shares in (memorized, clean))
    return auc(high, low) if len(high) and len(low) else 0.5


class FlatEnergy:
    """The energy of a layer's inputs in its flattest components."""

    def __init__(self, basis: Eigenbasis, flattest: float) -> None:
        """Set the basis and the share.

        Args:
            basis: Eigenbases by layer name.
            flattest: Share of the components that counts as flat.

        Raises:
            InputError: If it is outside (0, 1).
        """
        if not 0 < flattest < 1:
            raise InputError(f"flattest={flattest}: pass a share of the components, in (0, 1)")
        self._basis, self._flattest = basis, flattest
        self._vectors = Vectors(basis, of_outputs=False)

    def __call__(self, layer: str, x: Tensor) -> Tensor:
        """Return flat energy and all energy of rows x [rows, d], float32 [rows, 2].

        Raises:
            InputError: If the basis holds too few eigenvectors.
        """
        d = x.shape[1]
        ends = [d - round(self._flattest * d), d]
        energies = row_energies(x, self._vectors.of(layer, x.device), ends, layer=layer)
        return torch.stack([energies[:, 1], energies.sum(1)], dim=1)


def share(energies: Tensor) -> Tensor:
    """Return flat over all energy, [rows]; 0 for a row without any."""
    return energies[:, 0] / energies[:, 1].clamp_min(torch.finfo(energies.dtype).tiny)
