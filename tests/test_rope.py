import pytest
import torch
from harness import check, run
from hypothesis import given, settings
from hypothesis import strategies as st

import pyfast
from pyfast.ops import rope


def angles(*shape, dtype=torch.float32, interleaved=False):
    """cos and sin as transformers makes them: each angle twice, in halves or side by side."""
    angle = torch.rand(*shape[:-1], shape[-1] // 2, dtype=torch.float64) * 7
    angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat((angle, angle), -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype).requires_grad_()


@pytest.fixture(params=[False, True], ids=["halves", "interleaved"])
def interleaved(request):
    return request.param


@pytest.mark.parametrize(
    "batch, heads, kv_heads, seq, dim, width, cos_shape",
    [
        (2, 4, 2, 9, 64, 64, (2, 9)),
        (2, 3, 1, 17, 40, 40, (1, 17)),  # halves of 20: no multiple of a vector
        (1, 2, 2, 33, 48, 26, (33,)),  # a part turns, the rest passes through
        (3, 1, 1, 1, 80, 2, (3, 1)),
        (0, 2, 1, 5, 32, 32, (5,)),
        (2, 2, 1, 0, 32, 32, (2, 0)),
    ],
)
def test_error_rule(kernel, dtype, interleaved, batch, heads, kv_heads, seq, dim, width, cos_shape):
    q, k = leaf(batch, heads, seq, dim, dtype=dtype), leaf(batch, kv_heads, seq, dim, dtype=dtype)
    for angle_dtype in {dtype, torch.float32}:
        cos, sin = angles(*cos_shape, width, dtype=angle_dtype, interleaved=interleaved)
        check(rope, [q, k, cos, sin], {"interleaved": interleaved}, backend=kernel[0], arch=kernel[1])


def test_any_values(kernel, dtype, interleaved):
    """A cos and a sin of its own for every element, where each term dominates: not only rotations are exact."""
    q, k = leaf(2, 3, 8, 64, dtype=dtype), leaf(2, 1, 8, 64, dtype=dtype)
    for scale_cos, scale_sin in ((1.0, 1.0), (1.0, 1e-3), (1e-3, 1.0)):
        cos, sin = (torch.randn(2, 8, 64) * s for s in (scale_cos, scale_sin))
        args = [q, k, cos.to(dtype), sin.to(dtype)]
        check(rope, args, {"interleaved": interleaved}, backend=kernel[0], arch=kernel[1])


def test_layout_is_kept(kernel, dtype, interleaved):
    """Transposed views of (B, S, H * D), as attention modules make them: results and gradients flatten as views."""
    leaves = [leaf(2, 7, h * 32, dtype=dtype) for h in (4, 2)]
    cos, sin = angles(2, 7, 32, dtype=dtype, interleaved=interleaved)

    def op(q, k, cos, sin):
        q, k = (x.view(2, 7, -1, 32).transpose(1, 2) for x in (q, k))
        return rope(q, k, cos, sin, interleaved=interleaved)

    check(op, [*leaves, cos, sin], backend=kernel[0], arch=kernel[1])
    q, k = (x.detach().view(2, 7, -1, 32).transpose(1, 2).requires_grad_() for x in leaves)
    with pyfast.use_backend(kernel[0], arch=kernel[1]):
        results = rope(q, k, cos, sin, interleaved=interleaved)
        gradients = torch.autograd.grad(results, (q, k), [torch.ones_like(y) for y in results])
    for x, y, dx in zip((q, k), results, gradients, strict=True):
        assert y.stride() == dx.stride() == x.stride()


def test_other_strides(kernel, dtype, interleaved):
    joined = leaf(2, 9, 6, 32, dtype=dtype)  # q and k as parts of one projection

    def op(joined, cos, sin):
        q, k = joined.transpose(1, 2).split([4, 2], dim=1)
        return rope(q, k, cos, sin, interleaved=interleaved)

    cos, sin = (x.expand(2, 9, 32) for x in angles(1, 9, 32, dtype=dtype, interleaved=interleaved))
    check(op, [joined, cos, sin], backend=kernel[0], arch=kernel[1])
    q = leaf(2, 4, 32, 9, dtype=dtype).detach().transpose(2, 3).requires_grad_()  # elements of D with a stride
    k = leaf(2, 1, 9, 32, dtype=dtype).detach().expand(2, 3, 9, 32).requires_grad_()
    cos = cos.transpose(1, 2).contiguous().transpose(1, 2)
    check(rope, [q, k, cos, sin], {"interleaved": interleaved}, backend=kernel[0], arch=kernel[1])


@given(st.integers(0, 3), st.integers(1, 4), st.integers(0, 20), st.integers(16, 40), st.booleans())
@settings(max_examples=20, deadline=None, derandomize=True)
def test_drawn_shapes(batch, heads, seq, pairs, interleaved):
    q, k = leaf(batch, heads, seq, 2 * pairs + 5), leaf(batch, 1, seq, 2 * pairs + 5)
    cos, sin = angles(seq, 2 * pairs, interleaved=interleaved)
    check(rope, [q, k, cos, sin], {"interleaved": interleaved})


def test_saves_the_angles_alone():
    q, k, (cos, sin) = leaf(2, 4, 9, 32), leaf(2, 4, 9, 32), angles(9, 32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rope(q, k, cos, sin)
    assert {t.data_ptr() for t in kept} == {cos.data_ptr(), sin.data_ptr()}


def test_backward_twice():
    q, k, (cos, sin) = leaf(2, 4, 9, 32), leaf(2, 4, 9, 32), angles(9, 32)
    y = sum(x.square().sum() for x in rope(q, k, cos, sin))
    first = torch.autograd.grad(y, (q, k), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(y, (q, k))))


def test_opcheck():
    x = torch.randn(2, 5, 3, 20)
    cos, sin = angles(2, 5, 18)
    for q in (x.transpose(1, 2), x.transpose(1, 2).contiguous()):
        for interleaved in (False, True):
            for inverse in (False, True):
                torch.library.opcheck(torch.ops.pyfast_cpu.rope.default, (q, cos, sin, interleaved, inverse))
    y = x.transpose(1, 3)
    torch.library.opcheck(
        torch.ops.pyfast_cpu.rope.default, (y, torch.randn(1, 3, 4), torch.randn(1, 3, 4), True, True)
    )


@pytest.mark.parametrize("call, words", [
    (lambda o, x: o.rope(x, x[:1, 0, :2], x[:1, 0, :2], False, False), "cos has shape"),
    (lambda o, x: o.rope(x, x[:, 0], x[:1, 0], False, False), "sin has shape"),
    (lambda o, x: o.rope(x, x[:, 0, :, :3], x[:, 0, :, :3], False, False), "even width"),
    (lambda o, x: o.rope(x[..., :4], x[:, 0], x[:, 0], False, False), "even width"),
    (lambda o, x: o.rope(x, x[:, 0].half(), x[:, 0].half(), False, False), "fp32 or in x's dtype"),
    (lambda o, x: o.rope(x[0], x[:, 0], x[:, 0], False, False), "must be"),
])  # fmt: skip
def test_kernels_refuse_what_would_read_out_of_bounds(call, words):
    with pytest.raises(RuntimeError, match=words):
        call(torch.ops.pyfast_cpu, torch.randn(2, 2, 3, 8))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(compiler, interleaved):
    cos, sin = angles(2, 7, 32, interleaved=interleaved)

    def op(q, k):
        q, k = (x.view(2, 7, -1, 32).transpose(1, 2) for x in (q, k))
        return rope(q, k, cos, sin, interleaved=interleaved)

    args = [leaf(2, 7, 4 * 32), leaf(2, 7, 2 * 32)]
    compiled = torch.compile(op, fullgraph=True, backend=compiler)
    eager, compiled = run(op, args, backend="cpu"), run(compiled, args, backend="cpu")
    torch.testing.assert_close(compiled[:2], eager[:2], rtol=0, atol=0)


def test_compile_with_changing_shapes():
    compiled = torch.compile(rope, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, seq in ((2, 5), (3, 7), (4, 9)):
        args = [leaf(batch, 4, seq, 32), leaf(batch, 2, seq, 32), *angles(batch, seq, 32)]
        eager = run(rope, args, backend="cpu")
        torch.testing.assert_close(run(compiled, args, backend="cpu")[:2], eager[:2], rtol=0, atol=0)


def test_second_derivative_and_vmap_raise():
    q, k, (cos, sin) = leaf(2, 4, 9, 32), leaf(2, 4, 9, 32), angles(9, 32)
    (dq,) = torch.autograd.grad(rope(q, k, cos, sin)[0].square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(dq.sum(), q)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda q: rope(q, q, cos, sin))(q.detach()[None])


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("width", [4, 6])
def test_reference_gradient(backend, interleaved, width):
    q, k = (torch.randn(2, h, 3, 6, dtype=torch.float64, requires_grad=True) for h in (4, 2))
    cos, sin = angles(2, 3, width, dtype=torch.float64, interleaved=interleaved)
    with pyfast.use_backend(backend):
        assert torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin, interleaved=interleaved), (q, k))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_same_as_transformers(backend):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    cohere = pytest.importorskip("transformers.models.cohere.modeling_cohere")
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 1, 5, 8)
    with pyfast.use_backend(backend):
        for module, interleaved in ((llama, False), (cohere, True)):
            cos, sin = angles(2, 5, 8, interleaved=interleaved)
            expected = module.apply_rotary_pos_emb(q, k, cos, sin)
            for y, e in zip(rope(q, k, cos, sin, interleaved=interleaved), expected, strict=True):
                torch.testing.assert_close(y, e)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"q": torch.randn(2, 3, 8)}, ValueError, r"q has shape \(2, 3, 8\)"),
        ({"k": torch.randn(2, 3, 8)}, ValueError, "k has shape"),
        ({"k": torch.randn(1, 2, 3, 8)}, ValueError, "k has shape"),
        ({"k": torch.randn(2, 2, 3, 6)}, ValueError, "k has shape"),
        ({"k": torch.randn(2, 2, 3, 8).half()}, TypeError, "k is float16"),
        ({"q": "q"}, TypeError, "q is str"),
        ({"cos": torch.randn(4, 8), "sin": torch.randn(4, 8)}, ValueError, "cos has shape"),
        ({"cos": torch.randn(3, 3, 8), "sin": torch.randn(3, 3, 8)}, ValueError, "cos has shape"),
        ({"cos": torch.randn(3, 7), "sin": torch.randn(3, 7)}, ValueError, "7 wide"),
        ({"cos": torch.randn(3, 10), "sin": torch.randn(3, 10)}, ValueError, "10 wide"),
        ({"cos": torch.randn(3, 0), "sin": torch.randn(3, 0)}, ValueError, "0 wide"),
        ({"sin": torch.randn(3, 4)}, ValueError, "sin is"),
        ({"cos": torch.randn(3, 8).half(), "sin": torch.randn(3, 8).half()}, TypeError, "cos is float16"),
        ({"cos": torch.randn(3, 8, requires_grad=True)}, ValueError, "no gradient"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {
        "q": torch.randn(2, 4, 3, 8),
        "k": torch.randn(2, 2, 3, 8),
        "cos": torch.randn(3, 8),
        "sin": torch.randn(3, 8),
    }
    with pytest.raises(error, match=words):
        rope(**(arguments | change))
