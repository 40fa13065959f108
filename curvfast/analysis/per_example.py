"""Per-example losses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.collection.step import gold_labels
from curvfast.display import Bar
from curvfast.errors import InputError
from curvfast.model.forward import frozen, logits_of, model_arguments
from curvfast.model.identity import is_causal_lm
from curvfast.model.rows import IGNORED_LABEL


def example_losses(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | Tensor],
    *,
    skip_last: bool | None = None,
    progress: bool = True,
) -> Tensor:
    """Return the loss of each example: the mean cross-entropy, in nats, over its labels.

    Modes, gradients and the global random state are as before.

    Args:
        model: The model, as in :func:`curvfast.collect_from`; in eval mode meanwhile.
        batches: As in :func:`curvfast.collect_from`, an example being an entry of the leading
            dimension. ``labels`` may be missing for causal language models: the next tokens are.
        skip_last: As in :func:`curvfast.collect`.
        progress: Whether a bar counts examples (on a terminal only).

    Returns:
        float64 [examples], on the CPU, in the order of ``batches``.

    Raises:
        InputError: If there is no example, labels are missing, or an example has none.
    """
    causal = is_causal_lm(model) if skip_last is None else skip_last
    found = []
    with (
        frozen(model, keep_mode=False),
        torch.no_grad(),
        Bar("losses", None, "example", progress) as bar,
    ):
        for batch in batches:
            arguments, gold = split_labels(model, batch)
            logits = logits_of(model(**arguments))
            losses = mean_losses(logits, gold_labels(arguments, gold, logits, causal))
            found.append(losses.double().cpu())
            bar.advance(len(losses))
    return joined(found)


def mean_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy over the labels of each example.

    Args:
        logits: [examples, ..., classes], any float dtype; in float32 at least from here on.
        labels: int64 [examples, ...]; -100 where there is none.

    Returns:
        [examples], differentiable.

    Raises:
        InputError: If an example has no label.
    """
    counts = labels.flatten(1).ne(IGNORED_LABEL).sum(1) if labels.dim() > 1 else labels.ne(-100)
    if not counts.all():
        raise InputError(
            f"example {int(counts.logical_not().nonzero()[0])} of a batch has no label, so it has "
            "no loss: give it one that is not -100, or leave the example out"
        )
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    each = nn.functional.cross_entropy(
        wide, labels.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
    )
    return each.view(len(labels), -1).sum(1) / counts


def split_labels(model: nn.Module, batch: Any) -> tuple[dict[str, Any], Tensor | None]:
    """Return the model's arguments without labels, and the labels.

    Raises:
        InputError: If the batch is no mapping or tensor the model can be called with.
    """
    arguments = model_arguments(model, batch, next(model.parameters()).device)
    return arguments, arguments.pop("labels", None)


def joined(parts: list[Tensor]) -> Tensor:
    """Concatenate batches of examples.

    Raises:
        InputError: If there is none.
    """
    if not sum(map(len, parts)):
        raise InputError(
            "batches hold no example: the iterable is empty (a generator is used up after one pass)"
        )
    return torch.cat(parts)
