"""Observed forward passes: the activations of chosen layers, with the model restored after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.adapters import LinearLayer, Part, Product, watch
from curvfast.capture import no_autocast
from curvfast.errors import InputError, ShapeError
from curvfast.forward import forward_of
from curvfast.provenance import is_causal_lm
from curvfast.rows import Batch, Routed, RowRule, read_call
from curvfast.steps import frozen, model_arguments


@dataclass(frozen=True, eq=False)
class Seen:
    """The counted rows of one call of a layer."""

    layer: str
    rows: Tensor
    """[count, d], in the dtype of the activation."""
    texts: Tensor
    """int64 [count]: index of each row's text in the batch."""
    positions: Tensor
    """int64 [count]: position of each row in its text."""
    shape: tuple[int, int]
    """(texts, positions per text) of the batch."""


Run = Callable[[Any], int]
"""Runs the model on a batch; returns how many texts that has."""


@contextmanager
def watching(
    model: nn.Module,
    layers: Mapping[str, LinearLayer],
    on_rows: Callable[[Seen], None],
    *,
    outputs: bool = False,
    rows: RowRule | None = None,
    skip_last: bool | None = None,
) -> Iterator[Run]:
    """Observe the inputs or outputs of layers in forwards in eval mode.

    Args:
        model: Its modes and ``requires_grad`` are as before afterwards.
        layers: Layers by name.
        on_rows: Called with the rows of every call of a layer, inside the forward.
        outputs: Whether rows are the layers' outputs, bias included, instead of their inputs.
        rows: As in :func:`curvfast.collect`.
        skip_last: As in :func:`curvfast.collect`.

    Yields:
        A function that runs the model on one batch, as in :func:`curvfast.collect_from`.
    """
    skip = is_causal_lm(model) if skip_last is None else skip_last
    observer = _Observer(layers, on_rows, outputs)
    with frozen(model, keep_mode=False), torch.no_grad():
        handles = watch(layers.values(), observer)
        try:
            yield partial(_run, model, observer, rows, skip)
        finally:
            for handle in handles:
                handle.remove()


def _run(
    model: nn.Module, observer: _Observer, rule: RowRule | None, skip_last: bool, batch: Any
) -> int:
    arguments = model_arguments(model, batch, next(model.parameters()).device)
    arguments.pop("labels", None)
    if "logits_to_keep" in forward_of(model).names:
        # No logit is looked at: one a text is the fewest that a model can be asked for.
        arguments.setdefault("logits_to_keep", 1)
    texts = next((v.shape[0] for v in arguments.values() if isinstance(v, Tensor)), None)
    if texts is None:
        raise InputError("a batch holds no tensor; pass {'input_ids': ..., 'attention_mask': ...}")
    current = Batch(skip_last=skip_last, rule=rule)
    read_call(current, arguments)
    observer.current = current, texts
    try:
        model(**arguments)
    finally:
        observer.current = None
    return texts


class _Observer:
    """Passes the rows of observed products on while a batch runs."""

    def __init__(
        self, layers: Mapping[str, LinearLayer], on_rows: Callable[[Seen], None], outputs: bool
    ) -> None:
        self._layers, self._on_rows, self._outputs = layers, on_rows, outputs
        self.current: tuple[Batch, int] | None = None

    def idle(self) -> bool:
        return self.current is None

    def rest(self, layer: str) -> None:
        """Ignore an expert without tokens."""

    def see(self, product: Product) -> Tensor:
        if self.current is not None:
            for part in product.parts:
                activation = product.y if self._outputs else product.x
                with no_autocast(activation.device):
                    self._on_rows(self._seen(part, activation.detach(), *self.current))
        return product.y

    def _seen(self, part: Part, x: Tensor, batch: Batch, texts: int) -> Seen:
        layer = self._layers[part.layer]
        width = layer.d_out if self._outputs else layer.d_in
        if part.rows is not None:
            flat = x.reshape(-1, width)
            x = flat[part.rows if isinstance(part.rows, slice) else part.rows.to(x.device)]
        else:
            x = layer.gradients(x) if self._outputs else layer.inputs(x)
        of = x.shape[:-1]
        owner: Batch | Routed = batch
        if part.positions is not None and part.of is not None:
            of, owner = part.of, Routed(batch, part.positions, part.of)
        length, rest = divmod(of.numel(), texts)
        if rest:
            raise ShapeError(
                f"{part.layer!r} has {list(of)} rows, which do not divide over {texts} texts; "
                "leave the layer out of layers="
            )
        index = owner.rows(part.layer, x.shape[:-1], x.device).indices(x.device)
        where = index if part.positions is None else part.positions.to(x.device)[index]
        return Seen(
            part.layer, x.reshape(-1, width)[index], where // length, where % length,
            (texts, length),
        )  # fmt: skip
