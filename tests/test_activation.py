import pytest
import torch
from harness import check, run
from hypothesis import given, settings
from hypothesis import strategies as st

import pyfast
from pyfast.ops import geglu, gelu_bias, swiglu


def inputs(shape, dtype, scale=1.0):
    return [(torch.randn(shape) * scale).to(dtype).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("shape", [(37,), (3, 33), (2, 5, 128), (0, 8), (257, 301)])
def test_error_rule(kernel, dtype, shape):
    check(swiglu, inputs(shape, dtype), backend=kernel[0], arch=kernel[1])


@pytest.mark.parametrize("shape", [(), (1,), (7,)])
def test_few_elements(kernel, dtype, shape):
    """Each element is computed alone: bit-equal to the same element of a larger call."""
    args = inputs((50,), dtype)
    few = [x.detach()[: torch.Size(shape).numel()].reshape(shape).requires_grad_() for x in args]
    cotangent = torch.randn(50).to(dtype)
    whole = run(swiglu, args, backend=kernel[0], arch=kernel[1], cotangents=[cotangent])
    part = run(swiglu, few, backend=kernel[0], arch=kernel[1], cotangents=[cotangent[: few[0].numel()].reshape(shape)])
    for w, p in zip(whole[0] + whole[1], part[0] + part[1], strict=True):
        assert torch.equal(w[: p.numel()], p.reshape(-1))


def test_large_values(kernel, dtype):
    """The sigmoid saturates on both sides without a NaN."""
    gate = torch.linspace(-200, 200, 401).to(dtype).requires_grad_()
    check(swiglu, [gate, torch.ones(401, dtype=dtype, requires_grad=True)], backend=kernel[0], arch=kernel[1])


def test_not_contiguous(kernel, dtype):
    gate, up = (x.detach().transpose(0, 1)[:, ::2].requires_grad_() for x in inputs((34, 21), dtype))
    check(swiglu, [gate, up], backend=kernel[0], arch=kernel[1])


@given(st.lists(st.integers(0, 40), min_size=1, max_size=3))
@settings(max_examples=20, deadline=None)
def test_drawn_shapes(shape):
    check(swiglu, inputs(shape, torch.float32))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_reference_gradient(backend):
    gate, up = inputs((3, 5), torch.float64)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    with pyfast.use_backend(backend):
        assert torch.autograd.gradcheck(swiglu, (gate, up))
        for approximate in ("none", "tanh"):
            assert torch.autograd.gradcheck(lambda g, u, a=approximate: geglu(g, u, a), (gate, up))
            assert torch.autograd.gradcheck(lambda x, b, a=approximate: gelu_bias(x, b, a), (gate, bias))


def test_bad_input_of_gelu():
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="approximate is 'fast'"):
        geglu(x, x, "fast")
    with pytest.raises(ValueError, match="approximate is 'erf'"):
        gelu_bias(x, x[0], "erf")
    with pytest.raises(ValueError, match="up is"):
        geglu(x, x[0])
    with pytest.raises(ValueError, match=r"bias is \(3,\), expected \(4,\)"):
        gelu_bias(x, torch.randn(3))
    with pytest.raises(TypeError, match="bias is float16"):
        gelu_bias(x, torch.randn(4).half())
    with pytest.raises(ValueError, match="scalar"):
        gelu_bias(torch.tensor(1.0), torch.randn(1))


def test_opcheck():
    gate, up = torch.randn(3, 17), torch.randn(3, 17)
    torch.library.opcheck(torch.ops.pyfast_cpu.swiglu.default, (gate, up))
    torch.library.opcheck(torch.ops.pyfast_cpu.swiglu_backward.default, (gate, gate, up))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(compiler):
    args = inputs((4, 33), torch.float32)
    compiled = torch.compile(lambda a, b: swiglu(a, b), fullgraph=True, backend=compiler)
    eager, compiled = run(swiglu, args, backend="cpu"), run(compiled, args, backend="cpu")
    torch.testing.assert_close(compiled[:2], eager[:2], rtol=0, atol=0)


@pytest.mark.parametrize(
    "up, error, words",
    [
        (torch.randn(4), ValueError, "up is float32 \\(4,\\)"),
        (torch.randn(3).bfloat16(), TypeError, "up is bfloat16"),
        (torch.randn(3, device="meta"), ValueError, "on meta"),
        (None, TypeError, "up is NoneType"),
    ],
)
def test_bad_input(up, error, words):
    with pytest.raises(error, match=words):
        swiglu(torch.randn(3), up)


def test_second_derivative_and_vmap_raise():
    gate, up = inputs((4,), torch.float32)
    (dgate,) = torch.autograd.grad(swiglu(gate, up).sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(dgate.sum(), gate)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(swiglu)(gate.detach(), up.detach())
