"""Activations in Triton: gated (swiglu, geglu) and of a biased input (gelu_bias). Each backward is one pass.

A program takes a tile of ROWS x BLOCK elements. Rows may have any stride, so that the halves of a joined (rows, 2N)
tensor are read in place; gated inputs that are contiguous are one long row.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from pyfast.kernels import launch


class Matrix(NamedTuple):
    """(rows, columns), of unit stride within a row."""

    data: torch.Tensor
    stride: int


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """(y, dy/dx) of an activation for fp32 x, both with their relative accuracy in the tails."""
    if ACTIVATION == "silu":
        s = 1 / (1 + tl.exp(-x))
        return x * s, s * (1 + x * (1 - s))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * libdevice.erfc(-0.7071067811865476 * x)
        return x * cdf, cdf + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is the sigmoid of 2u
        e = tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x))
        s = 1 / (1 + e)
        rest = tl.where(x > 0, e * s, 1 - s)  # 1 - s with its digits
        slope = 1.5957691216057308 * (1 + 3 * 0.044715 * x * x)
        return x * s, s + x * (s * rest) * slope
    else:
        tl.static_assert(ACTIVATION == "relu")
        return tl.maximum(x, 0.0), tl.where(x > 0, 1.0, 0.0)


@triton.jit
def tile(rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's rows (ROWS, 1), columns (1, BLOCK) and which of them exist; rows are int64 for their strides."""
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, column, (row < rows) & (column < columns)


@triton.jit
def load(x, row, column, inside):
    return tl.load(x.data + row * x.stride + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_biased(x, BIAS, row, column, columns, inside):
    value = load(x, row, column, inside)
    if BIAS is not None:
        value += tl.load(BIAS + column, mask=column < columns, other=0.0).to(tl.float32)
    return value


@triton.jit
def store(Y, value, row, column, columns, inside):
    tl.store(Y + row * columns + column, value.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def gated_kernel(gate, up, Y, rows, columns, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, column, inside = tile(rows, columns, ROWS, BLOCK)
    y, _ = activated(load(gate, row, column, inside), ACTIVATION)
    store(Y, y * load(up, row, column, inside), row, column, columns, inside)


@triton.jit
def gated_backward_kernel(
    dy, gate, up, DGATE, DUP, rows, columns, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row, column, inside = tile(rows, columns, ROWS, BLOCK)
    d = load(dy, row, column, inside)
    y, slope = activated(load(gate, row, column, inside), ACTIVATION)
    store(DGATE, d * load(up, row, column, inside) * slope, row, column, columns, inside)
    store(DUP, d * y, row, column, columns, inside)


@triton.jit
def activate_kernel(x, BIAS, Y, rows, columns, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, column, inside = tile(rows, columns, ROWS, BLOCK)
    y, _ = activated(load_biased(x, BIAS, row, column, columns, inside), ACTIVATION)
    store(Y, y, row, column, columns, inside)


@triton.jit
def activate_backward_kernel(
    dy,
    x,
    BIAS,
    DX,
    PARTIAL,
    rows,
    columns,
    ACTIVATION: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """PARTIAL (tiles of rows, columns): the sum of dx over the rows of each tile."""
    row, column, inside = tile(rows, columns, ROWS, BLOCK)
    _, slope = activated(load_biased(x, BIAS, row, column, columns, inside), ACTIVATION)
    dx = load(dy, row, column, inside) * slope
    store(DX, dx, row, column, columns, inside)
    if BIAS_GRADIENT:
        first = (tl.program_id(0) // tl.cdiv(columns, BLOCK)).to(tl.int64)
        total = tl.sum(tl.where(inside, dx, 0.0), 0, keep_dims=True)
        tl.store(PARTIAL + first * columns + column, total, mask=column < columns)


def _rows(*tensors):
    """The tensors as (rows, N); one long row where all are contiguous."""
    if all(t.is_contiguous() for t in tensors):
        return [t.view(1, -1) for t in tensors]
    return [launch.rows_of(t) for t in tensors]


def _run(kernel, tensors, results, activation, **constants):
    """Runs a kernel over the tiles of tensors (rows, N)."""
    rows, columns = tensors[0].shape
    tile = launch.tile(kernel, tensors[0].device, columns)
    programs = launch.cdiv(rows, tile["ROWS"]) * launch.cdiv(columns, tile["BLOCK"])
    matrices = [t if t is None or t.dim() == 1 else Matrix(t, t.stride(0)) for t in tensors]  # a bias has one row
    launch.run(kernel, programs, *matrices, *results, rows, columns, ACTIVATION=activation, **constants, **tile)


def activation_of(hidden, activation, gradient=None):
    """activation(gate) * up for hidden [gate, up], activation(up) for [up]; with its gradient, those of hidden."""
    if len(hidden) == 2:
        return gated(*hidden, activation) if gradient is None else gated_backward(gradient, *hidden, activation)
    (x,) = (launch.rows_of(t) for t in hidden)
    y = x.new_empty(x.shape)
    if y.numel() == 0:
        return y if gradient is None else [y]
    if gradient is None:
        _run(activate_kernel, [x, None], [y], activation)
        return y
    _run(activate_backward_kernel, [gradient, x, None], [y, None], activation, BIAS_GRADIENT=False)
    return [y]


@launch.launcher
def gated(gate, up, activation):
    y = gate.new_empty(gate.shape)
    if y.numel():
        _run(gated_kernel, _rows(gate, up), [y], activation)
    return y


@launch.launcher
def gated_backward(dy, gate, up, activation):
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    if dgate.numel():
        _run(gated_backward_kernel, _rows(dy, gate, up), [dgate, dup], activation)
    return dgate, dup


@launch.launcher
def activate(x, bias, activation):
    y = x.new_empty(x.shape)
    if y.numel():
        _run(activate_kernel, [launch.rows_of(x), bias.contiguous()], [y], activation)
    return y


@launch.launcher
def activate_backward(dy, x, bias, activation, bias_gradient):
    dx = x.new_empty(x.shape)
    if dx.numel() == 0:
        return dx, bias.new_zeros(bias.shape if bias_gradient else (0,))
    dy, x, bias = launch.rows_of(dy), launch.rows_of(x), bias.contiguous()
    tiles = launch.cdiv(len(x), launch.tile(activate_backward_kernel, x.device, x.shape[1])["ROWS"])
    partial = bias.new_empty((tiles, len(bias)) if bias_gradient else 0, dtype=torch.float32)
    _run(activate_backward_kernel, [dy, x, bias], [dx, partial], activation, BIAS_GRADIENT=bias_gradient)
    return dx, partial.sum(0).to(bias.dtype) if bias_gradient else bias.new_empty(0)
