"""RMSNorm and LayerNorm in Triton, with the residual sum before them: a program holds ROWS whole rows.

Weight and bias may have several lines (a weight per head): row r uses line r % lines. The backward gives each program
rows of one line; their sums are one row of a partial result, which torch adds up in a fixed order.
"""

import torch
import triton
import triton.language as tl

from pyfast.kernels import launch


@triton.jit
def norm_kernel(
    X,
    WEIGHT,
    BIAS,
    RESIDUAL,
    Y,
    SUM,
    MEAN,
    RSTD,
    rows,
    columns,
    x_stride,
    residual_stride,
    weight_lines,
    bias_lines,
    eps,
    weight_offset,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    CENTER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < columns)
    h = tl.load(X + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        h += tl.load(RESIDUAL + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        total = h.to(SUM.dtype.element_ty)
        tl.store(SUM + row * columns + column, total, mask=inside)
        h = total.to(tl.float32)
    if CENTER:
        mean = tl.sum(h, 1, keep_dims=True) / columns
        tl.store(MEAN + row, mean, mask=row < rows)
        h = tl.where(inside, h - mean, 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(h * h, 1, keep_dims=True) / columns + eps))
    tl.store(RSTD + row, rstd, mask=row < rows)
    y = h * rstd
    if HAS_WEIGHT:
        weight = tl.load(WEIGHT + (row % weight_lines) * columns + column, mask=inside, other=0.0)
        y *= weight.to(tl.float32) + weight_offset
    if HAS_BIAS:
        y += tl.load(BIAS + (row % bias_lines) * columns + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + row * columns + column, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_kernel(
    DY,
    DSUM,
    X,
    MEAN,
    RSTD,
    WEIGHT,
    DX,
    DWEIGHT,
    DBIAS,
    line_rows,
    columns,
    dy_stride,
    dsum_stride,
    x_stride,
    lines,
    weight_lines,
    weight_offset,
    rows_per_program,
    HAS_DSUM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    CENTER: tl.constexpr,
    WEIGHT_GRADIENT: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program p takes rows_per_program of the line_rows rows of line p % lines. DWEIGHT, DBIAS: (programs, columns)."""
    program = tl.program_id(0).to(tl.int64)
    line = program % lines
    first = (program // lines) * rows_per_program
    last = tl.minimum(first + rows_per_program, line_rows)
    column = tl.arange(0, BLOCK)[None, :]
    if HAS_WEIGHT:
        weight = tl.load(WEIGHT + (line % weight_lines) * columns + column, mask=column < columns, other=0.0)
        weight = weight.to(tl.float32) + weight_offset
    dweight = tl.zeros([1, BLOCK], tl.float32)
    dbias = tl.zeros([1, BLOCK], tl.float32)
    for begin in range(first, last, ROWS):
        at = begin + tl.arange(0, ROWS)[:, None]
        row = at * lines + line
        exists = at < last
        inside = exists & (column < columns)
        dy = tl.load(DY + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
        h = tl.load(X + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        if CENTER:
            h -= tl.load(MEAN + row, mask=exists, other=0.0)
        rstd = tl.load(RSTD + row, mask=exists, other=0.0)
        normed = tl.where(inside, h * rstd, 0.0)
        g = dy
        if HAS_WEIGHT:
            g = dy * weight
        dx = g - normed * (tl.sum(g * normed, 1, keep_dims=True) / columns)
        if CENTER:
            dx -= tl.sum(g, 1, keep_dims=True) / columns
        dx *= rstd
        if HAS_DSUM:
            dx += tl.load(DSUM + row * dsum_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(DX + row * columns + column, dx.to(DX.dtype.element_ty), mask=inside)
        if WEIGHT_GRADIENT:
            dweight += tl.sum(dy * normed, 0, keep_dims=True)
        if BIAS_GRADIENT:
            dbias += tl.sum(dy, 0, keep_dims=True)
    if WEIGHT_GRADIENT:
        tl.store(DWEIGHT + program * columns + column, dweight, mask=column < columns)
    if BIAS_GRADIENT:
        tl.store(DBIAS + program * columns + column, dbias, mask=column < columns)


def _lines(parameter) -> int:
    return 1 if parameter is None else parameter.numel() // parameter.shape[-1]


def _contiguous(parameter):
    return None if parameter is None else parameter.contiguous()


@launch.launcher
def norm(x, weight, bias, residual, eps, weight_offset, center):
    y = x.new_empty(x.shape)
    total = x.new_empty((0,) if residual is None else x.shape)
    mean = x.new_empty(x.shape[:-1] if center else (0,), dtype=torch.float32)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if y.numel() == 0:
        return y, total, mean, rstd
    x, weight, bias = launch.rows_of(x), _contiguous(weight), _contiguous(bias)
    residual = None if residual is None else launch.rows_of(residual)
    rows, columns = x.shape
    tile = launch.tile(norm_kernel, x.device, columns)
    launch.run(
        norm_kernel,
        launch.cdiv(rows, tile["ROWS"]),
        x,
        weight,
        bias,
        residual,
        y,
        total,
        mean,
        rstd,
        rows,
        columns,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        _lines(weight),
        _lines(bias),
        eps,
        weight_offset,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        CENTER=center,
        BLOCK=launch.power_of_two(columns),
        **tile,
    )
    return y, total, mean, rstd


@launch.launcher
def norm_backward(dy, dsum, x, mean, rstd, weight, bias, weight_offset, center, weight_gradient, bias_gradient):
    dx = x.new_empty(x.shape)
    wanted = [(weight, weight_gradient), (bias, bias_gradient)]
    if dx.numel() == 0:
        return dx, *((x if p is None else p).new_zeros(p.shape if w else (0,)) for p, w in wanted)
    dy, x, dsum = launch.rows_of(dy), launch.rows_of(x), None if dsum is None else launch.rows_of(dsum)
    rows, columns = x.shape
    tile = dict(launch.tile(norm_backward_kernel, x.device, columns))
    lines = max(_lines(weight), _lines(bias))
    line_rows = rows // lines
    rows_per_program = launch.cdiv(line_rows, min(line_rows, tile.pop("PROGRAMS")))
    chunks = launch.cdiv(line_rows, rows_per_program)
    partial = [x.new_empty((chunks * lines, columns) if w else 0, dtype=torch.float32) for _, w in wanted]
    launch.run(
        norm_backward_kernel,
        chunks * lines,
        dy,
        dsum,
        x,
        mean,
        rstd,
        _contiguous(weight),
        dx,
        *partial,
        line_rows,
        columns,
        dy.stride(0),
        0 if dsum is None else dsum.stride(0),
        x.stride(0),
        lines,
        _lines(weight),
        weight_offset,
        rows_per_program,
        HAS_DSUM=dsum is not None,
        HAS_WEIGHT=weight is not None,
        CENTER=center,
        WEIGHT_GRADIENT=weight_gradient,
        BIAS_GRADIENT=bias_gradient,
        BLOCK=launch.power_of_two(columns),
        **tile,
    )
    gradients = [
        p.view(-1, _lines(parameter), columns).sum(0).view(parameter.shape).to(parameter.dtype)
        if w
        else (x if parameter is None else parameter).new_empty(0)
        for p, (parameter, w) in zip(partial, wanted, strict=True)
    ]
    return dx, *gradients
