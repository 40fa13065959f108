"""Sampled-label gradient of the loss with respect to the logits, in place."""

import triton
import triton.language as tl


@triton.jit
def sampled_gradient(logits, counts, labels, seed, classes, stride, BLOCK: tl.constexpr):
    """Draw y ~ softmax(logits) and overwrite the logits of each row by softmax - onehot(y).

    One program a row. A label is the class of the largest logit + Gumbel noise, the noise being a
    function of the seed, row and class alone. Rows whose ``counts`` is 0 become zero, label -1.
    """
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    if tl.load(counts + row) == 0:
        tl.store(labels + row, -1)
        for start in range(0, classes, BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(base + at, tl.zeros((BLOCK,), base.dtype.element_ty), mask=at < classes)
    else:
        key = tl.load(seed)
        largest = tl.full((), -float("inf"), tl.float32)
        total = tl.zeros((), tl.float32)
        best = tl.full((), -float("inf"), tl.float32)
        label = tl.zeros((), tl.int32)
        for start in range(0, classes, BLOCK):
            at = start + tl.arange(0, BLOCK)
            z = tl.load(base + at, mask=at < classes, other=-float("inf")).to(tl.float32)
            block_largest = tl.maximum(largest, tl.max(z, axis=0))
            # If every class is -inf there is nothing to scale.
            shift = tl.where(block_largest == -float("inf"), 0.0, block_largest)
            total = total * tl.exp(largest - shift) + tl.sum(tl.exp(z - shift), axis=0)
            largest = block_largest
            noisy = z + gumbel(key, row, at)
            block_best = tl.max(noisy, axis=0)
            at_best = start + tl.argmax(noisy, axis=0)
            label = tl.where(block_best > best, at_best, label)
            best = tl.maximum(best, block_best)
        tl.store(labels + row, label.to(tl.int64))
        for start in range(0, classes, BLOCK):
            at = start + tl.arange(0, BLOCK)
            z = tl.load(base + at, mask=at < classes, other=-float("inf")).to(tl.float32)
            gradient = tl.exp(z - largest) / total - tl.where(at == label, 1.0, 0.0)
            tl.store(base + at, gradient.to(base.dtype.element_ty), mask=at < classes)


@triton.jit
def gumbel(key, row, at):
    """Return -log(-log(u)) for u uniform on (0, 1), by Philox at the counter (class, row)."""
    low = (row & 0x7FFFFFFF).to(tl.int32)
    bits, _, _, _ = tl.philox(key, at, low, (row >> 31).to(tl.int32), 0)
    # 1 - u rather than u: the largest noise needs the finest resolution, which floats have near 0.
    v = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    exponential = tl.where(v < 1e-3, v * (1.0 + v * (0.5 + v * 0.33333333)), -tl.log(1.0 - v))
    return -tl.log(exponential)
