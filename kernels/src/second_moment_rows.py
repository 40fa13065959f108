"""Second moments of chosen or weighted rows, of any strides, loaded row by row."""

import triton
import triton.language as tl

from curvfast.kernels.triangle import tile_of


@triton.jit
def second_moment_rows(
    x, index, lengths, weights, also_weights, out, also, scale, rows, length, d,
    stride_sequence, stride_row, stride_feature, splits, panels,
    TILE: tl.constexpr, PARTS: tl.constexpr, BLOCK_K: tl.constexpr, SEQUENCES: tl.constexpr,
    INDEX: tl.constexpr, LENGTHS: tl.constexpr, WEIGHTS: tl.constexpr, ALSO: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add the products of the counted rows to the packed tiles of ``out``, and of ``also``.

    ``rows`` is the length of ``index``, or all rows of x. With SPLIT, ``out`` and ``also`` are
    workspaces of ``splits`` stacks of tiles, which are written rather than added to. PARTS programs
    share a tile, its columns divided among them: two running sums fill the registers of one.
    """
    COLUMNS: tl.constexpr = TILE // PARTS
    j, i = tile_of(tl.program_id(0) // PARTS, False)
    column = (tl.program_id(0) % PARTS) * COLUMNS
    split = tl.program_id(1)
    features_j = j * TILE + tl.arange(0, TILE)
    features_i = i * TILE + column + tl.arange(0, COLUMNS)
    total = tl.cdiv(rows, BLOCK_K)
    share = tl.cdiv(total, splits)
    acc = tl.zeros((TILE, COLUMNS), dtype=tl.float32)
    acc_also = tl.zeros((TILE, COLUMNS), dtype=tl.float32)
    for step in range(split * share, tl.minimum((split + 1) * share, total)):
        place = step * BLOCK_K + tl.arange(0, BLOCK_K)
        counts = place < rows
        if INDEX:
            row = tl.load(index + place, mask=counts, other=0).to(tl.int32)
        else:
            row = place
        if SEQUENCES:
            # In 32 bits: a 64-bit division would need registers of the accumulator.
            sequence = row // length
            within = row - sequence * length
            start = x + sequence.to(tl.int64) * stride_sequence + within.to(tl.int64) * stride_row
            if LENGTHS:
                counts &= within < tl.load(lengths + sequence, mask=counts, other=0)
        else:
            start = x + row.to(tl.int64) * stride_row
        a = _fetch(start, features_j, stride_feature, counts, d)
        b = _fetch(start, features_i, stride_feature, counts, d)
        if ALSO:
            root = tl.sqrt(tl.load(also_weights + row, mask=counts, other=0.0))[:, None]
            acc_also = _multiply(_scaled(a, root), _scaled(b, root), acc_also, PRECISION, UPCAST)
        if WEIGHTS:
            root = tl.sqrt(tl.load(weights + row, mask=counts, other=0.0))[:, None]
            a = _scaled(a, root)
            b = _scaled(b, root)
        acc = _multiply(a, b, acc, PRECISION, UPCAST)
    tile = split * (panels * (panels + 1) // 2) + i * (i + 1) // 2 + j
    _store(out, acc, scale, tile, column, TILE, COLUMNS, SPLIT)
    if ALSO:
        _store(also, acc_also, scale, tile, column, TILE, COLUMNS, SPLIT)


@triton.jit
def _fetch(start, features, stride, counts, d):
    inside = counts[:, None] & (features < d)[None, :]
    return tl.load(start[:, None] + features.to(tl.int64)[None, :] * stride, mask=inside, other=0.0)


@triton.jit
def _scaled(x, root):
    return (x.to(tl.float32) * root).to(x.dtype)


@triton.jit
def _multiply(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if PRECISION == "bf16x4":
        a_high = a.to(tl.bfloat16)
        b_high = b.to(tl.bfloat16)
        a_low = (a - a_high.to(tl.float32)).to(tl.bfloat16)
        b_low = (b - b_high.to(tl.float32)).to(tl.bfloat16)
        acc = _dot(a_low, b_low, acc, UPCAST)
        acc = _dot(a_low, b_high, acc, UPCAST)
        acc = _dot(a_high, b_low, acc, UPCAST)
        acc = _dot(a_high, b_high, acc, UPCAST)
    elif PRECISION == "native":
        acc = _dot(a, b, acc, UPCAST)
    else:
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _dot(a, b, acc, UPCAST: tl.constexpr):
    # Triton's interpreter multiplies bit patterns of bfloat16, so it gets float32.
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(tl.trans(a), b, acc)


@triton.jit
def _store(
    out, acc, scale, tile, column,
    TILE: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    rows = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    at = out + rows[:, None] * TILE + (column + tl.arange(0, COLUMNS))[None, :]
    if SPLIT:
        tl.store(at, acc)
    else:
        tl.store(at, tl.load(at) + scale * acc)
