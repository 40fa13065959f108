"""The owner of a program's tile, where tiles of many owners are numbered consecutively."""

import triton
import triton.language as tl


@triton.jit
def owner_of(tile, first_tiles, owners):
    """Return the owner of a tile: the last whose first tile is not after it, by bisection.

    ``first_tiles`` [owners + 1] counts the tiles of the owners before each.
    """
    low = 0
    high = owners
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(first_tiles + middle) <= tile:
            low = middle
        else:
            high = middle
    return low
