"""Rotary position embedding in Triton: a program turns ROWS rows of (batch, position, head), heads innermost, so that
the angles of a position, which all its heads share, come from the cache.
"""

import torch
import triton
import triton.language as tl

from pyfast.kernels import launch


@triton.jit
def rope_kernel(
    X,
    COS,
    SIN,
    Y,
    rows,
    seq,
    heads,
    width,
    dim,
    x_batch_stride,
    x_head_stride,
    x_seq_stride,
    x_stride,
    y_batch_stride,
    y_head_stride,
    y_seq_stride,
    angle_batch_stride,
    angle_seq_stride,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Each pair (a, b) becomes (a cos_a - b sin_a, b cos_b + a sin_b); INVERSE: the transposed map, the gradient."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    head, position, batch = row % heads, row // heads % seq, row // heads // seq
    X += batch * x_batch_stride + position * x_seq_stride + head * x_head_stride
    Y += batch * y_batch_stride + position * y_seq_stride + head * y_head_stride
    angle = batch * angle_batch_stride + position * angle_seq_stride
    pair = tl.arange(0, PAIRS)[None, :]
    first = 2 * pair if INTERLEAVED else pair
    second = 2 * pair + 1 if INTERLEAVED else pair + width // 2
    inside = (row < rows) & (pair < width // 2)
    cos_a = tl.load(COS + angle + first, mask=inside, other=0.0).to(tl.float32)
    cos_b = tl.load(COS + angle + second, mask=inside, other=0.0).to(tl.float32)
    sin_a = tl.load(SIN + angle + first, mask=inside, other=0.0).to(tl.float32)
    sin_b = tl.load(SIN + angle + second, mask=inside, other=0.0).to(tl.float32)
    if INVERSE:
        sin_a, sin_b = -sin_b, -sin_a
    a = tl.load(X + first * x_stride, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(X + second * x_stride, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + first, (a * cos_a - b * sin_a).to(Y.dtype.element_ty), mask=inside)
    tl.store(Y + second, (b * cos_b + a * sin_b).to(Y.dtype.element_ty), mask=inside)
    if REST > 0:
        rest = width + tl.arange(0, REST)[None, :]
        inside = (row < rows) & (rest < dim)
        tl.store(Y + rest, tl.load(X + rest * x_stride, mask=inside, other=0.0), mask=inside)


@launch.launcher
def rope(x, cos, sin, interleaved, inverse):
    y = torch.empty_like(x)
    y = y if y.stride(-1) == 1 else x.new_empty(x.shape)
    (batch, heads, seq, dim), width = x.shape, cos.shape[-1]
    if y.numel() == 0:
        return y
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    rows, tile = batch * seq * heads, launch.tile(rope_kernel, x.device, dim)
    launch.run(
        rope_kernel,
        launch.cdiv(rows, tile["ROWS"]),
        x,
        cos,
        sin,
        y,
        rows,
        seq,
        heads,
        width,
        dim,
        *x.stride(),
        *y.stride()[:3],
        cos.stride(0) if len(cos) > 1 else 0,
        cos.stride(1),
        INTERLEAVED=interleaved,
        INVERSE=inverse,
        PAIRS=launch.power_of_two(width // 2),
        REST=launch.power_of_two(dim - width) if dim > width else 0,
        **tile,
    )
    return y
