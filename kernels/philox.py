"""Dropout in Triton: the mask of pyfast/philox.py, a function of (seed, logical element index) alone."""

import triton
import triton.language as tl


@triton.jit
def kept(seed, index, threshold):
    """Whether dropout keeps the elements of an int64 index; threshold is int(p * 2**32)."""
    block, word = index >> 2, index.to(tl.uint32) & 3
    low, high = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, low * 0, low * 0)
    random = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    return random >= tl.cast(threshold, tl.uint32)


def threshold(dropout_p: float) -> int:
    return int(dropout_p * 2**32)
