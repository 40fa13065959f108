"""collect() and collect_from(): Kronecker factors of a training loop, or of data alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.collection.config import CollectConfig
from curvfast.collection.convergence import Converged
from curvfast.collection.curvature import Curvature
from curvfast.collection.driver import Pass, merged_provenance
from curvfast.collection.head import Said
from curvfast.collection.targets import LabelMask
from curvfast.distributed import group_of
from curvfast.errors import InputError
from curvfast.kfac.factors import Factors
from curvfast.model.identity import without_ddp
from curvfast.model.layers import LayerSpec, are_kinds, select
from curvfast.model.rows import RowRule


@contextmanager
def collect(
    model: nn.Module,
    layers: LayerSpec = "mlp",
    *,
    loss_reduction: str | None = None,
    loss_scale: float | None = None,
    grad_scaler: torch.amp.GradScaler | None = None,
    skip_last: bool | None = None,
    rows: RowRule | None = None,
    share_inputs: bool = True,
    spill_every: int | None = None,
    rows_per_step: float | None = None,
    every: int = 1,
    sums_device: str = "same",
    streams: str = "one",
    marginals: bool = False,
    seed: int = 0,
    on_nonfinite: str = "skip",
    strict: bool = False,
    group: Any = "auto",
) -> Iterator[Curvature]:
    """Measure A = E[a aᵀ] and G = E[g gᵀ] of linear layers while the caller trains.

    Nothing is changed: no module, attribute, gradient or random number. Inputs a are counted when
    their gradient g arrives, so both always hold the same rows, under activation checkpointing,
    gradient accumulation and repeated calls alike. Source: arXiv 2510.24256, K-FAC section.

    A row counts if its position is real and can reach a label: not a pad; in a causal token stream
    not after the last label of its row or document (without labels: not the last real position); in
    a decoder without a mask not after its last label that is not ignored. Positions before that
    count though unlabelled. In a stream that is not causal every real position counts.

    Nothing of that is guessed: what the model's call says is read, and the gradient proves it. A
    row that is left out has a gradient of exactly zero, one that counts reaches the input
    embedding, and the gradient of the logits shows the unit of the loss and whether a position
    predicts the next token. What is neither proven nor told is refused by ``factors()``, with what
    to pass.

    Args:
        model: The module the loop calls, or calls parts of; masks, positions and labels are read
            from its calls and those of its modules.
        layers: ``"mlp"``, ``"attention"``, ``"all"``, one or more globs on names, or a predicate.
            Every expert of a mixture is one layer: ``model.layers.0.mlp.experts.3.down_proj``.
        loss_reduction: G is always of the *summed* loss. None reads its unit off the gradient of
            the logits, whatever factors the loop applies: mean or sum, accumulation, processes,
            AMP's scale, ``num_items_in_batch``; that needs a cross-entropy of logits that the model
            returns or its output head makes. For any other loss: ``"sum"`` if it is summed over its
            labels, ``"mean"`` if it is averaged over the labels of the model's call, or call
            ``labels(n)`` before each batch whose loss is averaged over n.
        loss_scale: With ``loss_reduction`` or ``labels(n)``: any further factor of the loss, such
            as 1/n under gradient accumulation. None: 1, or what arrives at the loss the model
            returns.
        grad_scaler: The loop's ``GradScaler``; a step that it skips counts nowhere.
        skip_last: Whether position t predicts the token at t + 1, so that the last real position of
            each sequence reaches no label. None reads it off the gradient of the logits; where the
            loss is no cross-entropy of them, the model's class decides.
        rows: ``(layer name, leading shape) -> bool tensor``, replaces both rules for what else
            counts, such as the CLS token of a vision transformer. For an expert the shape is that
            of all tokens, and those count that were routed to it too.
        share_inputs: Whether layers fed by one tensor share one A.
        spill_every: After this many calls of a layer its float32 sum is added to a float64 one: for
            millions of rows, at three times the memory. None keeps float32.
        rows_per_step: Counts a uniform random subset of each batch's rows, at lower cost: a share
            below 1, or a number. The factors stay unbiased. None counts all.
        every: Counts one in ``every`` calls of the model; the others run unobserved.
        sums_device: ``"same"`` keeps the sums beside the activations, ``"cpu"`` in the host's
            memory, ``"disk"`` in files mapped to memory, in the system's temporary folder (TMPDIR)
            and gone with the process; copies run beside the computation.
        streams: ``"overlap"`` runs the moments on a separate CUDA stream, concurrently to the step.
        marginals: Sums Σ‖g‖² a aᵀ and Σ‖a‖² g gᵀ too, for :meth:`Eigenbasis.with_marginals`, at
            more than twice the memory and products: no layer shares these. G's units hold for ‖g‖.
        seed: Seed of the generator that draws ``rows_per_step``.
        on_nonfinite: What a NaN or infinity does: ``"skip"`` leaves the batch out, where its loss
            or logits are not finite, or of each layer that it reaches, and ``coverage()`` tells;
            ``"error"`` refuses the factors. Sums stay finite either way.
        strict: Whether what the gradients contradict, and is only warned of otherwise, is an error:
            curvature in rows that a mask of the call leaves out, and a unit that was told.
        group: Whose ranks' rows are added up when ``factors()`` is called, which every rank must
            then do: ``"auto"`` is the default process group where there is one, None this process
            alone. Nothing is sent before.

    Yields:
        The measurement: ``factors()``, ``coverage()``, ``mask()``, ``labels()``, ``paused()``.

    Raises:
        LayerNotFound: If ``layers`` matches nothing, names what is not supported (the message says
            why), or a layer with a tied weight.
        CoverageError: In a forward, if it shows no chosen layer, or the products of a mixture's
            experts cannot be followed.
        InputError: If an argument is out of range.
    """
    config = CollectConfig(
        layers=layers if isinstance(layers, str) else repr(layers),
        loss_reduction=loss_reduction,
        loss_scale=loss_scale,
        skip_last=skip_last,
        share_inputs=share_inputs,
        spill_every=spill_every,
        rows_per_step=rows_per_step,
        every=every,
        sums_device=sums_device,
        streams=streams,
        marginals=marginals,
        seed=seed,
        on_nonfinite=on_nonfinite,
        strict=strict,
    )
    curvature = Curvature(
        model, config, layers, rows=rows, grad_scaler=grad_scaler, group=group_of(group),
        facts={"labels": "caller's loss"},
    )  # fmt: skip
    try:
        yield curvature
    finally:
        curvature.close()


CONVERGED = "converged"


def collect_from(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | Tensor],
    layers: LayerSpec = "mlp",
    *,
    labels: str = "sampled",
    likelihood: str | None = None,
    class_axis: int | None = None,
    label_mask: LabelMask | None = None,
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
        model: A model whose output is, or has, ``logits``.
        batches: Keyword arguments of the model (``input_ids``, ``attention_mask``,
            ``pixel_values``, …; ``labels`` with ``labels="gold"``), or tensors passed as its one
            argument. What a method ``provenance()`` of it returns, JSON-able, is kept with the
            factors as "data" (:func:`curvfast.data.text_batches` has one).
        layers: As in :func:`curvfast.collect`.
        labels: ``"sampled"`` draws them from the model's own distribution (the true Fisher, the
            paper's choice); ``"gold"`` takes the batch's ``labels``, or the next token; ``"exact"``
            sums over all labels, a backward for each class and position, at most 64 a batch. All
            are of predictions of real positions whose label in the batch, if it has any, is not
            -100. An encoder-decoder's input is made of its labels as the model itself does.
        likelihood: What the outputs parametrise: ``"softmax"``, ``"bernoulli"`` (independent
            labels, binary cross-entropy with logits) or ``"normal"`` (regression, ½(y − f)²). None
            asks the model: ``config.problem_type``, or ``num_labels`` = 1 for a regression. The
            provenance says which, and who said so.
        class_axis: Axis of the classes of a softmax, -1 or 1; None asks the model, labels and
            inputs.
        label_mask: Which predictions get a label, besides: the name of a bool tensor of the labels'
            shape in every batch, or a function from a batch to one.
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
        InputError: If an argument is out of range, ``batches`` is empty, labels are missing or not
            of the likelihood, or nothing says which likelihood the model has.
        ShapeError: If labels or masks do not describe the predictions.
        LayerNotFound: If ``layers`` matches nothing.
        CoverageError: If a chosen layer got no rows; after the first batch, if a layer chosen by
            name was never called (chosen by kind it is left out, with a warning).
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
    model, rule = without_ddp(model), _rule(until)
    data = Pass(
        model=model, batches=batches, layers=select(model, layers),
        skip_last=skip_last, labels=labels, said=Said(likelihood, class_axis),
        label_mask=label_mask, by_kind=are_kinds(layers),
        tokens=tokens, seed=seed, progress=progress, keep_mode=keep_mode,
        layers_per_pass=layers_per_pass, checkpoint=checkpoint, every=every,
        group=group_of(group), identity={"config": config.to_dict()}, until=rule,
    )  # fmt: skip
    begin = partial(Curvature, model, config, rows=rows, halves=rule is not None)
    results = [curvature.factors() for curvature in data.measure(begin)]
    provenance = merged_provenance([factors.provenance for factors in results], batches)
    return Factors({n: f for factors in results for n, f in factors.items()}, provenance)


def _rule(until: str | Converged | None) -> Converged | None:
    if not isinstance(until, str):
        return until
    if until != CONVERGED:
        raise InputError(f"until={until!r}: pass 'converged', a Converged(...), or None")
    return Converged()
