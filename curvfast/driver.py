"""collect_from(): measure the Kronecker factors where there is no training loop."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.adapters import LinearLayer
from curvfast.checkpoint import Checkpoint
from curvfast.config import CollectConfig
from curvfast.convergence import Converged
from curvfast.core.factors import Factors, LayerFactors
from curvfast.curvature import Curvature
from curvfast.distributed import group_of, local, rank_and_size
from curvfast.errors import InputError
from curvfast.layers import LayerSpec, select
from curvfast.passes import Pass
from curvfast.progress import Bar
from curvfast.provenance import is_causal_lm, without_ddp
from curvfast.rows import RowRule
from curvfast.steps import frozen

LABELS = ("sampled", "gold")
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
        until: ``"converged"``, or :class:`curvfast.Converged` with figures of your own: stop once
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
    rule = _check(labels, tokens, until, every, layers_per_pass)
    config = CollectConfig(
        layers=layers if isinstance(layers, str) else repr(layers),
        loss_reduction="sum",
        skip_last=skip_last,
        rows_per_step=rows_per_step,
        sums_device=sums_device,
        streams=streams,
        seed=seed,
    )
    ranks = group_of(group)
    rank, world = rank_and_size(ranks)
    tokens = tokens and -(-tokens // world)
    model = without_ddp(model)
    causal = is_causal_lm(model) if skip_last is None else skip_last
    device = next(model.parameters()).device
    chunks = list(_chunks(select(model, layers), layers_per_pass))
    if len(chunks) > 1 and iter(batches) is batches:
        raise InputError(
            f"{len(chunks)} passes need batches that can be read again: pass a list, a DataLoader "
            "or text_batches(), not a generator, or leave layers_per_pass= out"
        )
    results = []
    for number, chosen in enumerate(chunks):
        generator = torch.Generator(device).manual_seed(seed + rank)
        facts = {"labels": labels, "seed": seed}
        identity = {
            **facts, "tokens": tokens, "config": config.to_dict(), "pass": number,
            "until": rule and asdict(rule), "layers": list(chosen), "weights": _checksum(chosen),
        }  # fmt: skip
        part = f"pass-{number}" + (f"-rank-{rank}-of-{world}" if world > 1 else "")
        state = Checkpoint(Path(checkpoint) / part, identity) if checkpoint else None
        with frozen(model, keep_mode) as driven, Bar("collect", tokens, "label", progress) as bar:
            curvature = Curvature(
                model, config, _these(chosen), rows=rows, driven=driven, halves=rule is not None,
                group=ranks, one_of_many=len(chunks) > 1, facts=facts,
            )  # fmt: skip
            try:
                work = Pass(
                    model, curvature, labels, causal, generator, tokens, rule, state, every, ranks
                )
                results.append(work.run(batches, bar))
            finally:
                curvature.close()
    return _merged(results, batches)


def _check(
    labels: str,
    tokens: int | None,
    until: str | Converged | None,
    every: int,
    layers_per_pass: int | None,
) -> Converged | None:
    if labels not in LABELS:
        raise InputError(f"labels={labels!r}: pass 'sampled' (true Fisher) or 'gold' (empirical)")
    if tokens is not None and tokens < 1:
        raise InputError(f"tokens={tokens}: pass a positive number of labels, or None for all")
    if every < 1:
        raise InputError(f"every={every}: pass the number of batches between two checkpoints")
    if layers_per_pass is not None and layers_per_pass < 1:
        raise InputError(f"layers_per_pass={layers_per_pass}: pass a number of layers, or None")
    if isinstance(until, str):
        if until != CONVERGED:
            raise InputError(f"until={until!r}: pass 'converged', a Converged(...), or None")
        return Converged()
    return until


def _chunks(layers: dict[str, LinearLayer], size: int | None) -> Iterator[dict[str, LinearLayer]]:
    names = list(layers)
    for start in range(0, len(names), size or len(names)):
        yield {name: layers[name] for name in names[start : start + (size or len(names))]}


def _these(layers: dict[str, LinearLayer]) -> LayerSpec:
    return lambda name, _: name in layers


def _checksum(layers: dict[str, LinearLayer]) -> int:
    """Return a checksum of the first numbers of each weight: of these weights, not others."""
    found = 0
    for layer in layers.values():
        start = local(layer.stored()).flatten()[:256].float().cpu()
        found = zlib.crc32(start.numpy().tobytes(), found)
    return found


def _merged(results: list[Factors], batches: Any) -> Factors:
    layers: dict[str, LayerFactors] = {}
    for factors in results:
        layers |= factors.layers
    provenance = dict(results[0].provenance)
    if len(results) > 1:
        provenance["passes"] = [dict(factors.provenance) for factors in results]
        provenance["unrouted"] = [n for f in results for n in f.provenance["unrouted"]]
    describe = getattr(batches, "provenance", None)
    if callable(describe):
        provenance["data"] = describe()
    return Factors(layers, provenance)
