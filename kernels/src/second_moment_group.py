"""Grouped second moments: many layers in one launch, so that small sums fill a GPU."""

import triton
import triton.language as tl

from curvfast.kernels.owner import owner_of
from curvfast.kernels.triangle import tile_of


@triton.jit
def second_moment_group(
    inputs, indices, outs, features, rows, strides, scales, first_tiles, members,
    ELEMENT: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr, INDEX: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Add the products of each member's rows x [rows, d] to the packed tiles of its own sum.

    The tables hold, a member each: addresses of x, of row indices and of tiles; d; rows; the
    distance of rows; the factor; and the tiles of the members before it.
    """
    program = tl.program_id(0)
    member = owner_of(program, first_tiles, members)
    j, i = tile_of(program - tl.load(first_tiles + member), False)
    # The host takes nothing else. The compiler forgets a hint on an address before it is a pointer,
    # and copies 16 bytes at a time only where the mask, too, is known to change every 8 features.
    x = tl.multiple_of(tl.load(inputs + member).to(tl.pointer_type(ELEMENT)), 16)
    out = tl.multiple_of(tl.load(outs + member).to(tl.pointer_type(tl.float32)), 16)
    index = tl.load(indices + member).to(tl.pointer_type(tl.int64))
    stride = tl.multiple_of(tl.load(strides + member), 8)
    d = tl.multiple_of(tl.load(features + member), 8)
    count = tl.load(rows + member)
    features_j = j * TILE + tl.arange(0, TILE)
    features_i = i * TILE + tl.arange(0, TILE)
    acc = tl.zeros((TILE, TILE), dtype=tl.float32)
    for first in range(0, count, BLOCK_K):
        place = first + tl.arange(0, BLOCK_K)
        row = place.to(tl.int64)
        if INDEX:
            row = tl.load(index + place, mask=place < count, other=0)
        at = x + row[:, None] * stride
        counts = (place < count)[:, None]
        a = tl.load(at + features_j[None, :], mask=counts & (features_j < d)[None, :], other=0.0)
        b = tl.load(at + features_i[None, :], mask=counts & (features_i < d)[None, :], other=0.0)
        # The interpreter multiplies the bit patterns of bfloat16, so it is given float32.
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(tl.trans(a), b, acc)
    tile = i * (i + 1) // 2 + j
    square = tl.arange(0, TILE)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    target = out + tile.to(tl.int64) * (TILE * TILE) + square
    tl.store(target, tl.load(target) + tl.load(scales + member) * acc)
