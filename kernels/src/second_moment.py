"""Second moments of whole rows, loaded by the tensor memory accelerator (Hopper and later).

Both operands of xᵀx have contiguous features, which the matrix units accept: the tiles that a
descriptor loads into shared memory are multiplied without a transposition.
"""

import triton
import triton.language as tl

from curvfast.kernels.triangle import tile_of


@triton.jit
def second_moment_tiles(
    left, right, out, scale, sequences, length, panels, splits,
    TILE: tl.constexpr, BLOCK_K: tl.constexpr, PAIRED: tl.constexpr, LAYOUT: tl.constexpr,
    SPLIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add the products of x to the packed tiles of ``out``.

    ``left`` and ``right`` describe x in blocks of TILE and of TILE or 2·TILE features. LAYOUT is
    "rows" for x [length, d], "sequences" for x [sequences, length, d], and "parts" for
    [2, length, d]: the high and low 16-bit parts of rows, of which all four products are taken.
    ``out`` describes the tiles [tiles · TILE, TILE], or with SPLIT a workspace of ``splits`` such
    stacks, which is written rather than added to.
    """
    COLUMNS: tl.constexpr = 2 * TILE if PAIRED else TILE
    j, i = tile_of(tl.program_id(0), PAIRED)
    split = tl.program_id(1)
    blocks = tl.cdiv(length, BLOCK_K)
    total = blocks
    if LAYOUT == "sequences":
        total = sequences * blocks
    elif LAYOUT == "parts":
        total = 4 * blocks
    share = tl.cdiv(total, splits)
    acc = tl.zeros((TILE, COLUMNS), dtype=tl.float32)
    for step in range(split * share, tl.minimum((split + 1) * share, total)):
        if LAYOUT == "rows":
            a = left.load([step * BLOCK_K, j * TILE])
            b = right.load([step * BLOCK_K, i * COLUMNS])
        else:
            at_a = step // blocks
            at_b = at_a
            row = (step % blocks) * BLOCK_K
            if LAYOUT == "parts":
                at_b = at_a % 2
                at_a = at_a // 2
            a = left.load([at_a, row, j * TILE]).reshape(BLOCK_K, TILE)
            b = right.load([at_b, row, i * COLUMNS]).reshape(BLOCK_K, COLUMNS)
        # Triton's interpreter multiplies bit patterns of bfloat16, so it gets float32.
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(tl.trans(a), b, acc)
    first = split * (panels * (panels + 1) // 2)
    if PAIRED:
        even, odd = tl.split(acc.reshape(TILE, 2, TILE).permute(0, 2, 1))
        _store(out, even, scale, first, j, 2 * i, panels, TILE, SPLIT)
        _store(out, odd, scale, first, j, 2 * i + 1, panels, TILE, SPLIT)
    else:
        _store(out, acc, scale, first, j, i, panels, TILE, SPLIT)


@triton.jit
def _store(out, acc, scale, first, j, i, panels, TILE: tl.constexpr, SPLIT: tl.constexpr):
    if (j <= i) & (i < panels):
        at = (first + i * (i + 1) // 2 + j) * TILE
        if SPLIT:
            out.store([at, 0], acc)
        else:
            out.store([at, 0], out.load([at, 0]) + scale * acc)
