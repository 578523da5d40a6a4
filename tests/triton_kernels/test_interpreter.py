"""The repaired interpreter: it computes what a GPU computes, and catches a planted bug of each kind."""

import numpy as np
import pytest
import torch
from close import assert_close

from pyfast import dispatch

if dispatch.unavailable("triton") or not dispatch.INTERPRETING:
    reason = dispatch.unavailable("triton") or "this process compiles Triton kernels for a GPU"
    pytest.skip(reason, allow_module_level=True)

import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime.errors import InterpreterError

from pyfast import triton_interpreter


@triton.jit
def scale_kernel(
    X, Y, rows, columns, stride, factor, MASK: tl.constexpr, STORE_MASK: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    if MASK:
        x = tl.load(X + row * stride + at, mask=at < columns)
    else:
        x = tl.load(X + row * stride + at)
    if STORE_MASK:
        tl.store(Y + row * columns + at, x * factor.to(x.dtype), mask=at < columns)
    else:
        tl.store(Y + row * columns + at, x * factor.to(x.dtype))


@triton.jit
def sum_kernel(X, Y, columns, BLOCK: tl.constexpr, ZERO: tl.constexpr):
    at = tl.arange(0, BLOCK)
    if ZERO:
        x = tl.load(X + at, mask=at < columns, other=0)
    else:
        x = tl.load(X + at, mask=at < columns)
    tl.store(Y, tl.sum(x, 0))


@triton.jit
def same_address_kernel(Y, READ: tl.constexpr):
    if READ and tl.program_id(0) == 1:
        tl.store(Y + 1, tl.load(Y))
    else:
        tl.store(Y, 1.0)


@triton.jit
def transposed_kernel(X, Y, stride, SIZE: tl.constexpr):
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    tl.store(Y + i * SIZE + j, tl.load(tl.trans(X + j * stride + i)))


@triton.jit
def dot_kernel(A, B, C, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(C + at, tl.dot(tl.load(A + at), tl.load(B + at), input_precision="ieee"))


@triton.jit
def arithmetic_kernel(X, Y, Z, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x, y = tl.load(X + at), tl.load(Y + at)
    z = tl.where(x > y, x * y + x, -x / y)
    tl.store(Z + at, z + libdevice.tanh(z.to(tl.float32)).to(z.dtype))


@triton.jit
def reduce_kernel(X, Y, BLOCK: tl.constexpr):
    x = tl.load(X + tl.arange(0, BLOCK))
    tl.store(Y, tl.sum(x, 0).to(x.dtype))
    tl.store(Y + 1, tl.max(x, 0).to(x.dtype))
    tl.store(Y + 2, tl.min(x, 0).to(x.dtype))


@triton.jit
def bound_kernel(N, Y):
    total = 0
    for i in range(0, tl.load(N)):
        total += i
    tl.store(Y, total)


def scale(rows, columns, block, mask=True, store_mask=True, x=None):
    x = torch.randn(rows, columns) if x is None else x
    y = torch.empty(x.shape)
    scale_kernel[(rows,)](x, y, rows, columns, x.stride(0), 2.5, mask, store_mask, block)
    return x, y


def test_masked_lanes_are_left_alone():
    x, y = scale(3, 5, 8)
    assert torch.equal(y, x * 2.5)


def test_lane_outside_its_tensor():
    with pytest.raises(InterpreterError, match=r"load: 3 of 8 lanes lie outside their float32 tensor \(1, 5\)"):
        scale(1, 5, 8, mask=False)
    with pytest.raises(InterpreterError, match=r"store: 3 of 8 lanes lie outside their float32 tensor \(1, 5\)"):
        scale(1, 5, 8, mask=True, store_mask=False)


def test_lane_in_another_tensor_of_the_same_launch():
    """A lane past its own tensor is caught, though the address belongs to another argument."""
    both = torch.randn(2, 8)
    with pytest.raises(InterpreterError, match=r"load: 1 of 8 lanes lie outside their float32 tensor \(7,\)"):
        scale_kernel[(1,)](both[0, :7], both[1], 1, 8, 8, 1.0, True, True, 8)


def test_lane_in_the_gap_of_a_view():
    with pytest.raises(InterpreterError, match=r"load: 3 of 8 lanes lie outside their float32 tensor \(2, 5\)"):
        scale(2, 5, 8, mask=False, x=torch.randn(2, 8)[:, :5])
    x, y = scale(2, 5, 8, x=torch.randn(2, 8)[:, :5])
    assert torch.equal(y, x * 2.5)


def test_two_programs_store_to_one_address():
    with pytest.raises(InterpreterError, match="race: program 1 and another store to one address"):
        same_address_kernel[(2,)](torch.zeros(2), False)
    same_address_kernel[(1,)](torch.zeros(2), False)


def test_a_program_loads_what_another_stored():
    with pytest.raises(InterpreterError, match="race: program 1 loads what another has stored"):
        same_address_kernel[(2,)](torch.zeros(2), True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_off_lane_reaches_a_result(dtype):
    x, y = torch.ones(5, dtype=dtype), torch.zeros((), dtype=dtype)
    sum_kernel[(1,)](x, y, 5, 8, False)
    assert y.isnan()
    sum_kernel[(1,)](x, y, 5, 8, True)
    assert y == 5


def test_masked_off_integer_lane_reaches_a_result():
    y = torch.zeros((), dtype=torch.int64)
    sum_kernel[(1,)](torch.ones(5, dtype=torch.int64), y, 5, 8, False)
    assert y > 2**60 or y < 0


def test_pointers_through_transposes():
    x, y = torch.randn(8, 10)[:, :8], torch.empty(8, 8)
    transposed_kernel[(1,)](x, y, 10, 8)
    assert torch.equal(y, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dot(dtype):
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype), torch.empty(16, 16)
    dot_kernel[(1,)](a, b, c, 16)
    assert_close(c, a.double() @ b.double(), a.float() @ b.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arithmetic(dtype):
    x, y, z = torch.randn(64).to(dtype), torch.randn(64).to(dtype), torch.empty(64, dtype=dtype)
    arithmetic_kernel[(1,)](x, y, z, 64)

    def by_torch(x, y):
        value = torch.where(x > y, x * y + x, -x / y)
        return value + value.tanh()

    assert_close(z, by_torch(x.double(), y.double()), by_torch(x, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reductions(dtype):
    x, y = torch.randn(64).to(dtype), torch.empty(3, dtype=dtype)
    reduce_kernel[(1,)](x, y, 64)
    expected = torch.stack([x.double().sum(), x.double().max(), x.double().min()])
    assert_close(y, expected, expected.to(dtype))


def test_rounding_to_bfloat16():
    x = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 3.4e38, 1e-40, 1.00390625])])
    bits = triton_interpreter.to_bfloat16(x.numpy())
    assert np.array_equal(bits, x.bfloat16().view(torch.uint16).numpy())
    assert np.array_equal(triton_interpreter.from_bfloat16(bits), x.bfloat16().float().numpy())
    assert np.isnan(triton_interpreter.from_bfloat16(triton_interpreter.to_bfloat16(np.array([np.nan]))))


def test_loop_to_a_loaded_bound():
    y = torch.zeros((), dtype=torch.int32)
    bound_kernel[(1,)](torch.tensor([5], dtype=torch.int32), y)
    assert y == 10
