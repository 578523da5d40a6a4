from types import SimpleNamespace

import pytest
import torch
from harness import check, run
from hypothesis import given, settings
from hypothesis import strategies as st

import pyfast
from pyfast.ops import LoraWeights, QuantizedWeight, lora_linear, lora_linears, lora_mlp

OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "no_adapter": {"rank": 0, "bias": True},
    "rank_17": {"rank": 17},
    "rank_70": {"rank": 70},
    "fp32_adapter": {"adapter": torch.float32, "bias": True},
    "full": {"weight_grad": True, "bias": True},
    "adapter_dominates": {"scaling": 64.0},
    "bias_dominates": {"bias": True, "bias_size": 100.0, "scaling": 1e-3},
}


def drawn(*shape, dtype, size=1.0, grad=True):
    return (torch.randn(shape) * size).to(dtype).requires_grad_(grad)


def projection(
    n, k, dtype, *, rank=8, bias=False, adapter=None, weight_grad=False, scaling=2.0, bias_size=1.0
) -> LoraWeights:
    adapter = adapter or dtype
    return LoraWeights(
        drawn(n, k, dtype=dtype, size=k**-0.5, grad=weight_grad),
        drawn(rank, k, dtype=adapter, size=k**-0.5) if rank else None,
        drawn(n, rank, dtype=adapter, size=rank**-0.5) if rank else None,
        scaling,
        drawn(n, dtype=adapter, size=bias_size) if bias else None,
    )


def linear(x, p, **kwargs):
    return lora_linear(x, p.weight, p.lora_A, p.lora_B, p.scaling, bias=p.bias, **kwargs)


@pytest.mark.parametrize("option", OPTIONS)
def test_linear(kernel, dtype, option):
    x = drawn(3, 23, 72, dtype=dtype)
    check(linear, [x, projection(45, 72, dtype, **OPTIONS[option])], backend=kernel[0], arch=kernel[1])


@pytest.mark.parametrize(
    "rows, k, n, rank",
    [(1, 1, 1, 1), (2, 3, 5, 1), (33, 130, 64, 16), (300, 257, 515, 33), (64, 1100, 40, 4), (133, 1056, 70, 40)],
)
def test_linear_shapes(kernel, dtype, rows, k, n, rank):
    """Beyond one tile of the kernels in every direction, and less than one vector."""
    x, p = drawn(rows, k, dtype=dtype), projection(n, k, dtype, rank=rank, bias=True, weight_grad=True)
    check(linear, [x, p], backend=kernel[0], arch=kernel[1])


@pytest.mark.parametrize("rows, k, n", [(0, 8, 6), (4, 0, 6), (4, 8, 0)])
def test_linear_empty(kernel, dtype, rows, k, n):
    """No rows, no columns: gradients of what got no contribution are zero."""
    x, p = drawn(rows, k, dtype=dtype), projection(n, k or 1, dtype, rank=3, bias=True, weight_grad=True)
    if k == 0:
        p = p._replace(weight=drawn(n, 0, dtype=dtype), lora_A=drawn(3, 0, dtype=dtype))
    (y,), gradients, _ = run(linear, [x, p], backend=kernel[0], arch=kernel[1])
    (y_torch,), gradients_torch, _ = run(linear, [x, p], backend="torch")
    for a, b in zip([y, *gradients], [y_torch, *gradients_torch], strict=True):
        torch.testing.assert_close(a, b)


def test_linear_strides(kernel, dtype):
    """GPT-2's transposed weight, a row slice of a joined weight, and x, A, B of any strides."""
    x = drawn(40, 2, 9, dtype=dtype, grad=False).permute(1, 2, 0).requires_grad_()
    transposed = drawn(40, 30, dtype=dtype).t()
    sliced = drawn(70, 40, dtype=dtype)[5:35]
    lora_A, lora_B = drawn(40, 4, dtype=dtype).t(), drawn(4, 60, dtype=dtype)[:, ::2].t()
    for weight in (transposed, sliced):
        p = LoraWeights(*(t.detach().requires_grad_() for t in (weight, lora_A, lora_B)), 0.5)
        check(linear, [x, p], backend=kernel[0], arch=kernel[1])


@pytest.mark.parametrize("adapter", ["same", "fp32"])
def test_linear_dropout(kernel, dtype, adapter):
    x = drawn(37, 70, dtype=dtype)
    p = projection(50, 70, dtype, rank=5, adapter=torch.float32 if adapter == "fp32" else None)
    for seed in (3, torch.tensor(-(2**62))):
        check(linear, [x, p], {"dropout_p": 0.3, "seed": seed}, backend=kernel[0], arch=kernel[1])


@pytest.mark.parametrize("rows, k, n, rank", [(1, 1, 1, 1), (133, 257, 64, 16), (70, 1100, 40, 33)])
def test_linear_dropout_shapes(kernel, dtype, rows, k, n, rank):
    """Masks of several tiles, and rows that begin within a block of random words."""
    x, p = drawn(rows, k, dtype=dtype), projection(n, k, dtype, rank=rank)
    check(linear, [x, p], {"dropout_p": 0.4, "seed": 7}, backend=kernel[0], arch=kernel[1])


def test_dropout_mask_is_the_backends_common_one(kernel):
    """With lora_A = lora_B = 1 the result is dropout(x) itself, to be compared element by element."""
    x = torch.ones(64, 32)
    with pyfast.use_backend(kernel[0], arch=kernel[1]):
        y = lora_linear(x, torch.zeros(32, 32), torch.eye(32), torch.eye(32), 1.0, dropout_p=0.5, seed=11)
    assert torch.equal(y, pyfast.philox.dropout(x, 0.5, 11))


def test_dropout_seed_drawn_from_torch(kernel):
    x, p = drawn(16, 32, dtype=torch.float32), projection(8, 32, torch.float32)
    with pyfast.use_backend(kernel[0], arch=kernel[1]):
        torch.manual_seed(5)
        a, b = linear(x, p, dropout_p=0.5), linear(x, p, dropout_p=0.5)
        torch.manual_seed(5)
        assert torch.equal(linear(x, p, dropout_p=0.5), a) and not torch.equal(a, b)
        q, k = lora_linears(x, [p, p], dropout_p=0.5)
        assert not torch.equal(q, k)
        q, k = lora_linears(x, [p, p], dropout_p=0.5, seeds=[1, 1])
        assert torch.equal(q, k)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_linears(kernel, dtype, dropout_p):
    """Adapters of different ranks, one frozen projection without any, one with everything."""
    x = drawn(2, 31, 72, dtype=dtype)
    projections = [
        projection(64, 72, dtype, rank=8, bias=True),
        projection(20, 72, dtype, rank=0),
        projection(33, 72, dtype, rank=19, adapter=torch.float32, scaling=0.5),
        projection(48, 72, dtype, rank=2, weight_grad=True, bias=True),
    ]
    check(lora_linears, [x, projections], {"dropout_p": dropout_p, "seeds": [1, 2, 3, 4]}, *kernel)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_linears_many_rows(kernel, dtype, dropout_p):
    """More rows than a block of results has, and a rest; a weight transposed, and others as they are."""
    x = drawn(270, 96, dtype=dtype)
    p = [projection(n, 96, dtype, bias=True, rank=r) for n, r in ((64, 4), (32, 20), (320, 0))]
    p[0] = p[0]._replace(weight=drawn(96, 64, dtype=dtype, size=0.1, grad=False).t())
    check(lora_linears, [x, p], {"dropout_p": dropout_p, "seeds": [3, 4, 5]}, *kernel)


@pytest.mark.parametrize("dtype, rows, k, n", [(torch.bfloat16, 16, 2112, 4160), (torch.float32, 256, 16400, 300)])
def test_large_weight(dtype, rows, k, n):
    """It is packed in two parts, forward and backward."""
    x, p = drawn(rows, k, dtype=dtype), projection(n, k, dtype, rank=2)
    check(linear, [x, p], backend="cpu")


def test_linears_of_a_joined_weight(kernel, dtype):
    """Phi-3's gate_up: row slices of one weight and one lora_B, the same lora_A and seed twice."""
    x, joined = drawn(21, 40, dtype=dtype), projection(60, 40, dtype)

    def op(x, p):
        halves = [p._replace(weight=p.weight[s], lora_B=p.lora_B[s]) for s in (slice(30), slice(30, None))]
        return lora_linears(x, halves, dropout_p=0.2, seeds=[9, 9])

    check(op, [x, joined], backend=kernel[0], arch=kernel[1])


@pytest.mark.parametrize("wanted", ["x", "lora_A", "lora_B", "weight", "bias"])
def test_single_gradients(kernel, wanted):
    """Each gradient alone equals the one among all, and the others are not computed."""
    x = drawn(9, 24, dtype=torch.float32)
    p = projection(17, 24, torch.float32, bias=True, weight_grad=True)
    everything = {"x": x, **{k: v for k, v in p._asdict().items() if k != "scaling"}}
    cotangent = torch.randn(9, 17)
    with pyfast.use_backend(kernel[0], arch=kernel[1]):
        (expected,) = torch.autograd.grad(linear(x, p), everything[wanted], cotangent)
        for name, tensor in everything.items():
            tensor.requires_grad_(name == wanted)
        (alone,) = torch.autograd.grad(linear(x, p), everything[wanted], cotangent)
    torch.testing.assert_close(alone, expected, rtol=0, atol=0)


@pytest.mark.parametrize("format", ["nf4", "int8", "fp8", "fp8_tiles"])
def test_quantized(kernel, dtype, format):
    w = torch.randn(140, 192) * 0.1
    weight = QuantizedWeight.quantize(w, format.removesuffix("_tiles"), tiles=format == "fp8_tiles")
    bound = {"nf4": 0.16, "int8": 1 / 127, "fp8": 1 / 16, "fp8_tiles": 1 / 16}[format]
    error = (pyfast.quantized.dequantize(weight, torch.float32) - w).abs().max()
    assert error <= bound * w.abs().max()
    x, p = drawn(10, 192, dtype=dtype), projection(140, 192, dtype, bias=True)
    identity = torch.eye(192, dtype=dtype)
    with pyfast.use_backend(kernel[0], arch=kernel[1]):
        assert torch.equal(lora_linear(identity, weight), pyfast.quantized.dequantize(weight, dtype).T)
    check(linear, [x, p._replace(weight=weight)], backend=kernel[0], arch=kernel[1])


def test_nf4_layout():
    """bitsandbytes' layout: the first of two elements in the high four bits, a scale per block."""
    data = torch.tensor([[0x0F], [0x70]], dtype=torch.uint8)
    weight = QuantizedWeight("nf4", data, torch.tensor([2.0, 10.0]), (2, 2), blocksize=2)
    expected = torch.tensor([[-2.0, 2.0], [0.0, -10.0]])
    assert torch.equal(pyfast.quantized.dequantize(weight, torch.float32), expected)


def test_from_bitsandbytes():
    """The attributes that bitsandbytes' parameters carry; nested statistics are themselves quantised in blocks."""
    own = QuantizedWeight.quantize(torch.randn(8, 64), "nf4")
    state = SimpleNamespace(quant_type="nf4", shape=torch.Size([8, 64]), blocksize=64, nested=False, absmax=own.scale)
    parameter = torch.nn.Parameter(own.data, requires_grad=False)
    parameter.quant_state = state
    taken = QuantizedWeight.from_bitsandbytes(parameter)
    assert torch.equal(*(pyfast.quantized.dequantize(w, torch.float32) for w in (own, taken)))
    state.nested, state.absmax, state.offset = True, torch.tensor([0, 1, 2, 0, 1, 2, 0, 1], dtype=torch.uint8), 10.0
    state.state2 = SimpleNamespace(
        code=torch.tensor([1.0, 2.0, 3.0]), absmax=torch.tensor([1.0, -1.0, 0.5]), blocksize=3
    )
    scale = QuantizedWeight.from_bitsandbytes(parameter).scale
    assert scale.tolist() == [11.0, 12.0, 13.0, 9.0, 8.0, 7.0, 10.5, 11.0]
    parameter = torch.nn.Parameter(torch.ones(2, 3, dtype=torch.int8), requires_grad=False)
    parameter.SCB = torch.tensor([127.0, 254.0])
    weight = pyfast.quantized.dequantize(QuantizedWeight.from_bitsandbytes(parameter), torch.float32)
    assert weight.tolist() == [[1.0] * 3, [2.0] * 3]
    with pytest.raises(TypeError, match="expected a quantised bitsandbytes weight"):
        QuantizedWeight.from_bitsandbytes(torch.ones(2, 3))


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_mlp(kernel, dtype, activation, gated):
    x = drawn(2, 17, 40, dtype=dtype)
    gate = projection(96, 40, dtype, rank=4, bias=True) if gated else None
    up, down = projection(96, 40, dtype, rank=9), projection(40, 96, dtype, rank=5, bias=True)
    check(lora_mlp, [x, gate, up, down], {"activation": activation}, *kernel)


def test_mlp_dropout_and_full(kernel, dtype):
    x = drawn(19, 40, dtype=dtype)
    gate, up = (projection(50, 40, dtype, weight_grad=True, bias=True) for _ in range(2))
    down = projection(40, 50, dtype, adapter=torch.float32, weight_grad=True)
    check(lora_mlp, [x, gate, up, down], {"dropout_p": 0.3, "seeds": [1, 2, 3]}, *kernel)
    up, down = (p._replace(lora_A=None, lora_B=None) for p in (up, down))
    check(lora_mlp, [x, None, up, down], {"activation": "relu"}, *kernel)


@given(st.integers(0, 40), st.integers(1, 70), st.integers(1, 70), st.integers(1, 20), st.booleans())
@settings(max_examples=20, deadline=None)
def test_drawn_shapes(rows, k, n, rank, bias):
    """Against fp64 autograd; PyTorch's error in a few sums is chance, so the bound counts roundoffs."""
    x, p = drawn(rows, k, dtype=torch.float32), projection(n, k, torch.float32, rank=rank, bias=bias, weight_grad=True)
    outputs, gradients, cotangents = run(linear, [x, p], backend="cpu")
    x, p = (
        x.detach().double().requires_grad_(),
        LoraWeights(*(t.detach().double().requires_grad_() if torch.is_tensor(t) else t for t in p)),
    )
    truth, truths, _ = run(linear, [x, p], None, "reference", None, [c.double() for c in cotangents])
    for a, b in zip(outputs + gradients, truth + truths, strict=True):
        if a.numel():
            assert (a - b).abs().max() <= 8 * max(rows, k, n, rank) ** 0.5 * 2**-24 * max(1.0, float(b.abs().max()))


def test_autocast(kernel):
    """x and weight run in autocast's dtype; gradients come back in the parameters' own."""
    x, p = drawn(12, 32, dtype=torch.float32), projection(20, 32, torch.float32, bias=True, weight_grad=True)
    low = p._replace(weight=p.weight.bfloat16())
    (expected,), _, _ = run(linear, [x.bfloat16(), low], backend=kernel[0], arch=kernel[1])
    with torch.autocast("cpu", torch.bfloat16):
        (y,), gradients, _ = run(linear, [x, p], backend=kernel[0], arch=kernel[1])
        check(linear, [x.detach().bfloat16().requires_grad_(), low], backend=kernel[0], arch=kernel[1])
    assert torch.equal(y, expected) and y.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in gradients)


@pytest.mark.parametrize("frozen", ["gate", "up", "down", "all"])
def test_mlp_partly_frozen(kernel, frozen):
    """Each projection with or without an adapter, with x's gradient and without. (Over few numbers PyTorch's own error
    may be next to nothing.)"""
    parts = {"gate": (24, 16), "up": (24, 16), "down": (16, 24)}
    args = [
        projection(*shape, torch.float32, rank=0 if frozen in (name, "all") else 4) for name, shape in parts.items()
    ]
    for x_gradient in (True, False):
        check(lora_mlp, [drawn(40, 16, dtype=torch.float32, grad=x_gradient), *args], {}, *kernel)


def test_retain_graph(kernel):
    x, p = drawn(12, 32, dtype=torch.bfloat16), projection(20, 32, torch.bfloat16)
    mlp = [projection(24, 32, torch.bfloat16), projection(24, 32, torch.bfloat16), projection(32, 24, torch.bfloat16)]
    with pyfast.use_backend(kernel[0], arch=kernel[1]):
        for y in (linear(x, p, dropout_p=0.5), lora_mlp(x, *mlp, dropout_p=0.5)):
            first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
            assert torch.equal(first, torch.autograd.grad(y.sum(), x)[0])


def saved_elements(op, *args, **kwargs):
    """Elements of activations that a node saves: the storages that are no argument's."""
    own = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(t)}
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), pyfast.use_backend("cpu"):
        op(*args, **kwargs)
    return sum(size for pointer, size in saved.items() if pointer not in own)


def test_saves_little():
    """Beside its arguments a node saves the inner products; the mlp gate(x) and up(x) too; a frozen layer nothing."""
    x, p = drawn(30, 16, dtype=torch.float32), projection(24, 16, torch.float32, rank=4)
    down = projection(16, 24, torch.float32, rank=2)
    assert saved_elements(linear, x, p, dropout_p=0.5, seed=torch.tensor(1)) == 30 * 4 + 1
    assert saved_elements(lora_mlp, x, p, p, down) == 30 * (24 * 2 + 4 * 2 + 2)
    frozen = p._replace(lora_A=None, lora_B=None)
    assert saved_elements(lambda x: linear(x * 1, frozen), x) == frozen.weight.numel()  # no activation


def test_reference_gradient():
    x, p = drawn(5, 6, dtype=torch.float64), projection(4, 6, torch.float64, rank=2, bias=True, weight_grad=True)
    down = projection(3, 4, torch.float64, rank=2)
    with pyfast.use_backend("reference"):
        assert torch.autograd.gradcheck(lambda x, *p: lora_linear(x, *p[:3], 2.0, bias=p[3]), (x, *p[:3], p.bias))
        for activation in ("silu", "gelu", "gelu_tanh", "relu"):
            assert torch.autograd.gradcheck(
                lambda x, *p, a=activation: lora_mlp(
                    x, LoraWeights(*p[:3]), LoraWeights(*p[:3]), LoraWeights(*p[3:]), activation=a
                ),
                (x, *p[:3], *down[:3]),
            )


def test_opcheck():
    x, p, q = (drawn(5, 9, dtype=torch.float32, grad=False), *(projection(7, 9, torch.float32, rank=r) for r in (3, 0)))
    weight, A, B = ([t if t is None else t.detach() for t in pair] for pair in zip(p[:3], q[:3], strict=True))
    arguments = weight, A, B, [2.0, 1.0], [torch.randn(7), None], 0.5, [torch.tensor(1), None]
    torch.library.opcheck(torch.ops.pyfast_cpu.lora_linears.default, (x, *arguments))
    wanted = [True, False, True, True, True, True, False, False, False]
    dy, h = [torch.randn(5, 7)] * 2, torch.randn(5, 3)
    torch.library.opcheck(torch.ops.pyfast_cpu.lora_linears_backward.default, (dy, x, h, *arguments, wanted))
    codes, levels = torch.randint(256, (6, 8), dtype=torch.uint8), [float(i) for i in range(256)]
    torch.library.opcheck(
        torch.ops.pyfast_cpu.dequantize.default, (codes, torch.ones(6), levels, 6, 8, 1, 8, torch.bfloat16)
    )
    down = projection(9, 7, torch.float32, rank=2)
    lists = [[*values, t.detach()] for values, t in zip((weight, A, B), down, strict=False)]
    arguments = *lists, [2.0, 1.0, 1.0], [torch.randn(7), None, None], 0.5, [torch.tensor(1)] * 3, "silu"
    _, hidden, h, h_down = torch.ops.pyfast_cpu.lora_mlp(x, *arguments)
    torch.library.opcheck(torch.ops.pyfast_cpu.lora_mlp.default, (x, *arguments))
    wanted = [True, False, True, True, True, True, False, False, False, True, True, True, False]
    torch.library.opcheck(
        torch.ops.pyfast_cpu.lora_mlp_backward.default, (torch.randn(5, 9), x, hidden, h, h_down, *arguments, wanted)
    )


def test_mlp_backward_checks_its_hidden_products():
    none = ([None], [None], [1.0], [None], 0.0, [None])
    with pytest.raises(RuntimeError, match="hidden and wanted do not fit"):
        torch.ops.pyfast_cpu.lora_mlp_backward(torch.randn(3, 7), None, [], None, None, [W], *none, "silu", [True] * 5)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(compiler):
    """One graph, forward and backward, bit-equal to eager; other row counts and seeds do not recompile."""
    p = [projection(16, 32, torch.float32, bias=True), projection(16, 32, torch.float32, rank=0)]
    down = projection(32, 16, torch.float32)

    def op(x, p, down, seed):
        q, k = lora_linears(x, p, dropout_p=0.25, seeds=[seed, seed])
        mlp = lora_mlp(x + 1, p[0], p[1], down, dropout_p=0.25, seeds=[seed] * 3)
        return lora_linear(q, *down[:4]), k, mlp

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(op, fullgraph=True, backend=compiler, dynamic=True)
    for rows, seed in ((5, 1), (9, 2), (3, 3)):
        args = [drawn(2, rows, 32, dtype=torch.float32), p, down, torch.tensor(seed)]
        for a, b in zip(run(op, args, backend="cpu")[:2], run(compiled, args, backend="cpu")[:2], strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compile_quantized():
    x, p = drawn(4, 64, dtype=torch.float32), projection(8, 64, torch.float32)
    p = p._replace(weight=QuantizedWeight.quantize(p.weight, "nf4"))
    compiled = torch.compile(lambda x, p: linear(x, p), fullgraph=True, backend="aot_eager")
    for a, b in zip(run(linear, [x, p], backend="cpu")[:2], run(compiled, [x, p], backend="cpu")[:2], strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0)


def test_second_derivative_and_vmap_raise():
    x, p = drawn(4, 8, dtype=torch.float32), projection(5, 8, torch.float32)
    (dx,) = torch.autograd.grad(linear(x, p).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(dx.sum(), p.lora_A)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda x: linear(x, p))(x.detach())


W, A, B = torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ((torch.randn(3, 7), W, A, B, 1.0), ValueError, r"weight has shape \(6, 8\), expected \(N, 7\)"),
        ((torch.tensor(1.0), W, A, B, 1.0), ValueError, "x is float32"),
        ((torch.ones(3, 8, dtype=torch.int64), W, A, B, 1.0), TypeError, "x is int64"),
        ((torch.randn(3, 8), W[0], A, B, 1.0), ValueError, "weight has shape"),
        ((torch.randn(3, 8), W.bfloat16(), A, B, 1.0), TypeError, "weight is bfloat16"),
        ((torch.randn(3, 8), W.to("meta"), A, B, 1.0), ValueError, "weight is on meta"),
        ((torch.randn(3, 8), W, A[:0], B[:, :0], 1.0), ValueError, "lora_A has rank r = 0"),
        ((torch.randn(3, 8), W, A[:, :7], B, 1.0), ValueError, r"lora_A is .*expected \(r, K\) = \(2, 8\)"),
        ((torch.randn(3, 8), W, A, B[:5], 1.0), ValueError, r"lora_B is .*expected \(N, r\) = \(6, 2\)"),
        ((torch.randn(3, 8), W, A, B[:, :1], 1.0), ValueError, "lora_B is"),
        ((torch.randn(3, 8), W, A, None, 1.0), ValueError, "lora_A and lora_B must both be given"),
        ((torch.randn(3, 8), W, A.half(), B, 1.0), TypeError, "lora_A is float16"),
        ((torch.randn(3, 8), W, A, B, "2"), TypeError, "scaling is .2., expected a number"),
        ((torch.randn(3, 8), None, A, B, 1.0), TypeError, "weight is NoneType"),
        (([1.0], W, A, B, 1.0), TypeError, "x is list"),
    ],
)
def test_bad_input(arguments, error, words):
    with pytest.raises(error, match="lora_linear: " + words):
        lora_linear(*arguments)


def test_bad_options():
    x, p = torch.randn(3, 8), LoraWeights(W, A, B)
    wide = LoraWeights(torch.randn(7, 8), torch.randn(2, 8), torch.randn(7, 2))
    cases = [
        (lambda: linear(x, p._replace(bias=torch.randn(5))), ValueError, "bias is"),
        (lambda: linear(x, p, dropout_p=1.5), ValueError, "dropout_p is 1.5"),
        (lambda: linear(x, p, dropout_p=0.5, seed="a"), TypeError, "seed is str"),
        (lambda: lora_linears(x, []), ValueError, "projections is empty"),
        (lambda: lora_linears(x, [W]), TypeError, "projections.0. is Tensor, expected LoraWeights"),
        (lambda: lora_linears(x, [p, p._replace(lora_A=A[:1])]), ValueError, "projections.1..lora_B is"),
        (lambda: lora_linears(x, [p, p], dropout_p=0.1, seeds=[1]), ValueError, "expected a sequence of 2"),
        (lambda: lora_mlp(x, p, p, p, activation="tanh"), ValueError, "activation is 'tanh'"),
        (lambda: lora_mlp(x, p, wide, p), ValueError, "up.weight has shape"),
        (lambda: lora_mlp(x, p, p, p), ValueError, "down.weight has shape"),
        (lambda: lora_mlp(x, p, None, p), TypeError, "up is NoneType"),
        (lambda: QuantizedWeight.quantize(torch.randn(3, 5), "nf4"), ValueError, "multiple of blocksize"),
        (lambda: QuantizedWeight.quantize(W, "nf4", blocksize=0), ValueError, "blocksize is 0"),
        (lambda: QuantizedWeight.quantize(W[0], "nf4"), ValueError, "weight has shape"),
        (lambda: QuantizedWeight("nf4", [1], A, (2, 8)), TypeError, "data is list"),
        (lambda: QuantizedWeight("nf4", A.byte(), A, (2, 2, 4)), ValueError, "shape is"),
        (lambda: lora_mlp(x, p, p, p, activation=[]), ValueError, "activation is"),
        (lambda: QuantizedWeight("int4", A, A, (2, 8)), ValueError, "format is 'int4'"),
        (lambda: QuantizedWeight("int8", A, A, (2, 8)), TypeError, "data is"),
        (lambda: QuantizedWeight("int8", A.char(), A, (2, 8)), ValueError, "scale has shape"),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()
