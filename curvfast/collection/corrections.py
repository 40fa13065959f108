"""correct() and collect_corrections(): measure the EK-FAC correction of an eigenbasis."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from curvfast import distributed
from curvfast.collection.config import CollectConfig
from curvfast.collection.correction_sums import CorrectionSums, bytes_of
from curvfast.collection.driver import Pass, merged_provenance
from curvfast.collection.head import Said
from curvfast.collection.measurement import Measurement
from curvfast.collection.targets import LabelMask
from curvfast.collection.verdict import Energy
from curvfast.distributed import group_of
from curvfast.errors import InputError
from curvfast.kfac.corrections import POSITION, READINGS, SEQUENCE, Corrections, LayerCorrection
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.model.families import LinearLayer
from curvfast.model.identity import without_ddp
from curvfast.model.layers import LayerSpec, basis_layers
from curvfast.model.rows import RowRule
from curvfast.storage import checksum

log = logging.getLogger(__name__)


class Correction(Measurement):
    """A running measurement of the EK-FAC correction, yielded by :func:`collect_corrections`."""

    _sums: CorrectionSums

    def __init__(
        self,
        model: nn.Module,
        config: CollectConfig,
        basis: Eigenbasis,
        layers: dict[str, LinearLayer],
        per: str,
        *,
        rows: RowRule | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        driven: bool = False,
        group: distributed.Group = None,
        one_of_many: bool = False,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Register the hooks; :func:`collect_corrections` describes the arguments.

        ``layers`` are layers of the basis. With ``one_of_many``, other passes measure the rest.
        """
        self._per = per
        self._bytes = bytes_of(Eigenbasis({name: basis[name] for name in layers}))
        self._sums = CorrectionSums(layers, basis, per, config.spill_every)
        self._result: Corrections | None = None
        log.info(
            "measuring the corrections of %d layers: their sums need %.1f MB",
            len(layers), self._bytes / 1e6,
        )  # fmt: skip
        super().__init__(
            model, config, layers, rows=rows, grad_scaler=grad_scaler, driven=driven, group=group,
            one_of_many=one_of_many, facts=facts, parts=[self._sums], inputs_first=False,
        )  # fmt: skip

    def corrections(self) -> Corrections:
        """Return the corrections of everything summed so far, on all ranks together.

        With a process group every rank must call this, and gets the same.

        Returns:
            A snapshot while collecting; after the ``with`` block, the same object on every call.
            Experts that no counted token was routed to are left out, with a warning.

        Raises:
            EvidenceError: If which rows count, or the unit, is neither proven nor told.
            CoverageError: If a chosen layer got no rows; the message says which and why.
            NonFiniteError: With ``on_nonfinite="error"``, if something was not finite.
            DistributedError: If another rank is gone.
        """
        if self._result is not None:
            return self._result
        final, group = not self._active, self._group
        sums: CorrectionSums = self._added_up(final=final)
        layers = (sums if final else sums.copy()).corrections()
        verdict = self._judged(lambda name: _energy(layers.get(name)), group)
        idle = self._require(sums)
        provenance = {**self._provenance(idle, verdict), "per": self._per}
        found = Corrections(layers, self._per, provenance)
        if final:
            self._result = found
            self._sums.release()
        return found


def correct(
    model: nn.Module,
    basis: Eigenbasis,
    batches: Iterable[Mapping[str, Any] | Tensor],
    layers: LayerSpec | None = None,
    *,
    labels: str = "sampled",
    likelihood: str | None = None,
    class_axis: int | None = None,
    label_mask: LabelMask | None = None,
    tokens: int | None = None,
    per: str = POSITION,
    seed: int = 0,
    progress: bool = True,
    skip_last: bool | None = None,
    rows: RowRule | None = None,
    rows_per_step: float | None = None,
    spill_every: int | None = None,
    keep_mode: bool = False,
    layers_per_pass: int | None = None,
    checkpoint: str | PathLike[str] | None = None,
    every: int = 50,
    group: Any = "auto",
) -> Corrections:
    """Measure Λ, the exact diagonal of the Fisher in a Kronecker-factored eigenbasis (EK-FAC).

    K-FAC approximates the curvature of an eigenpair by λᵢ μⱼ; this measures it, in a second pass
    over data. Source: George et al., arXiv 1806.03884, the scaling S*. Only gradients of
    activations are computed. Modes, ``requires_grad`` and the global random state are as before
    when it returns. :meth:`Eigenbasis.with_marginals` needs no such pass.

    A layer needs 4·(d_out·d_in + d_out² + d_in²) bytes, for its sum and its eigenvectors; a call
    4·(d_out + d_in) bytes a row more, and its input is held until its gradient arrives.

    Args:
        model: The model the basis was measured on.
        basis: From :meth:`Factors.eigh`. Of one that holds leading eigenvectors only, the leading
            block of Λ is measured.
        batches: Batches of data, as in :func:`curvfast.collect_from`.
        layers: Which layers of the basis, as in :func:`curvfast.collect`; None means all.
        labels: Sampled, given or exact labels, as in :func:`curvfast.collect_from`.
        likelihood: As in :func:`curvfast.collect_from`.
        class_axis: As in :func:`curvfast.collect_from`.
        label_mask: As in :func:`curvfast.collect_from`.
        tokens: Stop once this many labels were counted; None takes every batch.
        per: What a sample is. ``"position"``: E[(uᵢᵀg)² (vⱼᵀa)²] over counted rows, K-FAC's own
            reading, one product of squares a call. ``"sequence"``: the squared gradient of a whole
            sequence, E[(Σ_t uᵢᵀg_t vⱼᵀa_t)²], as the empirical Fisher of sequences has it; a
            sequence is a row of the model's input, or, where an activation does not flatten that,
            an entry of its leading dimension. It costs a product for each sequence.
        seed: Seed of the generators that draw labels and rows.
        progress: Whether a bar counts labels (on a terminal only).
        skip_last: Whether the last real position of each sequence is left out.
        rows: Row rule, as in :func:`curvfast.collect`.
        rows_per_step: Share or number of rows counted; with ``per="position"`` only.
        spill_every: Number of calls after which a float32 sum is added to a float64 one.
        keep_mode: Whether the model stays in its mode, as in :func:`curvfast.collect_from`.
        layers_per_pass: Number of layers whose sums and eigenvectors are in memory at a time.
        checkpoint: Folder from which an interrupted call is resumed.
        every: With ``checkpoint``: batches between two states.
        group: Process group, as in :func:`curvfast.collect_from`.

    Returns:
        The corrections, of the summed loss.

    Raises:
        InputError: If an argument is out of range, ``batches`` is empty, or labels are missing.
        BasisMismatch: If the basis is of another model.
        LayerNotFound: If ``layers`` matches nothing in the basis.
        CoverageError: If a chosen layer got no rows, or with ``per="sequence"`` was called twice.
        StorageError: If the checkpoint is foreign, damaged, or of another measurement.
        DistributedError: If another rank is gone.
    """
    _check(per, rows_per_step)
    model = without_ddp(model)
    chosen = basis_layers(model, basis, layers)
    config = CollectConfig(
        layers=_described(layers), loss_reduction="sum", skip_last=skip_last,
        spill_every=spill_every, rows_per_step=rows_per_step, seed=seed,
    )  # fmt: skip
    identity: dict[str, Any] = {"config": config.to_dict(), "per": per}
    if checkpoint:
        identity["basis"] = _checksum(basis, chosen)
    data = Pass(
        model=model, batches=batches, layers=chosen,
        skip_last=skip_last, labels=labels, said=Said(likelihood, class_axis),
        label_mask=label_mask, tokens=tokens, seed=seed, progress=progress, keep_mode=keep_mode,
        layers_per_pass=layers_per_pass, checkpoint=checkpoint, every=every,
        group=group_of(group), identity=identity,
    )  # fmt: skip
    begin = partial(Correction, model, config, basis, per=per, rows=rows)
    results = [correction.corrections() for correction in data.measure(begin)]
    provenance = merged_provenance([each.provenance for each in results], batches)
    return Corrections({n: c for r in results for n, c in r.layers.items()}, per, provenance)


@contextmanager
def collect_corrections(
    model: nn.Module,
    basis: Eigenbasis,
    layers: LayerSpec | None = None,
    *,
    per: str = POSITION,
    loss_reduction: str | None = None,
    loss_scale: float | None = None,
    grad_scaler: torch.amp.GradScaler | None = None,
    skip_last: bool | None = None,
    rows: RowRule | None = None,
    spill_every: int | None = None,
    rows_per_step: float | None = None,
    every: int = 1,
    seed: int = 0,
    on_nonfinite: str = "skip",
    strict: bool = False,
    group: Any = "auto",
) -> Iterator[Correction]:
    """Measure Λ as :func:`correct` does, while the caller runs the training loop.

    Nothing is changed: no module, attribute, gradient or random number. The basis should be of the
    weights in the loop: if the loop trains them, the basis becomes that of an older model.

    ``basis``, ``layers``, ``per`` and ``rows_per_step`` are documented at :func:`correct`, all
    other arguments at :func:`curvfast.collect`; with a ``group`` every rank must call
    ``corrections()``.

    Yields:
        The measurement: ``corrections()``, ``coverage()``, ``mask()``, ``labels()``.

    Raises:
        InputError: If an argument is out of range.
        BasisMismatch: If the basis is of another model.
        LayerNotFound: If ``layers`` matches nothing in the basis.
        CoverageError: In a backward, if with ``per="sequence"`` a layer is called twice.
    """
    _check(per, rows_per_step)
    config = CollectConfig(
        layers=_described(layers), loss_reduction=loss_reduction, loss_scale=loss_scale,
        skip_last=skip_last, spill_every=spill_every, rows_per_step=rows_per_step, every=every,
        seed=seed, on_nonfinite=on_nonfinite, strict=strict,
    )  # fmt: skip
    correction = Correction(
        model, config, basis, basis_layers(model, basis, layers), per, rows=rows,
        grad_scaler=grad_scaler, group=group_of(group), facts={"labels": "caller's loss"},
    )  # fmt: skip
    try:
        yield correction
    finally:
        correction.close()


def _check(per: str, rows_per_step: float | None) -> None:
    if per not in READINGS:
        raise InputError(
            f"per={per!r}: pass 'position' (a sample is a row, as K-FAC has it) or 'sequence' (a "
            "sample is the gradient of a whole sequence)"
        )
    if per == SEQUENCE and rows_per_step is not None:
        raise InputError(
            "rows_per_step= leaves out positions of a sequence, whose gradient would be another: "
            "pass per='position', or fewer sequences"
        )


def _energy(layer: LayerCorrection | None) -> Energy:
    """Return Σ‖g‖²‖a‖² of the samples, which a rotation keeps."""
    return Energy(0.0 if layer is None else float(layer.sum.sum()), 1.0, 1)


def _described(layers: LayerSpec | None) -> str:
    return layers if isinstance(layers, str) else "basis" if layers is None else repr(layers)


def _checksum(basis: Eigenbasis, names: Iterable[str]) -> int:
    """Return a checksum of eigenvalues: of this basis, not another."""
    return checksum(v for name in names for v in (basis[name].values_g, basis[name].values_a))
