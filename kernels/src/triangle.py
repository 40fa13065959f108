"""The tile of the packed triangle that a program computes."""

import triton
import triton.language as tl


@triton.jit
def tile_of(t, PAIRED: tl.constexpr):
    """Return (row tile, column block) of the t-th tile to compute.

    Unpaired, a column block is one tile wide and has rows 0 to its own: t = i(i+1)/2 + j. Paired,
    it is two tiles wide and has rows 0 to 2i+1: t = i(i+1) + j; the one tile below the diagonal
    that this computes is not stored. The square root may be off by one, which is corrected.
    """
    if PAIRED:
        i = ((tl.sqrt(4.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
        i = tl.where(i * (i + 1) > t, i - 1, i)
        i = tl.where((i + 1) * (i + 2) <= t, i + 1, i)
        j = t - i * (i + 1)
    else:
        i = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
        i = tl.where(i * (i + 1) // 2 > t, i - 1, i)
        i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)
        j = t - i * (i + 1) // 2
    return j, i


def tiles_to_compute(panels: int, paired: bool) -> int:
    """Return how many programs cover the triangle of ``panels`` tiles a side."""
    if paired:
        blocks = -(-panels // 2)
        return blocks * (blocks + 1)
    return panels * (panels + 1) // 2
