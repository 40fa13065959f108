"""Bindings of the extension ``curvfast._C``, the only module that imports it; passes addresses."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from curvfast.ops.selection import Bits, Found, Kept, ScoreMatrix, Values, Widths

try:
    from curvfast import _C
except ImportError as _error:
    _reason: str | None = f"the extension is not built ({_error}); reinstall with a C++ compiler"
else:
    _reason = None


def switched_off() -> str | None:
    """Return what switches native code off, or None."""
    return "CURVFAST_NATIVE=0 is set" if os.environ.get("CURVFAST_NATIVE") == "0" else None


@cache
def unavailable() -> str | None:
    """Return why the native core cannot be used, or None if it can, as of the first look."""
    return switched_off() or _reason


def staircase_by_mass(values_g: Values, values_a: Values, mass: float) -> Found:
    """As :func:`curvfast.ops.staircase_by_mass`, in C++."""
    return _search(_C.staircase_by_mass, values_g, values_a, mass)


def staircase_by_pairs(values_g: Values, values_a: Values, pairs: int) -> Found:
    """As :func:`curvfast.ops.staircase_by_pairs`, in C++."""
    return _search(_C.staircase_by_pairs, values_g, values_a, pairs)


def staircases_by_mass(
    layers: Sequence[tuple[Values, Values]], masses: Sequence[float], workers: int
) -> list[list[Found]]:
    """As :func:`curvfast.ops.staircase_by_mass` for each layer and mass, in one call."""
    spectra = [tuple(np.ascontiguousarray(v, np.float64) for v in layer) for layer in layers]
    widths = [np.zeros((len(masses), len(g)), np.int32) for g, _ in spectra]
    found = iter(_C.staircases_by_mass(_table(spectra, widths), list(masses), workers))
    return [[Found(own[m], *next(found)) for m in range(len(masses))] for own in widths]


def staircases_by_common_mass(
    layers: Sequence[tuple[Values, Values]], mass: float
) -> tuple[list[Widths], float]:
    """As :func:`curvfast.ops.staircases_by_common_mass`, in C++."""
    spectra = [tuple(np.ascontiguousarray(v, np.float64) for v in layer) for layer in layers]
    widths = [np.zeros(len(g), np.int32) for g, _ in spectra]
    threshold = _C.staircases_by_common_mass(_table(spectra, widths), mass)
    return widths, threshold


def scores_by_mass(layers: Sequence[ScoreMatrix], mass: float, workers: int) -> list[Kept]:
    """As :func:`curvfast.ops.scores_by_mass`, in C++."""
    scores = [np.ascontiguousarray(layer, np.float32) for layer in layers]
    masks = [_empty_mask(layer) for layer in scores]
    table = [
        (layer.ctypes.data, *layer.shape, mask.ctypes.data)
        for layer, mask in zip(scores, masks, strict=True)
    ]
    found = _C.scores_by_mass(table, mass, workers)
    return [Kept(mask, *own) for mask, own in zip(masks, found, strict=True)]


def scores_by_pairs(scores: ScoreMatrix, pairs: int, workers: int) -> Kept:
    """As :func:`curvfast.ops.scores_by_pairs`, in C++."""
    values = np.ascontiguousarray(scores, np.float32)
    rows, columns = values.shape
    mask = _empty_mask(values)
    found = _C.scores_by_pairs(values.ctypes.data, rows, columns, mask.ctypes.data, pairs, workers)
    return Kept(mask, *found)


def cheapest_split(widths: npt.NDArray[np.int64], columns: int, band: int) -> tuple[int, int, int]:
    """As :func:`curvfast.ops.reference.cheapest_split`, in C++."""
    kept = np.ascontiguousarray(widths, np.int64)
    return _C.cheapest_split(kept.ctypes.data, kept.size, columns, band)


def instruction_sets() -> dict[str, bool]:
    """Return the instruction sets rows can be multiplied by, and whether this processor has them.

    From the plainest on; ``"portable"`` comes first and runs everywhere.
    """
    return dict(_C.instruction_sets())


def packed_words(d: int, rows: int, dtype: torch.dtype) -> int:
    """Return how many 32-bit words of workspace :func:`add_rows` needs for rows of d features."""
    return _C.packed_words(d, rows, torch.finfo(dtype).bits)


def packed_products(d: int) -> int:
    """Return how many of the d · d products of a row :func:`add_rows` computes."""
    return _C.packed_products(d)


def add_rows(
    tiles: Tensor,
    d: int,
    x: Tensor,
    offsets: Tensor,
    roots: Tensor | None,
    room: Tensor,
    scale: float,
    finite_only: bool,
    instructions: str,
    workers: int,
) -> bool:
    """Add the products of the rows at ``offsets`` to the packed ``tiles`` of d features.

    Args:
        tiles: float32 [tiles · width, width], contiguous. Written.
        d: Features.
        x: float32 or bfloat16; each row's features side by side.
        offsets: int64 [n], where each row begins, counted in elements from the first of x.
        roots: float32 [n], what each row is multiplied by first, or None; of float32 rows only.
        room: int32, at least :func:`packed_words` of them. Overwritten.
        scale: Factor of the products.
        finite_only: Whether rows that are not all finite leave ``tiles`` as they were.
        instructions: One of :func:`instruction_sets` that this processor has.
        workers: Threads; the answer does not depend on them.

    Returns:
        Whether they were added.
    """
    add = _C.add_float32_rows if x.dtype == torch.float32 else _C.add_bfloat16_rows
    return add(
        tiles.data_ptr(), tiles.numel(), d, tiles.shape[1], x.data_ptr(), offsets.data_ptr(),
        offsets.numel(), 0 if roots is None else roots.data_ptr(),
        room.data_ptr(), room.numel(), scale, finite_only, instructions, workers,
    )  # fmt: skip


def finite_rows(x: Tensor, d: int, offsets: Tensor, workers: int) -> bool:
    """Return whether the rows at ``offsets`` are finite, all as of :func:`add_rows`.

    x may be float16 and float64 too.
    """
    name = str(x.dtype).removeprefix("torch.")
    return _C.finite_rows(x.data_ptr(), offsets.data_ptr(), offsets.numel(), d, name, workers)


def pack(matrix: Tensor, tiles: Tensor, workers: int) -> None:
    """Write every tile of the packed form of a matrix.

    Args:
        matrix: float32 or float64 [d, d], contiguous.
        tiles: [tiles · width, width], contiguous, of the same dtype. Written.
        workers: Threads, here and below; the answer does not depend on them.
    """
    _C.pack(
        matrix.data_ptr(), len(matrix), tiles.data_ptr(), tiles.numel(), tiles.shape[1],
        torch.finfo(tiles.dtype).bits, workers,
    )  # fmt: skip


def unpack(tiles: Tensor, matrix: Tensor, workers: int) -> None:
    """Write all of a matrix [d, d] from its packed form, both as of :func:`pack`."""
    _C.unpack(
        tiles.data_ptr(), tiles.numel(), tiles.shape[1], matrix.data_ptr(), len(matrix),
        torch.finfo(tiles.dtype).bits, workers,
    )  # fmt: skip


def mirror_(matrix: Tensor, workers: int) -> None:
    """Copy what is above the diagonal of a contiguous matrix [d, d] to below it."""
    bits = torch.finfo(matrix.dtype).bits
    _C.mirror(matrix.data_ptr(), matrix.numel(), len(matrix), bits, workers)


def scale_(tiles: Tensor, factor: float, workers: int) -> None:
    """Multiply contiguous values by ``factor``, which must be finite in their dtype."""
    _C.scale(tiles.data_ptr(), tiles.numel(), factor, torch.finfo(tiles.dtype).bits, workers)


def _empty_mask(scores: ScoreMatrix) -> Bits:
    return np.zeros((scores.shape[0], -(-scores.shape[1] // 8)), np.uint8)


def _table(
    spectra: Sequence[tuple[Values, ...]], widths: Sequence[Widths]
) -> list[tuple[int, int, int, int, int]]:
    return [
        (g.ctypes.data, len(g), a.ctypes.data, len(a), out.ctypes.data)
        for (g, a), out in zip(spectra, widths, strict=True)
    ]


def _search(
    function: Callable[..., tuple[float, int, float]],
    values_g: Values,
    values_a: Values,
    rule: float,
) -> Found:
    g, a = (np.ascontiguousarray(values, np.float64) for values in (values_g, values_a))
    widths = np.zeros(len(g), np.int32)
    threshold, pairs, kept = function(
        g.ctypes.data, len(g), a.ctypes.data, len(a), rule, widths.ctypes.data
    )
    return Found(widths, threshold, pairs, kept)
