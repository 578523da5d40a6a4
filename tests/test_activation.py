import pytest
import torch
from harness import KERNELS, available, check, run
from hypothesis import given, settings
from hypothesis import strategies as st

import pyfast
from pyfast.ops import geglu, gelu_bias, swiglu


def geglu_tanh(gate, up):
    return geglu(gate, up, approximate="tanh")


def gelu_tanh_bias(x, bias):
    return gelu_bias(x, bias, approximate="tanh")


GATED = [swiglu, geglu, geglu_tanh]
BIASED = [gelu_bias, gelu_tanh_bias]


def leaf(shape, dtype, scale=1.0):
    return (torch.randn(shape) * scale).to(dtype).requires_grad_()


@pytest.fixture(params=GATED, ids=lambda f: f.__name__)
def gated(request):
    return request.param


@pytest.fixture(params=BIASED, ids=lambda f: f.__name__)
def biased(request):
    return request.param


@pytest.mark.parametrize("shape", [(9, 33), (2, 5, 128), (0, 8), (8, 0), (129, 151)])
def test_error_rule(gated, kernel, dtype, shape):
    check(gated, [leaf(shape, dtype), leaf(shape, dtype)], backend=kernel[0], arch=kernel[1])


@pytest.mark.parametrize("shape", [(9, 33), (2, 5, 128), (0, 8), (8, 0), (600, 35)])
@pytest.mark.parametrize("fp32_bias", [False, True])
def test_error_rule_with_bias(biased, kernel, dtype, shape, fp32_bias):
    bias = leaf(shape[-1:], torch.float32 if fp32_bias else dtype)
    check(biased, [leaf(shape, dtype), bias], backend=kernel[0], arch=kernel[1])


@pytest.mark.parametrize("scale_x, scale_bias", [(0.01, 3.0), (3.0, 0.01)])
def test_each_term_dominates(biased, kernel, dtype, scale_x, scale_bias):
    x, bias = leaf((40, 48), dtype, scale_x), leaf((48,), dtype, scale_bias)
    check(biased, [x, bias], backend=kernel[0], arch=kernel[1])
    check(biased, [x, bias.detach()], backend=kernel[0], arch=kernel[1])  # a frozen bias gets no gradient
    check(biased, [x.detach(), bias], backend=kernel[0], arch=kernel[1])


@pytest.mark.parametrize("shape", [(), (1,), (7,)])
def test_few_elements(gated, kernel, dtype, shape):
    """Each element is computed alone: bit-equal to the same element of a larger call."""
    args = [leaf((50,), dtype), leaf((50,), dtype)]
    few = [x.detach()[: torch.Size(shape).numel()].reshape(shape).requires_grad_() for x in args]
    cotangent = torch.randn(50).to(dtype)
    whole = run(gated, args, backend=kernel[0], arch=kernel[1], cotangents=[cotangent])
    part = run(gated, few, backend=kernel[0], arch=kernel[1], cotangents=[cotangent[: few[0].numel()].reshape(shape)])
    for w, p in zip(whole[0] + whole[1], part[0] + part[1], strict=True):
        assert torch.equal(w[: p.numel()], p.reshape(-1))


def test_saturated(kernel, dtype):
    """Far out on both sides: no NaN, the identity on the right and zero on the left."""
    x = torch.linspace(-200, 200, 401).to(dtype).requires_grad_()
    for gated in GATED:
        check(gated, [x, torch.ones(401, dtype=dtype, requires_grad=True)], backend=kernel[0], arch=kernel[1])
    for biased in BIASED:
        check(biased, [x, torch.zeros(401, dtype=dtype, requires_grad=True)], backend=kernel[0], arch=kernel[1])


def test_tail(kernel):
    """The left tail keeps its relative accuracy, where 1 + erf cancels in PyTorch."""
    x = torch.linspace(-8, -3, 301)
    with pyfast.use_backend(kernel[0], arch=kernel[1]):
        y = gelu_bias(x, torch.zeros(301))
    truth = pyfast.reference.gelu(x.double())
    assert ((y - truth) / truth).abs().max() < 1e-5


def test_nan_and_infinity(kernel, dtype):
    x = torch.tensor([float("nan"), float("inf"), 1.0] * 7, dtype=dtype)
    with pyfast.use_backend(kernel[0], arch=kernel[1]):
        for op in GATED + BIASED:
            y = op(x, torch.full_like(x, 1 if op in GATED else 0))
            assert y[0::3].isnan().all()
            assert (y[1::3] == float("inf")).all()
            assert y[2::3].isfinite().all()


def test_not_contiguous(kernel, dtype):
    gate, up = (leaf((68, 42), dtype).detach().transpose(0, 1)[:, ::2].requires_grad_() for _ in range(2))
    expanded = leaf((5, 1, 39), dtype).detach().expand(5, 4, 39)
    for gated in GATED:
        check(gated, [gate, up], backend=kernel[0], arch=kernel[1])
        check(gated, [expanded, leaf((5, 4, 39), dtype)], backend=kernel[0], arch=kernel[1])
    for biased in BIASED:
        check(biased, [gate, up.detach()[0].requires_grad_()], backend=kernel[0], arch=kernel[1])


@pytest.mark.parametrize("cols", [19, 64])
def test_halves_of_a_joined_tensor(gated, kernel, dtype, cols):
    """gate and up as a joined projection gives them: read in place, and no copy is kept for backward."""
    joined = leaf((2, 7, 2 * cols), dtype)

    def op(joined):
        return gated(*joined.chunk(2, dim=-1))

    check(op, [joined], backend=kernel[0], arch=kernel[1])
    kept = []
    with (
        pyfast.use_backend(kernel[0], arch=kernel[1]),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        assert op(joined).is_contiguous()
    assert len(kept) == 2
    assert all(t.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr() for t in kept)


@given(
    st.lists(st.sampled_from([0, 4, 5, 7]), min_size=1, max_size=2),
    st.integers(64, 150),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_drawn_shapes(leading, cols, dtype):
    for op in GATED:
        check(op, [leaf((*leading, cols), dtype), leaf((*leading, cols), dtype)])
    for op in BIASED:
        check(op, [leaf((*leading, cols), dtype), leaf((cols,), dtype)])


def test_bias_gradient_is_the_same_for_any_number_of_threads():
    x, bias = leaf((1000, 40), torch.float32), leaf((40,), torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run(gelu_bias, [x, bias], backend="cpu")[1])
    finally:
        torch.set_num_threads(threads)
    for r in results[1:]:
        assert torch.equal(r[0], results[0][0])
        assert torch.equal(r[1], results[0][1])


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_reference_gradient(backend):
    gate, up, bias = leaf((3, 5), torch.float64), leaf((3, 5), torch.float64), leaf((5,), torch.float64)
    with pyfast.use_backend(backend):
        for op in GATED:
            assert torch.autograd.gradcheck(op, (gate, up))
        for op in BIASED:
            assert torch.autograd.gradcheck(op, (gate, bias))


def test_opcheck():
    joined, bias, dy = torch.randn(3, 34), torch.randn(17), torch.randn(3, 17)
    gate, up = joined.chunk(2, -1)
    ops = torch.ops.pyfast_cpu
    for activation in ("silu", "gelu", "gelu_tanh", "relu"):
        torch.library.opcheck(ops.gated.default, (gate, up, activation))
        torch.library.opcheck(ops.gated_backward.default, (dy, gate, up, activation))
        torch.library.opcheck(ops.activate.default, (gate, bias, activation))
        for wanted in (True, False):
            torch.library.opcheck(ops.activate_backward.default, (dy, gate, bias, activation, wanted))


@pytest.mark.parametrize("call, words", [
    (lambda o: o.gated(torch.randn(3), torch.randn(4), "silu"), "up has shape"),
    (lambda o: o.gated(torch.randn(3), torch.randn(3).half(), "silu"), "dtype"),
    (lambda o: o.gated(torch.randn(3), torch.randn(3), "selu"), "no activation"),
    (lambda o: o.activate(torch.randn(3), torch.randn(4), "gelu"), "bias has shape"),
    (lambda o: o.activate_backward(torch.randn(2), torch.randn(3), torch.randn(3), "gelu", True), "dy has shape"),
])  # fmt: skip
def test_kernels_refuse_what_would_read_out_of_bounds(call, words):
    with pytest.raises(RuntimeError, match=words):
        call(torch.ops.pyfast_cpu)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(compiler):
    def op(x, up, bias):
        return swiglu(x, up) + geglu(x, up) + gelu_bias(x, bias)

    args = [leaf((4, 33), torch.float32), leaf((4, 33), torch.float32), leaf((33,), torch.float32)]
    compiled = torch.compile(op, fullgraph=True, backend=compiler)
    eager, compiled = run(op, args, backend="cpu"), run(compiled, args, backend="cpu")
    torch.testing.assert_close(compiled[:2], eager[:2], rtol=0, atol=0)


def test_compile_with_changing_shapes():
    compiled = torch.compile(lambda j, b: gelu_bias(swiglu(*j.chunk(2, -1)), b), fullgraph=True, backend="aot_eager")
    for rows in (4, 7, 9):
        args = [leaf((rows, 66), torch.float32), leaf((33,), torch.float32)]
        eager = run(lambda j, b: gelu_bias(swiglu(*j.chunk(2, -1)), b), args, backend="cpu")
        torch.testing.assert_close(run(compiled, args, backend="cpu")[:2], eager[:2], rtol=0, atol=0)


def test_backward_twice(gated, kernel):
    gate, up = leaf((4, 20), torch.float32), leaf((4, 20), torch.float32)
    with pyfast.use_backend(kernel[0], arch=kernel[1]):
        y = gated(gate, up).sum()
        first = torch.autograd.grad(y, (gate, up), retain_graph=True)
        assert all(map(torch.equal, first, torch.autograd.grad(y, (gate, up))))


@pytest.mark.parametrize(
    "up, error, words",
    [
        (torch.randn(4), ValueError, "up is float32 \\(4,\\)"),
        (torch.randn(3).bfloat16(), TypeError, "up is bfloat16"),
        (torch.randn(3, device="meta"), ValueError, "on meta"),
        (None, TypeError, "up is NoneType"),
    ],
)
def test_bad_input(gated, up, error, words):
    with pytest.raises(error, match=words):
        gated(torch.randn(3), up)


@pytest.mark.parametrize(
    "x, bias, error, words",
    [
        (torch.randn(2, 4), torch.randn(3), ValueError, r"bias is \(3,\), expected \(4,\)"),
        (torch.randn(2, 4), torch.randn(4).half(), TypeError, "bias is float16"),
        (torch.randn(2, 4), torch.randn(4, device="meta"), ValueError, "on meta"),
        (torch.randn(2, 4), None, TypeError, "bias is NoneType"),
        (torch.tensor(1.0), torch.randn(1), ValueError, "scalar"),
        (torch.ones(2, dtype=torch.int64), torch.randn(2), TypeError, "x is int64"),
    ],
)
def test_bad_input_with_bias(biased, x, bias, error, words):
    with pytest.raises(error, match=words):
        biased(x, bias)


def test_bad_approximate():
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="approximate is 'fast'"):
        geglu(x, x, "fast")
    with pytest.raises(ValueError, match="approximate is 'erf'"):
        gelu_bias(x, x[0], "erf")


def test_second_derivative_and_vmap_raise():
    x, other = leaf((4, 4), torch.float32), leaf((4, 4), torch.float32)
    for op in (*GATED, lambda x, b: gelu_bias(x, b[0])):
        (dx,) = torch.autograd.grad(op(x, other).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(dx.sum(), x)
        with pytest.raises(RuntimeError, match="vmap"):
            torch.func.vmap(op)(x.detach()[None], other.detach()[None])


@pytest.mark.parametrize("cpu", KERNELS, ids=lambda k: "-".join(filter(None, k)))
def test_subnormal_results_are_flushed_in_kernels_only(cpu):
    """Beyond the smallest normal number a tail is 0, never a subnormal; what PyTorch computes afterwards keeps them.

    A GPU computes with subnormals at full speed. Accuracy of normal results is test_gelu_bias's subject; here they are
    only told from wrong ones, their argument's rounding being magnified by its square.
    """
    if (reason := available(*cpu)) is not None:
        pytest.skip(reason)
    x = torch.linspace(-15, -12, 4096).requires_grad_()
    (y,), (gradient,), _ = run(gelu_bias, [x, torch.zeros(4096)], {}, *cpu)
    tiny = torch.finfo(torch.float32).tiny
    for values in (y, gradient):
        assert ((values == 0) | (values.abs() >= tiny)).all() and values[0] == 0 and values[-1] != 0
    (expected,), (expected_gradient,), _ = run(gelu_bias, [x, torch.zeros(4096)], {}, "reference")
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=32 * tiny)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=32 * tiny)
    assert (torch.full((4096,), 1e-39) * 0.5 != 0).all()
