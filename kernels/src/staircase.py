"""Products with a staircase: only tiles within the widths are computed, no mask is stored.

``widths`` hold the number of columns each row of C keeps, non-increasing. *Expanding* T V fills C
within the staircase; *contracting* C Vᵀ stops each row block's sum at the width of its first row.
"""

import triton
import triton.language as tl

from curvfast.kernels.owner import owner_of


@triton.jit
def expand(
    t, v, c, widths, first_tiles, rows, n, columns,
    stride_t_row, stride_t_n, stride_v_n, stride_v_column, row_blocks,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write C = M ∘ (T V) [rows, columns], for T [rows, n] and V [n, columns].

    ``first_tiles`` [row_blocks + 1] counts the tiles of the row blocks before each: the programs
    are numbered over tiles that keep something, and tiles beyond the staircase stay unwritten.
    """
    tile = tl.program_id(0)
    block = owner_of(tile, first_tiles, row_blocks)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tile - tl.load(first_tiles + block)) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, n, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a_at = t + row.to(tl.int64)[:, None] * stride_t_row + k.to(tl.int64)[None, :] * stride_t_n
        a = tl.load(a_at, mask=(row < rows)[:, None] & (k < n)[None, :], other=0.0)
        b_at = v + k.to(tl.int64)[:, None] * stride_v_n
        b_at += column.to(tl.int64)[None, :] * stride_v_column
        b = tl.load(b_at, mask=(k < n)[:, None] & (column < columns)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    width = tl.load(widths + row, mask=row < rows, other=0)
    acc = tl.where(column[None, :] < width[:, None], acc, 0.0)
    at = c + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(at, acc, mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def contract(
    c, v, y, widths, rows, n, columns, stride_v_n, stride_v_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write Y = C Vᵀ [rows, n], for C [rows, columns] within its staircase and V [n, columns]."""
    first = tl.program_id(0) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    out = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    width = tl.load(widths + first)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        # Within the block's widest row every tile was written, with zeros past each row's width.
        a_at = c + row.to(tl.int64)[:, None] * columns + k[None, :]
        a = tl.load(a_at, mask=(row < rows)[:, None] & (k < width)[None, :], other=0.0)
        b_at = v + out.to(tl.int64)[None, :] * stride_v_n
        b_at += k.to(tl.int64)[:, None] * stride_v_column
        b = tl.load(b_at, mask=(k < width)[:, None] & (out < n)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    at = y + row.to(tl.int64)[:, None] * n + out[None, :]
    tl.store(at, acc, mask=(row < rows)[:, None] & (out < n)[None, :])
