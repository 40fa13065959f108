"""collect_from(): measure Kronecker factors on data, without a training loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

from torch import Tensor, nn

from curvfast.adapters import LinearLayer
from curvfast.config import CollectConfig
from curvfast.convergence import Converged
from curvfast.core.factors import Factors
from curvfast.curvature import Curvature
from curvfast.distributed import group_of
from curvfast.driving import Drive, merged_provenance
from curvfast.errors import InputError
from curvfast.layers import LayerSpec, select
from curvfast.provenance import is_causal_lm, without_ddp
from curvfast.rows import RowRule

CONVERGED = "converged"


def collect_from(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | Tensor],
    layers: LayerSpec = "mlp",
    *,
    labels: str = "sampled",
    tokens: int | None = None,
    until: str | Converged | None = None,
    seed: int = 0,
    progress: bool = True,
    skip_last: bool | None = None,
    rows: RowRule | None = None,
    rows_per_step: float | None = None,
    keep_mode: bool = False,
    sums_device: str = "same",
    streams: str = "one",
    marginals: bool = False,
    layers_per_pass: int | None = None,
    checkpoint: str | PathLike[str] | None = None,
    every: int = 50,
    group: Any = "auto",
) -> Factors:
    """Measure A and G of linear layers over ``batches`` of data.

    Only gradients of activations are computed: none of weights, and none below the first chosen
    layer. Modes, ``requires_grad`` and the global random state are as before when it returns.

    Args:
        model: A model whose output is, or has, ``logits`` [..., classes] of a cross-entropy.
        batches: Keyword arguments of the model (``input_ids``, ``attention_mask``,
            ``pixel_values``, …; ``labels`` with ``labels="gold"``), or tensors passed as its one
            argument. What a method ``provenance()`` of it returns, JSON-able, is kept with the
            factors as "data" (:func:`curvfast.data.text_batches` has one).
        layers: As in :func:`curvfast.collect`.
        labels: ``"sampled"`` draws them from the model's own distribution (the true Fisher, the
            paper's choice); ``"gold"`` takes the batch's ``labels``, or the next token.
        tokens: Stop once this many labels were counted; None takes every batch.
        until: ``"converged"``, or :class:`curvfast.Converged` with other thresholds: stop once
            the two halves of the batches agree on every layer. They are compared at growing
            intervals, each a decomposition of all factors, and need twice the memory; the curve is
            kept in the provenance as "convergence".
        seed: Seed of the generators that draw labels and rows.
        progress: Whether a bar counts labels (on a terminal only).
        skip_last: As in :func:`curvfast.collect`.
        rows: As in :func:`curvfast.collect`.
        rows_per_step: As in :func:`curvfast.collect`.
        keep_mode: False measures in eval mode. transformers' models checkpoint activations in train
            mode alone: to measure under checkpointing, set train mode and pass True.
        sums_device: As in :func:`curvfast.collect`.
        streams: As in :func:`curvfast.collect`.
        marginals: As in :func:`curvfast.collect`; the inputs of the layers measured are then held
            until their gradients arrive.
        layers_per_pass: Measures so many layers at a time, in as many passes over ``batches``, with
            the same labels in each: where the sums of all do not fit.
        checkpoint: Folder where the state is kept while measuring. Called again with the same
            arguments after a crash, it goes on from there: bit for bit what one run would have
            given, on the CPU. Batches counted before are skipped, or by the ``state_dict`` and
            ``load_state_dict`` of ``batches`` where it has them not even read.
        every: With ``checkpoint``: batches between two states.
        group: As in :func:`curvfast.collect`: every rank passes batches of its own, as many as it
            has, and gets the factors of all. ``tokens`` is then split evenly among the ranks.

    Returns:
        The factors; G is of the summed loss.

    Raises:
        InputError: If an argument is out of range, ``batches`` is empty, or labels are missing.
        LayerNotFound: If ``layers`` matches nothing.
        CoverageError: If a chosen layer got no rows.
        StorageError: If the checkpoint is foreign, damaged, or of another collection.
        DistributedError: If another rank is gone.
    """
    config = CollectConfig(
        layers=layers if isinstance(layers, str) else repr(layers),
        loss_reduction="sum",
        skip_last=skip_last,
        rows_per_step=rows_per_step,
        sums_device=sums_device,
        streams=streams,
        marginals=marginals,
        seed=seed,
    )
    drive = Drive(
        labels=labels, tokens=tokens, seed=seed, progress=progress, keep_mode=keep_mode,
        layers_per_pass=layers_per_pass, checkpoint=checkpoint, every=every,
        group=group_of(group), until=_rule(until),
    )  # fmt: skip
    model = without_ddp(model)

    def begin(these: dict[str, LinearLayer], driven: bool, one_of_many: bool) -> Curvature:
        return Curvature(
            model, config, lambda name, _: name in these, rows=rows, driven=driven,
            halves=drive.until is not None, group=drive.group, one_of_many=one_of_many,
            facts=drive.facts,
        )  # fmt: skip

    causal = is_causal_lm(model) if skip_last is None else skip_last
    chosen, identity = select(model, layers), {"config": config.to_dict()}
    passes = drive.passes(model, batches, chosen, causal, begin, identity)
    results = [curvature.factors() for curvature in passes]
    provenance = merged_provenance([factors.provenance for factors in results], batches)
    return Factors({n: f for factors in results for n, f in factors.items()}, provenance)


def _rule(until: str | Converged | None) -> Converged | None:
    if not isinstance(until, str):
        return until
    if until != CONVERGED:
        raise InputError(f"until={until!r}: pass 'converged', a Converged(...), or None")
    return Converged()
