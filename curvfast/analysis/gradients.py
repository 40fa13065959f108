"""gradient_energies(): each example's squared gradient in kept and in removed eigenpairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.analysis.per_example import joined, split_labels
from curvfast.collection.hooks import Arrival, Capture
from curvfast.collection.likelihood import fisher_gradient, label_gradient
from curvfast.collection.step import backward_edge, gold_labels
from curvfast.display import Bar
from curvfast.errors import CoverageError, InputError
from curvfast.kfac.corrections import POSITION, READINGS, SEQUENCE
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.kfac.selection.kept_pairs import Selection
from curvfast.model.batch import Batch
from curvfast.model.families import LinearLayer
from curvfast.model.forward import frozen, logits_of
from curvfast.model.identity import is_causal_lm
from curvfast.model.layers import LayerSpec, basis_layers
from curvfast.model.rows import RowRule
from curvfast.model.token_streams import TokenStreams
from curvfast.ops import project_rows

LABELS = ("gold", "fisher")


@dataclass(frozen=True, eq=False)
class GradientEnergies:
    """Squared gradient of each example with respect to each weight, split by kept eigenpairs.

    C = U_Gᵀ (∂L/∂W) U_A is the gradient in the eigenbasis of the population's curvature.
    """

    layers: tuple[str, ...]
    energy: Tensor
    """‖C‖² = ‖∂L/∂W‖², float64 [examples, layers]; with labels ``"fisher"`` the trace of the
    example's own Fisher block: how sharp its loss is in the weight."""
    flat: Tensor
    """The part of it in pairs that are not kept; float64 [examples, layers]."""
    curved: Tensor
    """Σ C_ij² λᵢ μⱼ, float64 [examples, layers]."""

    def sharpness(self) -> Tensor:
        """Return the energy over all layers, [examples]."""
        return self.energy.sum(1)

    def flat_share(self) -> Tensor:
        """Return the share of that energy in pairs that are not kept, [examples], in [0, 1]."""
        return _over(self.flat.sum(1), self.energy.sum(1))

    def population_curvature(self) -> Tensor:
        """Return the population's curvature along each example's gradient, [examples].

        The Rayleigh quotient Σ C_ij² λᵢμⱼ / Σ C_ij² over all layers: how much the loss of the
        *population* curves along this example's gradient. It does not depend on the kept pairs.
        """
        return _over(self.curved.sum(1), self.energy.sum(1))


def gradient_energies(
    model: nn.Module,
    basis: Eigenbasis,
    kept: Selection,
    batches: Iterable[Mapping[str, Any] | Tensor],
    layers: LayerSpec | None = None,
    *,
    labels: str = "fisher",
    draws: int = 4,
    per: str = SEQUENCE,
    seed: int = 0,
    rows: RowRule | None = None,
    skip_last: bool | None = None,
    progress: bool = True,
) -> GradientEnergies:
    """Measure the gradient of each example's own summed loss in the population's eigenbasis.

    Modes, gradients and the global random state are as before, and no parameter gets a gradient; a
    forward, a backward of activations alone and a product of d_out · d_in values for each example
    and layer.

    Args:
        model: The model the basis was measured on; in eval mode meanwhile. No example may see
            another of its batch.
        basis: Its eigenbases, complete.
        kept: The selection of an edit, as from :meth:`Eigenbasis.keep`.
        batches: As in :func:`curvfast.analysis.input_curvature`: an example is an entry of the
            leading dimension, and positions whose label is -100 add nothing to its loss.
        layers: Which layers of the basis, as in :func:`curvfast.collect`; None means all.
        labels: ``"fisher"``: E over labels drawn from the model's prediction, which is not 0 where
            the loss is. ``"gold"``: the gradient of the given labels.
        draws: With ``"fisher"``: number of draws over which the squared gradient is averaged. A
            rare label may hold most of an example's Fisher, so no label is drawn: the gradient
            √p∘z - p (√p·z) with random signs z has the same second moment diag(p) - ppᵀ as
            p - onehot(y). Source: Martens, Sutskever and Swersky, arXiv 1206.6464.
        per: ``"sequence"``: C is the gradient of the whole example. ``"position"``: C_ij² is
            replaced by the sum over its positions of (uᵢᵀg)² (vⱼᵀa)², as in K-FAC: if g and a were
            independent, the population would have 1 - ρ of its energy in the pairs that an edit
            at ρ removes; it has more.
        seed: Seed of the signs.
        rows: As in :func:`curvfast.collect`.
        skip_last: As in :func:`curvfast.collect`.
        progress: Whether a bar counts examples (on a terminal only).

    Returns:
        Energies of every example and layer, of the summed loss, in the order of ``batches``.

    Raises:
        InputError: If an argument is out of range, there is no example, labels are missing, or the
            basis holds leading eigenvectors only.
        BasisMismatch: If the basis is of another model.
        LayerNotFound: If ``layers`` matches nothing in the basis, or ``kept`` lacks a layer.
        CoverageError: If a layer was called twice in a forward, or not at all.
    """
    if labels not in LABELS or per not in READINGS or draws < 1:
        raise InputError(
            f"labels={labels!r}, per={per!r}, draws={draws}: pass labels {' or '.join(LABELS)}, "
            f"per {' or '.join(READINGS)}, and at least one draw"
        )
    chosen = basis_layers(model, basis, layers)
    causal = is_causal_lm(model) if skip_last is None else skip_last
    generator = torch.Generator().manual_seed(seed)
    energies = _Energies(model, chosen, basis, kept, per, rows, causal)
    repeats = draws if labels == "fisher" else 1
    found = []
    with (
        frozen(model, keep_mode=False),
        energies.watching(),
        Bar("gradients", None, "example", progress) as bar,
    ):
        for batch in batches:
            arguments, gold = split_labels(model, batch)
            parts = []
            for _ in range(repeats):
                energies.begin()
                with torch.enable_grad():
                    logits = logits_of(model(**arguments))
                if not logits.requires_grad:
                    energies.end(len(logits))
                edge, count = backward_edge(logits), len(logits)
                targets = gold_labels(arguments, gold, logits, causal)
                if labels == "fisher":
                    gradient = fisher_gradient(logits, targets, generator)
                else:
                    gradient = label_gradient(logits, targets)[0]
                torch.autograd.backward((edge,), (gradient,))
                parts.append(energies.end(count))
            found.append(torch.stack(parts).mean(0))
            bar.advance(count)
    stacked = joined(found)
    return GradientEnergies(tuple(chosen), *stacked.unbind(2))


class _Energies:
    """Accumulates the energies of one batch's examples, layer by layer, as gradients arrive."""

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, LinearLayer],
        basis: Eigenbasis,
        kept: Selection,
        per: str,
        rule: RowRule | None,
        causal: bool,
    ) -> None:
        """Set the layers to observe.

        Raises:
            InputError: If a basis holds leading eigenvectors only, or ``kept`` is of another frame.
        """
        basis.require_curvature()
        partial = [name for name in layers if not basis[name].complete]
        if partial or kept.frame != basis.frame:
            raise InputError(
                f"layer {partial[0]!r} has leading eigenvectors only: decompose without mass="
                if partial
                else f"kept= is of {kept.frame} pairs: pass what basis.keep() returns"
            )
        self._model, self._layers = model, layers
        self._per, self._rule, self._causal = per, rule, causal
        self._bases = {name: _Pairs(basis, kept, name) for name in layers}
        self._batch = Batch(skip_last=causal)
        self._examples: dict[str, dict[int, Tensor]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Register hooks on the layers for the block."""
        streams = TokenStreams(self._model, self._layers.values())
        capture = Capture(
            self._layers, lambda: self._batch, streams.current, self._arrive, None,
            share_inputs=False, driven=True,
        )  # fmt: skip
        streams.attach()
        capture.attach()
        try:
            yield
        finally:
            capture.remove()
            streams.remove()

    def begin(self) -> None:
        """Begin a batch, before its forward."""
        self._batch = Batch(skip_last=self._causal, rule=self._rule)
        self._examples = {}

    def end(self, count: int) -> Tensor:
        """Return the energies of the batch, float64 [count, layers, 3], after its backward.

        Raises:
            CoverageError: If a layer got no gradient.
        """
        missing = [name for name in self._layers if name not in self._examples]
        if missing:
            raise CoverageError(
                f"no gradient of {missing[0]!r} arrived: the forward does not call it, no token "
                "was routed to it, or the logits do not depend on it; leave it out of layers="
            )
        none = torch.zeros(3, dtype=torch.float64)
        columns = [
            torch.stack([own.get(i, none).cpu() for i in range(count)])
            for own in (self._examples[name] for name in self._layers)
        ]
        return torch.stack(columns, dim=1)

    def _arrive(self, arrival: Arrival) -> None:
        name, g, x = arrival.layer, arrival.g, arrival.x
        assert x is not None
        if name in self._examples:
            raise CoverageError(
                f"layer {name!r} was called twice in one call of the model, so the gradient of an "
                "example is a sum over both; leave the layer out of layers="
            )
        shape = g.shape[:-1]
        rows = arrival.batch.rows(name, shape, g.device)
        owners, order = arrival.batch.sequences(shape, rows, g.device).sort(stable=True)
        pairs = self._bases[name]
        p, q = pairs.rotated(rows.take(g)[order], rows.take(x)[order])
        found, lengths = owners.unique_consecutive(return_counts=True)
        sizes = lengths.tolist()
        parts = zip(found.tolist(), p.split(sizes), q.split(sizes), strict=True)
        self._examples[name] = {
            i: pairs.energies(self._squares(own_p, own_q)) for i, own_p, own_q in parts
        }

    def _squares(self, p: Tensor, q: Tensor) -> Tensor:
        """Return the squared gradient of rows in the eigenbasis, [d_out, d_in]."""
        if self._per == POSITION:
            return p.square().T @ q.square()
        return (p.T @ q).square_()


class _Pairs:
    """The eigenpairs of one layer, cached on their device."""

    def __init__(self, basis: Eigenbasis, kept: Selection, name: str) -> None:
        self._basis, self._removed = basis[name], ~kept[name].dense()
        self._moved: tuple[Tensor, ...] | None = None

    def rotated(self, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows of gradients and of inputs rotated into the eigenbasis, float32."""
        u_g, u_a, *_ = self._on(g.device)
        return project_rows(g, u_g), project_rows(x, u_a)

    def energies(self, squares: Tensor) -> Tensor:
        """Return ΣC_ij², that of removed pairs, and Σ C_ij² λᵢ μⱼ, float64 [3]."""
        _, _, removed, g, a = self._on(squares.device)
        curved = g @ (squares @ a)
        return torch.stack([squares.sum(), (squares * removed).sum(), curved]).double()

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        if self._moved is None or self._moved[0].device != device:
            own = self._basis
            held = (own.vectors_g, own.vectors_a, self._removed, own.values_g, own.values_a)
            self._moved = tuple(tensor.to(device, torch.float32) for tensor in held)
        return self._moved


def _over(part: Tensor, whole: Tensor) -> Tensor:
    """Return part over whole, 0 where the whole is 0."""
    return part / whole.clamp_min(torch.finfo(whole.dtype).tiny)
