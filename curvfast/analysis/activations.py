"""Observed forward passes: activations of chosen layers, and their sums over each text."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.collection.hooks import no_autocast
from curvfast.display import Bar
from curvfast.errors import CoverageError, InputError, ShapeError
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.kfac.layer_basis import StoredBasis
from curvfast.model.batch import Batch
from curvfast.model.families import LinearLayer, Part, Product, watch
from curvfast.model.forward import forward_of, frozen, model_arguments
from curvfast.model.identity import is_causal_lm
from curvfast.model.rows import RowRule
from curvfast.model.token_streams import TokenStreams


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
    streams = TokenStreams(model, layers.values())
    observer = _Observer(layers, on_rows, outputs, streams)
    with frozen(model, keep_mode=False), torch.no_grad():
        streams.attach()
        handles = watch(layers.values(), observer)
        try:
            yield partial(_run, model, observer, rows, skip)
        finally:
            streams.remove()
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
    observer.current = Batch(skip_last=skip_last, rule=rule), texts
    try:
        model(**arguments)
    finally:
        observer.current = None
    return texts


class _Observer:
    """Passes the rows of observed products on while a batch runs."""

    def __init__(
        self,
        layers: Mapping[str, LinearLayer],
        on_rows: Callable[[Seen], None],
        outputs: bool,
        streams: TokenStreams,
    ) -> None:
        self._layers, self._on_rows, self._outputs = layers, on_rows, outputs
        self._streams = streams
        self.current: tuple[Batch, int] | None = None

    def paused(self) -> bool:
        return self.current is None

    def on_no_tokens(self, layer: str) -> None:
        """Ignore an expert without tokens."""

    def on_transformed(self, layer: str) -> None:
        """Ignore a call inside a transform: it is none of the batch's own."""

    def on_unread(self, layer: str, reason: str) -> None:
        raise CoverageError(f"{layer!r} cannot be read: {reason}")

    def on_product(self, product: Product) -> Tensor:
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
        frame = self._streams.current()
        if part.positions is not None and part.of is not None:
            of = part.of
            owner = batch.routed_rows(part.layer, part.positions, of, frame)
        else:
            owner = batch.call_rows(part.layer, x, frame)
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


Values = Callable[[str, Tensor], Tensor]
"""(layer name, rows [count, d]) -> [count, width]: the values to sum over rows."""


def text_sums(
    model: nn.Module,
    layers: Mapping[str, LinearLayer],
    batches: Iterable[Any],
    values: Values,
    *,
    last: bool = False,
    outputs: bool = False,
    rows: RowRule | None = None,
    skip_last: bool | None = None,
    title: str = "texts",
    progress: bool = True,
) -> dict[str, Tensor]:
    """Sum values over the rows of each text.

    Args:
        model: The model; its modes and ``requires_grad`` are restored.
        layers: Layers by name.
        batches: Batches, as in :func:`curvfast.collect_from`.
        values: Computes the values to sum.
        last: Whether only the last counted row of each text is summed (of an expert: the last that
            was routed to it).
        outputs: Whether rows are the layers' outputs, bias included, instead of their inputs.
        rows: Row rule, as in :func:`curvfast.collect`.
        skip_last: Whether the last real position of each text is left out; None: for causal models.
        title: Title of the progress bar.
        progress: Whether a bar counts texts (on a terminal only).

    Returns:
        For each layer float64 [texts, width], on the CPU, in the order of ``batches``.

    Raises:
        InputError: If there is no text.
        CoverageError: If a layer got no row.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    counted = dict.fromkeys(layers, 0)
    current: dict[str, Tensor] = {}

    def add(seen: Seen) -> None:
        own, texts = seen.rows, seen.texts
        if last:
            latest = texts.new_zeros(seen.shape[0])
            latest.scatter_reduce_(0, texts, seen.positions, "amax")
            own, texts = (v[seen.positions == latest[texts]] for v in (own, texts))
        row_values = values(seen.layer, own).double()
        if seen.layer not in current:
            current[seen.layer] = row_values.new_zeros(seen.shape[0], row_values.shape[1])
        current[seen.layer].index_add_(0, texts, row_values)
        counted[seen.layer] += len(own)

    with (
        watching(model, layers, add, outputs=outputs, rows=rows, skip_last=skip_last) as run,
        Bar(title, None, "text", progress) as bar,
    ):
        for batch in batches:
            texts = run(batch)
            for name, parts in found.items():
                sums = current.pop(name, None)
                none = torch.zeros(texts, 0, dtype=torch.float64, device="cpu")
                parts.append(none if sums is None else sums.cpu())
            bar.advance(texts)
    _require(found, counted)
    return {name: _joined(parts) for name, parts in found.items()}


def readers(basis: Eigenbasis, names: Iterable[str]) -> dict[str, str]:
    """Return, for each layer, the first of the layers that share its A, and so read one tensor."""
    first: dict[Hashable, str] = {}
    return {name: first.setdefault(basis[name].key_a, name) for name in names}


class Vectors:
    """A cache of eigenvectors on their device; those of a lazy basis are read at each use."""

    def __init__(self, basis: Eigenbasis, *, of_outputs: bool) -> None:
        """Choose the side: eigenvectors of A, or of G for outputs."""
        self._basis = basis
        self._leaf = "vectors_g" if of_outputs else "vectors_a"
        self._moved: dict[str, Tensor] = {}

    def of(self, layer: str, device: torch.device) -> Tensor:
        """Return a layer's eigenvectors, float32 [d, known]."""
        known = self._moved.get(layer)
        if known is None or known.device != device:
            basis = self._basis[layer]
            known = getattr(basis, self._leaf).to(device)
            if not isinstance(basis, StoredBasis):
                self._moved[layer] = known
        return known


def _require(found: Mapping[str, list[Tensor]], counted: Mapping[str, int]) -> None:
    if not any(len(part) for parts in found.values() for part in parts):
        raise InputError(
            "batches hold no text: the iterable is empty (a generator is used up after one pass)"
        )
    empty = [name for name, rows in counted.items() if not rows]
    if empty:
        raise CoverageError(
            f"no row of {', '.join(map(repr, empty))} counts: the forward does not call it, no "
            "token was routed to it, or every position is masked; leave it out of layers="
        )


def _joined(parts: list[Tensor]) -> Tensor:
    """Join the batches of one layer; a batch without rows of it has no width yet."""
    width = max(part.shape[1] for part in parts)
    return torch.cat(
        [part if part.shape[1] else part.new_zeros(len(part), width) for part in parts]
    )
