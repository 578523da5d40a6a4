"""Dropout in Triton, of elements in their logical order; the gradient is dropout of the incoming gradient."""

import torch
import triton
import triton.language as tl

from pyfast.kernels import launch
from pyfast.kernels.philox import kept, threshold


@triton.jit
def dropout_kernel(X, SEED, Y, elements, dropout_threshold, scale, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < elements, other=0.0).to(tl.float32)
    y = tl.where(kept(tl.load(SEED), at, dropout_threshold), x * scale, 0.0)
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=at < elements)


@launch.launcher
def dropout(x, seed, p):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    tile = launch.tile(dropout_kernel, x.device)
    programs = launch.cdiv(x.numel(), tile["BLOCK"])
    launch.run(dropout_kernel, programs, x.contiguous(), seed, y, x.numel(), threshold(p), 1 / (1 - p), **tile)
    return y
