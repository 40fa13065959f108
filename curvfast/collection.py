"""collect(): measure the Kronecker factors of a model inside anyone's training loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from curvfast.config import CollectConfig
from curvfast.curvature import Curvature
from curvfast.distributed import group_of
from curvfast.layers import LayerSpec
from curvfast.rows import RowRule


@contextmanager
def collect(
    model: nn.Module,
    layers: LayerSpec = "mlp",
    *,
    loss_reduction: str = "mean",
    loss_scale: float | None = 1.0,
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
    group: Any = "auto",
) -> Iterator[Curvature]:
    """Measure A = E[a aᵀ] and G = E[g gᵀ] of linear layers while the caller trains.

    Nothing is changed: no module, attribute, gradient or random number. Inputs a are counted when
    their gradient g arrives, so both always hold the same rows, under activation checkpointing,
    gradient accumulation and repeated calls alike. Source: arXiv 2510.24256, K-FAC section.

    Args:
        model: The module the loop calls; its ``attention_mask`` and ``labels`` are read from the
            call.
        layers: ``"mlp"``, ``"attention"``, ``"all"``, one or more globs on names, or a predicate.
            Every expert of a mixture is one layer: ``model.layers.0.mlp.experts.3.down_proj``.
        loss_reduction: ``"mean"`` if the loss is averaged over its labels, ``"sum"`` if summed. G
            is always of the *summed* loss.
        loss_scale: Any further factor of the loss, such as 1/n under gradient accumulation. None
            reads it off the gradient that arrives at the loss the model returns, whatever factors
            the loop applies: accumulation, processes, AMP's scale, ``num_items_in_batch``.
        grad_scaler: The loop's ``GradScaler``; its scale is divided out, overflowed steps left out.
        skip_last: Whether the last real position of each sequence is left out (no label scores it);
            None means: for causal language models.
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
        group: Whose ranks' rows are added up when ``factors()`` is called, which every rank must
            then do: ``"auto"`` is the default process group where there is one, None this process
            alone. Nothing is sent before.

    Yields:
        The measurement: ``factors()``, ``coverage()``, ``mask()``, ``labels()``.

    Raises:
        LayerNotFound: If ``layers`` matches nothing, names what is not supported (the message says
            why), or a layer with a tied weight.
        CoverageError: In a forward, if the products of a mixture's experts cannot be followed.
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
    )
    curvature = Curvature(
        model, config, layers, rows=rows, grad_scaler=grad_scaler, group=group_of(group),
        facts={"labels": "caller's loss"},
    )  # fmt: skip
    try:
        yield curvature
    finally:
        curvature.close()
