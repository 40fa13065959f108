"""Per-text sums over tokens, layer by layer: the accumulator of all forward-only analyses."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.adapters import LinearLayer
from curvfast.analysis.watching import Seen, watching
from curvfast.core.eigenbasis import Eigenbasis
from curvfast.core.layer_basis import StoredBasis
from curvfast.errors import CoverageError, InputError
from curvfast.progress import Bar
from curvfast.rows import RowRule

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
