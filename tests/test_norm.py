import pytest
import torch
from harness import check, run
from hypothesis import given, settings
from hypothesis import strategies as st

import pyfast
from pyfast.ops import layer_norm, rms_norm


def leaf(*shape, dtype=torch.float32, scale=1.0, shift=0.0):
    return (torch.randn(*shape) * scale + shift).to(dtype).requires_grad_()


def rms(x, weight=None, bias=None, residual=None, eps=1e-5, **options):
    assert bias is None
    return rms_norm(x, weight, eps, residual=residual, **options)


def layer(x, weight=None, bias=None, residual=None, eps=1e-5):
    return layer_norm(x, weight, bias, eps, residual=residual)


#: (function, whether it takes a bias)
NORMS = [(rms, False), (layer, True)]


def arguments(shape, dtype, *, bias, weight_shape=None, parameter_dtype=None, residual=False):
    weight_shape = shape[-1:] if weight_shape is None else weight_shape
    parameter_dtype = dtype if parameter_dtype is None else parameter_dtype
    return {
        "x": leaf(*shape, dtype=dtype),
        "weight": leaf(*weight_shape, dtype=parameter_dtype),
        "bias": leaf(*weight_shape, dtype=parameter_dtype) if bias else None,
        "residual": leaf(*shape, dtype=dtype) if residual else None,
    }


@pytest.fixture(params=NORMS, ids=["rms_norm", "layer_norm"])
def norm(request):
    return request.param


@pytest.mark.parametrize("shape", [(9, 33), (2, 5, 128), (0, 32), (600, 35), (130, 256)])
@pytest.mark.parametrize("residual", [False, True])
def test_error_rule(norm, kernel, dtype, shape, residual):
    kwargs = arguments(shape, dtype, bias=norm[1], residual=residual)
    check(norm[0], [], kwargs, backend=kernel[0], arch=kernel[1])


def test_one_row_alone(norm, kernel, dtype):
    """A row's result depends on nothing else: bit-equal without leading dimensions and among other rows."""
    kwargs = arguments((5, 67), dtype, bias=norm[1], residual=True)
    kwargs = {k: v if v is None or k in ("x", "residual") else v.detach() for k, v in kwargs.items()}
    row = {k: v[3].detach().requires_grad_() if k in ("x", "residual") else v for k, v in kwargs.items()}
    cotangents = [torch.randn(5, 67).to(dtype) for _ in range(2)]
    whole = run(norm[0], [], kwargs, backend=kernel[0], arch=kernel[1], cotangents=cotangents)
    alone = run(norm[0], [], row, backend=kernel[0], arch=kernel[1], cotangents=[c[3] for c in cotangents])
    for w, a in zip(whole[0] + whole[1], alone[0] + alone[1], strict=True):
        assert torch.equal(w[3], a)


def test_fp32_parameters(norm, kernel, dtype):
    """PEFT's modules_to_save and mixed-precision models keep them so."""
    kwargs = arguments((40, 48), dtype, bias=norm[1], parameter_dtype=torch.float32, residual=True)
    check(norm[0], [], kwargs, backend=kernel[0], arch=kernel[1])


def test_gradients_of_what_asks_for_them(norm, kernel, dtype):
    for frozen in ({"weight"}, {"bias"}, {"weight", "bias"}, {"x"}, {"x", "weight"}, {"residual"}, {"x", "residual"}):
        kwargs = arguments((40, 48), dtype, bias=norm[1], residual=True)
        kwargs = {k: v.detach() if k in frozen and v is not None else v for k, v in kwargs.items()}
        if norm[1] or frozen != {"bias"}:
            check(norm[0], [], kwargs, backend=kernel[0], arch=kernel[1])


def test_without_parameters(norm, kernel, dtype):
    check(norm[0], [leaf(40, 48, dtype=dtype)], backend=kernel[0], arch=kernel[1])
    check(layer, [leaf(40, 48, dtype=dtype), leaf(48, dtype=dtype)], backend=kernel[0], arch=kernel[1])
    check(layer, [leaf(40, 48, dtype=dtype), None, leaf(48, dtype=dtype)], backend=kernel[0], arch=kernel[1])


def test_weight_offset(kernel, dtype):
    """Gemma's 1 + weight, where either is the larger."""
    for scale in (1e-3, 1.0, 30.0):
        kwargs = {"x": leaf(40, 48, dtype=dtype), "weight": leaf(48, dtype=dtype, scale=scale), "weight_offset": 1.0}
        check(rms, [], kwargs, backend=kernel[0], arch=kernel[1])


def test_weight_per_head(norm, kernel, dtype):
    """(B, S, H, D) with a weight (H, D), as Cohere's query norm, and a bias of another number of lines."""
    kwargs = arguments((2, 9, 4, 32), dtype, bias=norm[1], weight_shape=(4, 32))
    check(norm[0], [], kwargs, backend=kernel[0], arch=kernel[1])
    kwargs = arguments((2, 9, 4, 32), dtype, bias=norm[1], weight_shape=(9, 4, 32), residual=True)
    check(norm[0], [], kwargs, backend=kernel[0], arch=kernel[1])
    kwargs = {"x": leaf(2, 9, 4, 32, dtype=dtype), "weight": leaf(32, dtype=dtype), "bias": leaf(4, 32, dtype=dtype)}
    check(layer, [], kwargs, backend=kernel[0], arch=kernel[1])


@pytest.mark.parametrize(
    "scale, shift, eps", [(1.0, 0.0, 10.0), (1e-3, 0.0, 1e-5), (30.0, 0.0, 1e-5), (0.1, 5.0, 1e-5)]
)
def test_each_term_dominates(norm, kernel, dtype, scale, shift, eps):
    """eps, small and large rows, and a mean far from zero."""
    kwargs = {"x": leaf(40, 80, dtype=dtype, scale=scale, shift=shift), "weight": leaf(80, dtype=dtype), "eps": eps}
    check(norm[0], [], kwargs, backend=kernel[0], arch=kernel[1])


@pytest.mark.parametrize("scale_y, scale_h", [(1.0, 1e-3), (1e-3, 1.0), (1.0, None), (None, 1.0)])
def test_gradient_through_both_results(norm, kernel, dtype, scale_y, scale_h):
    kwargs = arguments((40, 48), dtype, bias=norm[1], residual=True)
    kwargs["weight"] = kwargs["weight"] if scale_y is not None else kwargs["weight"].detach()
    kwargs["bias"] = kwargs["bias"] if scale_y is not None or not norm[1] else kwargs["bias"].detach()
    scales = [s for s in (scale_y, scale_h) if s is not None]

    def used(**kwargs):
        results = norm[0](**kwargs)
        return tuple(r for r, s in zip(results, (scale_y, scale_h), strict=True) if s is not None)

    cotangents = [(torch.randn(40, 48) * s).to(dtype) for s in scales]
    check(used, [], kwargs, backend=kernel[0], arch=kernel[1], cotangents=cotangents)


def test_zero_row(norm, kernel, dtype):
    """A row of zeros gives the bias, and finite gradients through eps."""
    kwargs = arguments((40, 48), dtype, bias=norm[1])
    with torch.no_grad():
        kwargs["x"][7] = 0
    check(norm[0], [], kwargs, backend=kernel[0], arch=kernel[1])


def test_not_contiguous(norm, kernel, dtype):
    def view(x):
        return x.detach().requires_grad_()

    kwargs = arguments((24, 36), dtype, bias=norm[1], residual=True)
    kwargs["x"] = view(leaf(24, 72, dtype=dtype)[:, 36:])  # rows with a stride
    kwargs["residual"] = view(leaf(72, 24, dtype=dtype).t()[:, ::2])  # elements with a stride
    check(norm[0], [], kwargs, backend=kernel[0], arch=kernel[1])
    kwargs = arguments((2, 5, 3, 32), dtype, bias=norm[1])
    kwargs["x"] = view(leaf(2, 3, 5, 32, dtype=dtype).transpose(1, 2))  # no single stride between rows
    kwargs["weight"] = view(leaf(64, dtype=dtype)[::2])
    check(norm[0], [], kwargs, backend=kernel[0], arch=kernel[1])
    kwargs["x"] = view(leaf(2, 1, 3, 32, dtype=dtype).expand(2, 5, 3, 32))
    check(norm[0], [], kwargs, backend=kernel[0], arch=kernel[1])


@given(
    st.lists(st.sampled_from([0, 4, 5, 7]), min_size=1, max_size=2), st.integers(48, 150), st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
@settings(max_examples=20, deadline=None, derandomize=True)
def test_drawn_shapes(leading, cols, residual, dtype):
    for f, bias in NORMS:
        check(f, [], arguments((*leading, cols), dtype, bias=bias, residual=residual))


@pytest.mark.parametrize("cols", [1, 2, 7, 15, 17])
def test_few_columns(norm, cols):
    """Below a vector's width, against fp64 itself."""
    kwargs = arguments((20, cols), torch.float32, bias=norm[1], residual=True)
    outputs, gradients, cotangents = run(norm[0], [], kwargs, backend="cpu")
    wide = {k: None if v is None else v.detach().double().requires_grad_() for k, v in kwargs.items()}
    truth = run(norm[0], [], wide, backend="reference", cotangents=[c.double() for c in cotangents])
    for k, ref in zip(outputs + gradients, truth[0] + truth[1], strict=True):
        # one column: RMSNorm gives the sign of x, LayerNorm zero; gradients cancel, and rstd is up to 1 / sqrt(eps)
        torch.testing.assert_close(k.double(), ref, rtol=2e-5, atol=2e-5)


def test_the_same_for_any_number_of_threads(norm):
    kwargs = arguments((1000, 40), torch.float32, bias=norm[1], residual=True)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            outputs, gradients, _ = run(norm[0], [], kwargs, backend="cpu")
            results.append(outputs + gradients)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_saves_the_sum_and_a_number_per_row(norm):
    kwargs = arguments((30, 64), torch.bfloat16, bias=norm[1], residual=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _, h = norm[0](**kwargs)
    large = [t for t in kept if t.numel() > 64]
    assert len(large) == 1
    assert large[0].data_ptr() == h.data_ptr()


def test_backward_twice(norm):
    kwargs = arguments((20, 33), torch.float32, bias=norm[1], residual=True)
    y, h = norm[0](**kwargs)
    leaves = [v for v in kwargs.values() if v is not None]
    first = torch.autograd.grad((y * y + h).sum(), leaves, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad((y * y + h).sum(), leaves)))


def test_autocast_leaves_norms_alone(norm):
    kwargs = arguments((20, 33), torch.float32, bias=norm[1])
    with torch.autocast("cpu", torch.bfloat16):
        y = norm[0](**kwargs)
    assert torch.equal(y, norm[0](**kwargs))
    assert y.dtype == torch.float32


def test_opcheck():
    x, w, b, r = torch.randn(4, 34)[:, :17].requires_grad_(), torch.randn(17), torch.randn(4, 17), torch.randn(4, 17)
    x = x.detach()
    ops = torch.ops.pyfast_cpu
    for center in (False, True):
        for args in ((None, None, None), (w, b, None), (w, None, r), (b, w, r)):
            torch.library.opcheck(ops.norm.default, (x, *args, 1e-5, 0.5, center))
            weight, bias, residual = args
            _, _, mean, rstd = ops.norm(x, *args, 1e-5, 0.5, center)
            wanted = (weight is not None, bias is not None)
            torch.library.opcheck(
                ops.norm_backward.default, (r, residual, x, mean, rstd, weight, bias, 0.5, center, *wanted)
            )
    torch.library.opcheck(
        ops.norm_backward.default, (r.bfloat16(), None, x.bfloat16(), mean, rstd, w, b, 0.0, True, False, False)
    )


@pytest.mark.parametrize("call, words", [
    (lambda o, x, w: o.norm(x, w[:3], None, None, 1e-5, 0.0, True), "weight has shape"),
    (lambda o, x, w: o.norm(x, None, w[:3], None, 1e-5, 0.0, True), "bias has shape"),
    (lambda o, x, w: o.norm(x, w, None, x[:1], 1e-5, 0.0, True), "residual has shape"),
    (lambda o, x, w: o.norm(x[:, :0], None, None, None, 1e-5, 0.0, True), "N at least 1"),
    (lambda o, x, w: o.norm(x.double(), None, None, None, 1e-5, 0.0, True), "float32, bfloat16 and float16"),
    (lambda o, x, w: o.norm_backward(x, None, x, w, w[:3], w, None, 0.0, False, True, False), "one per row"),
    (lambda o, x, w: o.norm_backward(x[:1], None, x, w, w, w, None, 0.0, True, True, False), "dy has shape"),
])  # fmt: skip
def test_kernels_refuse_what_would_read_out_of_bounds(call, words):
    with pytest.raises(RuntimeError, match=words):
        call(torch.ops.pyfast_cpu, torch.randn(4, 8), torch.randn(8))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(compiler):
    def op(x, w, b, r):
        y, h = rms_norm(x, w, 1e-5, residual=r, weight_offset=1.0)
        z, h = layer_norm(y, w, b, 1e-5, residual=h)
        return layer_norm(z, None, None, 1e-5), rms_norm(h, w, 1e-5)

    args = [leaf(4, 33), leaf(33), leaf(33), leaf(4, 33)]
    compiled = torch.compile(op, fullgraph=True, backend=compiler)
    eager, compiled = run(op, args, backend="cpu"), run(compiled, args, backend="cpu")
    torch.testing.assert_close(compiled[:2], eager[:2], rtol=0, atol=0)


def test_compile_where_only_one_result_is_used():
    for i in (0, 1):

        def op(x, w, r, i=i):
            return layer_norm(x, w, None, 1e-5, residual=r)[i]

        args = [leaf(4, 33), leaf(33).requires_grad_(i == 0), leaf(4, 33)]
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
        eager, compiled = run(op, args, backend="cpu"), run(compiled, args, backend="cpu")
        torch.testing.assert_close(compiled[:2], eager[:2], rtol=0, atol=0)


def test_compile_with_changing_shapes():
    def op(x, w, r):
        y, h = rms_norm(x, w, 1e-5, residual=r)
        return y * h

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (4, 7, 9):
        args = [leaf(2, rows, 32), leaf(32), leaf(2, rows, 32)]
        eager = run(op, args, backend="cpu")
        torch.testing.assert_close(run(compiled, args, backend="cpu")[:2], eager[:2], rtol=0, atol=0)


def test_second_derivative_and_vmap_raise(norm):
    kwargs = arguments((4, 16), torch.float32, bias=norm[1])
    (dx,) = torch.autograd.grad(norm[0](**kwargs).sum(), kwargs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(dx.sum(), kwargs["x"])
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(norm[0])(kwargs["x"].detach())


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("weight_shape", [(5,), (3, 5), None])
@pytest.mark.parametrize("residual", [False, True])
def test_reference_gradient(backend, weight_shape, residual):
    x, r = leaf(2, 3, 5, dtype=torch.float64), leaf(2, 3, 5, dtype=torch.float64) if residual else None
    w = b = None
    if weight_shape:
        w, b = leaf(*weight_shape, dtype=torch.float64), leaf(*weight_shape, dtype=torch.float64)
    with pyfast.use_backend(backend):
        for f in (
            lambda x, r, w, b: rms_norm(x, w, 1e-2, residual=r, weight_offset=0.5),
            lambda x, r, w, b: layer_norm(x, w, b, 1e-2, residual=r),
        ):
            assert torch.autograd.gradcheck(f, (x, r, w, b))


def test_reference_values():
    """Against the formulas of transformers' LlamaRMSNorm, Gemma2RMSNorm and torch's layer_norm."""
    x, r, w, b = leaf(4, 24), leaf(4, 24), leaf(24), leaf(24)
    llama = w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
    gemma = (1 + w) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
    for backend in ("reference", "torch"):
        with pyfast.use_backend(backend):
            torch.testing.assert_close(rms_norm(x, w, 1e-6), llama)
            torch.testing.assert_close(rms_norm(x, w, 1e-6, weight_offset=1.0), gemma)
            y, h = layer_norm(x, w, b, 1e-5, residual=r)
            torch.testing.assert_close(h, x + r)
            torch.testing.assert_close(y, torch.nn.functional.layer_norm(x + r, (24,), w, b, 1e-5))


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"x": torch.randn(())}, ValueError, r"x has shape \(\)"),
        ({"x": torch.randn(3, 0)}, ValueError, "N at least 1"),
        ({"x": torch.ones(3, 8, dtype=torch.int64)}, TypeError, "x is int64"),
        ({"x": None}, TypeError, "x is NoneType"),
        ({"weight": torch.randn(7)}, ValueError, r"weight has shape \(7,\), expected \(8,\)"),
        ({"weight": torch.randn(4, 8)}, ValueError, "weight has shape"),
        ({"weight": torch.randn(1, 3, 8)}, ValueError, "weight has shape"),
        ({"weight": torch.randn(8).bfloat16()}, TypeError, "weight is bfloat16"),
        ({"weight": torch.randn(8, device="meta")}, ValueError, "weight is .* on meta"),
        ({"weight": [1.0]}, TypeError, "weight is list"),
        ({"residual": torch.randn(8)}, ValueError, "residual is"),
        ({"residual": torch.randn(3, 8).half()}, TypeError, "residual is float16"),
        ({"eps": -1.0}, ValueError, "eps is -1"),
        ({"eps": None}, TypeError, "eps is None, expected a number"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"x": torch.randn(3, 8), "weight": torch.randn(8), "eps": 1e-6} | change
    with pytest.raises(error, match=words):
        rms_norm(**arguments)
    with pytest.raises(error, match=words):
        layer_norm(**arguments, bias=None)
    if "weight" in change:
        arguments["bias"], arguments["weight"] = arguments["weight"], None
        with pytest.raises(error, match=words.replace("weight", "bias")):
            layer_norm(**arguments)
