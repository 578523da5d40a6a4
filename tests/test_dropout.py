import pytest
import torch
from harness import check, run

import pyfast
from pyfast import philox
from pyfast.ops import dropout


@pytest.mark.parametrize("shape", [(3, 5, 37), (1,), (0, 4), (4100,), (64, 1024)])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.9])
def test_error_rule(kernel, dtype, shape, p):
    x = torch.randn(shape).to(dtype).requires_grad_()
    check(dropout, [x, p], {"seed": 11}, backend=kernel[0], arch=kernel[1])


def test_mask_is_philox(kernel, dtype):
    x = torch.ones(70, 1003, dtype=dtype)
    with pyfast.use_backend(kernel[0], arch=kernel[1]):
        kept = dropout(x, 0.3, seed=5) != 0
    assert torch.equal(kept, philox.keep_mask(torch.arange(x.numel()).view_as(x), 0.3, 5))


def test_layouts(kernel):
    x = torch.randn(6, 33).requires_grad_()
    outputs, gradients, _ = run(lambda x: dropout(x.t(), 0.4, seed=2), [x], None, *kernel)
    expected, expected_gradients, _ = run(lambda x: dropout(x.t(), 0.4, seed=2), [x], None, "torch")
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(gradients, expected_gradients)


def test_what_is_dropped_is_zero(kernel):
    with pyfast.use_backend(kernel[0], arch=kernel[1]):
        y = dropout(torch.full((4096,), torch.inf), 0.5, seed=1)
    assert set(y.tolist()) == {0.0, torch.inf}


def test_seeds():
    x = torch.ones(1000)
    torch.manual_seed(1)
    a, b = dropout(x, 0.5), dropout(x, 0.5)
    assert not torch.equal(a, b)
    torch.manual_seed(1)
    assert torch.equal(dropout(x, 0.5), a)
    assert torch.equal(dropout(x, 0.5, seed=3), dropout(x, 0.5, seed=torch.tensor(3)))


def test_bad_input():
    with pytest.raises(TypeError, match="expected a floating-point tensor"):
        dropout(torch.ones(3, dtype=torch.long), 0.1)
    with pytest.raises(TypeError, match="dropout_p is 'a'"):
        dropout(torch.ones(3), "a")
    with pytest.raises(ValueError, match="dropout_p is 1"):
        dropout(torch.ones(3), 1.0)


def test_opcheck_and_compile():
    x = torch.randn(5, 33).requires_grad_()
    torch.library.opcheck(torch.ops.pyfast_cpu.dropout.default, (x.detach(), torch.tensor(3), 0.5))
    compiled = torch.compile(lambda x, seed: dropout(x, 0.5, seed=seed), backend="aot_eager", fullgraph=True)
    y = compiled(x, torch.tensor(3))
    assert torch.equal(y, dropout(x, 0.5, seed=3))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, (y != 0) * 2.0)


def test_gradcheck_and_second_derivative():
    x = torch.randn(40, dtype=torch.float64, requires_grad=True)
    with pyfast.use_backend("reference"):
        assert torch.autograd.gradcheck(lambda x: dropout(x, 0.3, seed=4), x)
    x = torch.randn(40, requires_grad=True)
    (gradient,) = torch.autograd.grad(dropout(x, 0.3, seed=4).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()
