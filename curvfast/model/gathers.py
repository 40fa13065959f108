"""Gathers: the positions of rows that were picked by an index, read off the autograd graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Nodes whose output rows are their input rows, in order, as far as their number stays the same.
_KEEPS_ROWS = frozenset(
    f"{name}Backward{number}"
    for number in (0, 1)
    for name in (
        "Add Addcmul Addmm Alias AsStrided Clamp Clone Copy Div Dropout Elu Erf Exp Expand "
        "ExpandAs Gelu Glu HardSwish Hardswish LeakyRelu Linear Log Logit Mean Mish Mm Mul "
        "MulScalar NativeDropout NativeLayerNorm Neg Pow Relu ReshapeAlias Rsqrt Rsub Sigmoid Silu "
        "Sin Softmax Softplus Split SplitWithSizes Sqrt Squeeze Sub Sum Tanh Threshold ToCopy "
        "Unsafe UnsafeSplit UnsafeView Unsqueeze View WhereSelf Where Slice Select FusedRmsNorm "
        "LogSoftmax Chunk Abs MaskedFill"
    ).split()
)
_RESIDUAL = frozenset(("AddBackward0", "AddBackward1"))
_MOST_NODES = 64

Sizes = tuple[int, ...]
Explain = Callable[[torch.Size], Tensor | None]
"""Leading shape -> flat positions of a grid, int64 [*shape], or None if it is not of the grid."""


class Hidden(Exception):
    """What the graph saved cannot be looked at now: a checkpointed forward keeps nothing."""


def gathered_positions(x: Tensor, explain: Explain, *, inside: bool = False) -> Tensor | None:
    """Return the flat position of each row of x [..., d], int64 [rows], or None if not known.

    The graph is followed from x back to the nearest operations that pick rows by an index; all
    that are found must agree.

    Args:
        x: Rows; without a graph nothing is known.
        explain: Which positions rows that were picked from stand for.
        inside: Whether this is a recomputation, whose graph goes on in that of another checkpointed
            region: to read what that saved would recompute it. Residual sums lead there.

    Raises:
        Hidden: If the forward is one of a checkpoint, whose index only a recomputation shows.
    """
    if x.grad_fn is None:
        return None
    if checkpointed():
        raise Hidden
    keeps = _KEEPS_ROWS - _RESIDUAL if inside else _KEEPS_ROWS
    found = _picked(x.grad_fn, x.shape[:-1].numel(), explain, keeps)
    if not found:
        return None
    first = found[0]
    agree = all(_equal(first, other) for other in found[1:])
    return first if agree else None


def from_parameters_only(x: Tensor) -> bool:
    """Return whether x is made of parameters alone: a table, such as of relative positions.

    Args:
        x: Any tensor.
    """
    node = x.grad_fn
    if node is None:
        return isinstance(x, torch.nn.Parameter)
    todo: list[Any] = [node]
    seen: set[Any] = set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if len(seen) > _MOST_NODES:
            return False
        name = node.name()
        if "AccumulateGrad" in name:
            if not isinstance(node.variable, torch.nn.Parameter):
                return False
            continue
        if name not in _KEEPS_ROWS and not name.startswith(("TBackward", "Transpose", "Permute")):
            return False
        nexts = [each for each, _ in node.next_functions]
        if not any(nexts):
            return False
        todo += [each for each in nexts if each is not None]
    return True


def _picked(
    start: Any, rows: int, explain: Explain, keeps: frozenset[str] = _KEEPS_ROWS
) -> list[Tensor]:
    found: list[Tensor] = []
    todo, seen = [start], set[Any]()
    while todo and len(seen) < _MOST_NODES:
        node = todo.pop(0)
        if node in seen:
            continue
        seen.add(node)
        name = node.name()
        if name in _PICKS:
            own = _read(node, name, rows, explain)
            if own is not None:
                found.append(own)
                continue
        if name in keeps:
            todo += [each for each, _ in node.next_functions if each is not None]
    return found


def _read(node: Any, name: str, rows: int, explain: Explain) -> Tensor | None:
    """Return the positions that a node picked, if it picked so many rows of the grid."""
    below = node.next_functions[0][0]
    if below is None or "AccumulateGrad" in below.name():
        # A table of parameters, or data without a graph: its rows are no positions.
        return None
    sizes = tuple(node._saved_self_sym_sizes) if name != "GatherBackward0" else _gather_sizes(node)
    if len(sizes) < 2:
        return None
    numbers = torch.arange(torch.Size(sizes[:-1]).numel(), device="cpu").view(sizes[:-1])
    try:
        own = _PICKS[name](node, numbers)
    except (IndexError, RuntimeError, TypeError):
        return None
    if own is None or own.numel() != rows:
        return None
    positions = explain(torch.Size(sizes[:-1]))
    if positions is not None:
        return positions.flatten().to(own.device)[own.flatten()]
    # Picked from what was picked before.
    inner = _picked(below, numbers.numel(), explain)
    if not inner or not all(_equal(inner[0], other) for other in inner[1:]):
        return None
    return inner[0].to(own.device)[own.flatten()]


def _index(node: Any, numbers: Tensor) -> Tensor | None:
    indices = node._saved_indices
    used = [i for i, each in enumerate(indices) if each is not None]
    if not used or sum(_axes(each) for each in indices) > numbers.dim():
        return None
    device = next(each.device for each in indices if each is not None)
    full = tuple(slice(None) if each is None else each for each in indices)
    return numbers.to(device)[full]


def _axes(index: Tensor | None) -> int:
    return index.dim() if index is not None and index.dtype == torch.bool else 1


def _index_select(node: Any, numbers: Tensor) -> Tensor | None:
    axis = _signed(node._saved_dim)
    axis = axis if axis >= 0 else axis + numbers.dim() + 1
    if axis >= numbers.dim():
        return None
    index = node._saved_index
    return numbers.to(index.device).index_select(axis, index)


def _gather(node: Any, numbers: Tensor) -> Tensor | None:
    axis = _signed(node._saved_dim)
    index = node._saved_index
    axis = axis if axis >= 0 else axis + index.dim()
    if index.dim() != numbers.dim() + 1 or axis >= numbers.dim():
        return None
    # All features of a row come from one row, or it is not a gather of rows.
    first = index[..., 0]
    if (
        index.shape[-1] > 1
        and index.stride(-1) != 0
        and not bool((index == first[..., None]).all())
    ):
        return None
    return numbers.to(index.device).gather(axis, first)


def _gather_sizes(node: Any) -> Sizes:
    try:
        return tuple(node._saved_self.shape)
    except RuntimeError:
        return ()


def _slice(node: Any, numbers: Tensor) -> Tensor | None:
    axis = _signed(node._saved_dim)
    axis = axis if axis >= 0 else axis + numbers.dim() + 1
    if axis >= numbers.dim():
        return None
    start, end = _signed(node._saved_start), _signed(node._saved_end)
    cut = [slice(None)] * numbers.dim()
    cut[axis] = slice(start, end, _signed(node._saved_step))
    return numbers[tuple(cut)]


_PICKS: dict[str, Callable[[Any, Tensor], Tensor | None]] = {
    "IndexBackward0": _index,
    "IndexSelectBackward0": _index_select,
    "GatherBackward0": _gather,
    "SliceBackward0": _slice,
}


def _signed(number: int) -> int:
    """Return a saved size as it was given: negative ones are kept as unsigned."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _equal(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and torch.equal(one, two.to(one.device))


def checkpointed() -> bool:
    """Return whether a checkpoint's own first forward is running, which saves only placeholders."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and "_checkpoint_hook" in getattr(hooks[0], "__qualname__", "")
