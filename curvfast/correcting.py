"""correct() and collect_corrections(): measure the EK-FAC correction of an eigenbasis."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.adapters import LinearLayer
from curvfast.config import CollectConfig
from curvfast.core.corrections import POSITION, READINGS, SEQUENCE, Corrections
from curvfast.core.eigenbasis import Eigenbasis
from curvfast.correction import Correction
from curvfast.distributed import group_of
from curvfast.driving import Drive, merged_provenance
from curvfast.errors import InputError
from curvfast.layers import LayerSpec, basis_layers
from curvfast.provenance import is_causal_lm, without_ddp
from curvfast.rows import RowRule
from curvfast.storage import checksum


def correct(
    model: nn.Module,
    basis: Eigenbasis,
    batches: Iterable[Mapping[str, Any] | Tensor],
    layers: LayerSpec | None = None,
    *,
    labels: str = "sampled",
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

    Where K-FAC takes λᵢ μⱼ for the curvature of an eigenpair, this measures it, in a second pass
    over data. Source: George et al., arXiv 1806.03884, the scaling S*. Only gradients of
    activations are computed. Modes, ``requires_grad`` and the global random state are as before
    when it returns. :meth:`Eigenbasis.with_marginals` needs no such pass.

    A layer needs 4·(d_out·d_in + d_out² + d_in²) bytes, for its sum and its eigenvectors; a call
    4·(d_out + d_in) bytes a row more, and its input is held until its gradient arrives.

    Args:
        model: The model the basis was measured on; as in :func:`curvfast.collect_from`.
        basis: From :meth:`Factors.eigh`. Of one that holds leading eigenvectors only, the leading
            block of Λ is measured.
        batches: As in :func:`curvfast.collect_from`.
        layers: Which layers of the basis, as in :func:`curvfast.collect`; None means all.
        labels: As in :func:`curvfast.collect_from`.
        tokens: Stop once this many labels were counted; None takes every batch.
        per: What a sample is. ``"position"``: E[(uᵢᵀg)² (vⱼᵀa)²] over counted rows, K-FAC's own
            reading, one product of squares a call. ``"sequence"``: the squared gradient of a whole
            sequence, E[(Σ_t uᵢᵀg_t vⱼᵀa_t)²], as the empirical Fisher of sequences has it; a
            sequence is a row of the model's input, or where an activation does not flatten that,
            an entry of its leading dimension. It costs a product for each sequence.
        seed: Seed of the generators that draw labels and rows.
        progress: Whether a bar counts labels (on a terminal only).
        skip_last: As in :func:`curvfast.collect`.
        rows: As in :func:`curvfast.collect`.
        rows_per_step: As in :func:`curvfast.collect`; with ``per="position"`` only.
        spill_every: As in :func:`curvfast.collect`.
        keep_mode: As in :func:`curvfast.collect_from`.
        layers_per_pass: As in :func:`curvfast.collect_from`: the sums and eigenvectors of so many
            layers are in memory at a time.
        checkpoint: As in :func:`curvfast.collect_from`.
        every: With ``checkpoint``: batches between two states.
        group: As in :func:`curvfast.collect_from`.

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
    drive = Drive(
        labels=labels, tokens=tokens, seed=seed, progress=progress, keep_mode=keep_mode,
        layers_per_pass=layers_per_pass, checkpoint=checkpoint, every=every, group=group_of(group),
    )  # fmt: skip

    def begin(these: dict[str, LinearLayer], driven: bool, one_of_many: bool) -> Correction:
        return Correction(
            model, config, basis, these, per, rows=rows, driven=driven, group=drive.group,
            one_of_many=one_of_many, facts=drive.facts,
        )  # fmt: skip

    causal = is_causal_lm(model) if skip_last is None else skip_last
    identity = {"config": config.to_dict(), "per": per, "basis": _checksum(basis, chosen)}
    passes = drive.passes(model, batches, chosen, causal, begin, identity)
    results = [correction.corrections() for correction in passes]
    provenance = merged_provenance([each.provenance for each in results], batches)
    return Corrections({n: c for r in results for n, c in r.layers.items()}, per, provenance)


@contextmanager
def collect_corrections(
    model: nn.Module,
    basis: Eigenbasis,
    layers: LayerSpec | None = None,
    *,
    per: str = POSITION,
    loss_reduction: str = "mean",
    loss_scale: float | None = 1.0,
    grad_scaler: torch.amp.GradScaler | None = None,
    skip_last: bool | None = None,
    rows: RowRule | None = None,
    spill_every: int | None = None,
    rows_per_step: float | None = None,
    every: int = 1,
    seed: int = 0,
    group: Any = "auto",
) -> Iterator[Correction]:
    """Measure Λ as :func:`correct` does, while the caller runs a loop of their own.

    Nothing is changed: no module, attribute, gradient or random number. The basis should be of the
    weights the loop has: one that trains them further makes it an older model's.

    Args:
        model: As in :func:`curvfast.collect`.
        basis: As in :func:`correct`.
        layers: Which layers of the basis; None means all.
        per: As in :func:`correct`.
        loss_reduction: As in :func:`curvfast.collect`.
        loss_scale: As in :func:`curvfast.collect`.
        grad_scaler: As in :func:`curvfast.collect`.
        skip_last: As in :func:`curvfast.collect`.
        rows: As in :func:`curvfast.collect`.
        spill_every: As in :func:`curvfast.collect`.
        rows_per_step: As in :func:`correct`.
        every: As in :func:`curvfast.collect`.
        seed: Seed of the generator that draws ``rows_per_step``.
        group: As in :func:`curvfast.collect`; ranks meet when ``corrections()`` is called.

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
        seed=seed,
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


def _described(layers: LayerSpec | None) -> str:
    return layers if isinstance(layers, str) else "basis" if layers is None else repr(layers)


def _checksum(basis: Eigenbasis, names: Iterable[str]) -> int:
    """Return a checksum of eigenvalues: of this basis, not another."""
    return checksum(v for name in names for v in (basis[name].values_g, basis[name].values_a))
