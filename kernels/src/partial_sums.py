"""Deterministic reduction of the partial sums of a split reduction."""

import triton
import triton.language as tl


@triton.jit
def add_partial_sums(partial, out, scale, values, splits, BLOCK: tl.constexpr):
    """Add ``scale`` times the ``splits`` rows of ``partial`` [splits, values] to ``out``."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < values
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    place = at
    for _ in range(splits):
        total += tl.load(partial + place, mask=inside, other=0.0)
        place += values
    tl.store(out + at, tl.load(out + at, mask=inside) + scale * total, mask=inside)
