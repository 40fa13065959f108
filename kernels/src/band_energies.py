"""Band energies of rows, without writing the projections."""

import triton
import triton.language as tl


@triton.jit
def band_energies(
    x, vectors, edges, out, rows, d, bands, stride_row, stride_feature, stride_v, stride_component,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Write ‖x_t V_b‖² to out [rows, bands], V_b being columns edges[b] to edges[b + 1] of V."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    band = tl.program_id(1)
    stop = tl.load(edges + band + 1)
    energy = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for first in range(tl.load(edges + band), stop, BLOCK_N):
        component = first + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, d, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            a_at = x + row.to(tl.int64)[:, None] * stride_row
            a_at += k.to(tl.int64)[None, :] * stride_feature
            a = tl.load(a_at, mask=(row < rows)[:, None] & (k < d)[None, :], other=0.0)
            b_at = vectors + k.to(tl.int64)[:, None] * stride_v
            b_at += component.to(tl.int64)[None, :] * stride_component
            b = tl.load(b_at, mask=(k < d)[:, None] & (component < stop)[None, :], other=0.0)
            # Triton's interpreter multiplies bit patterns of bfloat16, so it gets float32.
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        energy += tl.sum(acc * acc, axis=1)
    tl.store(out + row.to(tl.int64) * bands + band, energy, mask=row < rows)
