"""Quantised weights in Triton: codes become levels times the scale of their block, rounded once.

A weight is written out whole before the products that use it. In their operand's load every tile of 128 rows would do
that again: compiled for sm_90, the loop of a 128 x 128 x 32 tile takes 554 instructions with nf4 (207 with 8-bit codes)
where it takes 66 with a dense weight, some 30 more per element. At 8192 rows of a 4096 x 14336 weight that is 4 ms of
instructions on an H100, where the dense product needs 1.2 ms and this kernel, of 26 instructions and 2.6 bytes per
element, 0.05.
"""

import functools

import torch
import triton
import triton.language as tl

from pyfast.kernels import launch


@triton.jit
def dequantize_kernel(
    CODES, SCALE, LEVELS, WEIGHT, k, block_rows, BLOCK_COLUMNS: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr
):
    """Part of a row of WEIGHT (n, k). BLOCK_COLUMNS: of a scale, None for whole rows; known to the compiler, which
    divides by it with a shift. PAIRS: a byte holds two codes, the first in its high half."""
    parts = tl.cdiv(k, BLOCK)
    row = (tl.program_id(0) // parts).to(tl.int64)
    column = (tl.program_id(0) % parts).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < k
    at = row * k + column
    if PAIRS:
        byte = tl.load(CODES + at // 2, mask=inside, other=0).to(tl.int32)
        code = tl.where(at % 2 == 0, byte >> 4, byte & 15)
    else:
        code = tl.load(CODES + at, mask=inside, other=0).to(tl.int32)
    if BLOCK_COLUMNS is None:
        scale = tl.load(SCALE + row // block_rows)
    else:
        block = row // block_rows * tl.cdiv(k, BLOCK_COLUMNS) + column // BLOCK_COLUMNS
        scale = tl.load(SCALE + block, mask=inside, other=0.0)
    value = tl.load(LEVELS + code, mask=inside, other=0.0) * scale
    tl.store(WEIGHT + at, value.to(WEIGHT.dtype.element_ty), mask=inside)


@functools.cache
def _levels(levels: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(levels, dtype=torch.float32, device=device)


@launch.launcher
def dequantize(codes, scale, levels, n, k, block_rows, block_columns, dtype):
    weight = codes.new_empty((n, k), dtype=dtype)
    tile = launch.tile(dequantize_kernel, codes.device)
    launch.run(
        dequantize_kernel,
        n * launch.cdiv(k, tile["BLOCK"]),
        codes,
        scale,
        _levels(tuple(levels), codes.device),
        weight,
        k,
        block_rows,
        BLOCK_COLUMNS=block_columns if block_columns < k else None,
        PAIRS=len(levels) == 16,
        **tile,
    )
    return weight
