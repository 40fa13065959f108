"""collect_from(): measure the Kronecker factors where there is no training loop."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from curvfast.collection import Curvature
from curvfast.config import CollectConfig
from curvfast.core.factors import Factors
from curvfast.errors import InputError
from curvfast.fisher import label_gradient, sampled_gradient
from curvfast.layers import LayerSpec
from curvfast.progress import Bar
from curvfast.provenance import is_causal_lm, unwrap
from curvfast.rows import IGNORED_LABEL, Batch, RowRule, read_call

LABELS = ("sampled", "gold")


def collect_from(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | Tensor],
    layers: LayerSpec = "mlp",
    *,
    labels: str = "sampled",
    tokens: int | None = None,
    seed: int = 0,
    progress: bool = True,
    skip_last: bool | None = None,
    rows: RowRule | None = None,
    keep_mode: bool = False,
) -> Factors:
    """Measure A and G of linear layers over ``batches`` of data.

    Only gradients of activations are computed: none of weights, and none below the first chosen
    layer. Modes, ``requires_grad`` and the global random state are as before when it returns.

    Args:
        model: A model whose output is, or has, ``logits`` [..., classes] of a cross-entropy.
        batches: Keyword arguments of the model (``input_ids``, ``attention_mask``,
            ``pixel_values``, …; ``labels`` with ``labels="gold"``), or tensors passed as its one
            argument.
        layers: As in :func:`curvfast.collect`.
        labels: ``"sampled"`` draws them from the model's own distribution (the true Fisher, the
            paper's choice); ``"gold"`` takes the batch's ``labels``, or the next token.
        tokens: Stop once this many labels were counted; None takes every batch.
        seed: Seed of the generator that draws labels.
        progress: Whether a bar counts labels (on a terminal only).
        skip_last: As in :func:`curvfast.collect`.
        rows: As in :func:`curvfast.collect`.
        keep_mode: False measures in eval mode. transformers' models checkpoint activations in train
            mode alone: to measure under checkpointing, set train mode and pass True.

    Returns:
        The factors; G is of the summed loss.

    Raises:
        InputError: If an argument is out of range, ``batches`` is empty, or labels are missing.
        LayerNotFound: If ``layers`` matches nothing.
        CoverageError: If a chosen layer got no rows.
    """
    if labels not in LABELS:
        raise InputError(f"labels={labels!r}: pass 'sampled' (true Fisher) or 'gold' (empirical)")
    if tokens is not None and tokens < 1:
        raise InputError(f"tokens={tokens}: pass a positive number of labels, or None for all")
    config = CollectConfig(
        layers=layers if isinstance(layers, str) else repr(layers),
        loss_reduction="sum",
        skip_last=skip_last,
    )
    causal = is_causal_lm(model) if skip_last is None else skip_last
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    counted = 0
    with _frozen(model, keep_mode) as driven, Bar("collect", tokens, "label", progress) as bar:
        facts: dict[str, Any] = {"labels": labels, "seed": seed}
        curvature = Curvature(model, config, layers, rows=rows, driven=driven, facts=facts)
        try:
            for batch in batches:
                count = _step(model, _arguments(model, batch, device), labels, causal, generator)
                counted += count
                bar.advance(count)
                if tokens is not None and counted >= tokens:
                    break
        finally:
            curvature.close()
        if not counted:
            raise InputError(
                "batches gave no label to measure with: the iterable is empty (a generator is used "
                "up after one pass), or every position is masked"
            )
        curvature.add_facts(tokens=counted)
        return curvature.factors()


def _step(
    model: nn.Module,
    arguments: dict[str, Any],
    labels: str,
    causal: bool,
    generator: torch.Generator,
) -> int:
    """Run one batch forward and backward; return its labels. Nothing of it outlives the call."""
    gold = arguments.pop("labels", None)
    with torch.enable_grad():
        logits = _logits(model(**arguments))
    if labels == "sampled":
        index = _label_rows(arguments, logits, causal)
        gradient, count = sampled_gradient(logits, index, generator)
    else:
        gradient, count = label_gradient(logits, _gold(arguments, gold, logits, causal))
    edge = get_gradient_edge(logits)
    # The backward needs the node, not the values: a vocabulary's worth of logits is freed first.
    del logits
    torch.autograd.backward((edge,), (gradient,))
    return count


@contextmanager
def _frozen(model: nn.Module, keep_mode: bool) -> Iterator[bool]:
    """Freeze the parameters for a while; say whether no activation is recomputed."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    modes = [(module, module.training) for module in model.modules()]
    handle: RemovableHandle | None = None
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        if not keep_mode:
            model.eval()
        checkpointing = model.training and getattr(
            unwrap(model), "is_gradient_checkpointing", False
        )
        if checkpointing:
            # A checkpointed region passes gradients on only if one of its inputs asks for them.
            embedding = unwrap(model).get_input_embeddings()  # type: ignore[operator]
            handle = embedding.register_forward_hook(lambda _m, _a, y: y.requires_grad_())
        yield not checkpointing
    finally:
        if handle is not None:
            handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode


def _arguments(model: nn.Module, batch: Any, device: torch.device) -> dict[str, Any]:
    parameters = inspect.signature(unwrap(model).forward).parameters
    if isinstance(batch, Tensor):
        batch = {next(iter(parameters)): batch}
    if not isinstance(batch, Mapping):
        raise InputError(
            f"a batch is a {type(batch).__name__}; pass keyword arguments of the model, such as "
            "{'input_ids': ..., 'attention_mask': ...}, or a tensor that is its one argument"
        )
    arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    if "use_cache" in parameters:
        arguments.setdefault("use_cache", False)
    return arguments


def _logits(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if not isinstance(found, Tensor):
        raise InputError(
            f"the model returned {type(output).__name__} without logits, so no label can be drawn; "
            "use curvfast.collect() around a loop that computes its own loss"
        )
    return found


def _label_rows(arguments: Mapping[str, Any], logits: Tensor, causal: bool) -> Tensor | None:
    """Return the flattened positions whose prediction is scored, or None for all."""
    batch = Batch(skip_last=causal)
    read_call(batch, arguments)
    return batch.rows("the model's logits", _matching(batch, logits), logits.device).index


def _matching(batch: Batch, logits: Tensor) -> torch.Size:
    shape = logits.shape[:-1]
    if len(shape) == 1:
        # One prediction a sequence or image: its positions say nothing about which count.
        batch.mask, batch.skip_last = None, False
    return shape


def _gold(
    arguments: Mapping[str, Any], gold: Tensor | None, logits: Tensor, causal: bool
) -> Tensor:
    if gold is None and causal:
        gold = arguments.get("input_ids")
    if gold is None:
        raise InputError("labels='gold' needs 'labels' in every batch, or labels='sampled'")
    if not causal:
        return gold
    shifted = torch.full_like(gold, IGNORED_LABEL)
    shifted[:, :-1] = gold[:, 1:]
    index = _label_rows(arguments, logits, causal)
    if index is not None:
        scored = torch.zeros(shifted.numel(), dtype=torch.bool, device=shifted.device)
        scored[index] = True
        shifted = shifted.masked_fill(~scored.view(shifted.shape), IGNORED_LABEL)
    return shifted
