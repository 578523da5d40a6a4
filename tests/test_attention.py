import math

import pytest
import torch
from harness import check, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_map_only

import pyfast
from pyfast import philox
from pyfast.ops import attention, attention_varlen

#: id -> ((B, H, Hkv, Sq, Sk, D), options). "sinks" is a mean, "bias" a shape, "mask" one of
#: "random", "padded", "none" (no key for the first batch).
CASES = {
    "plain": ((2, 3, 3, 37, 37, 64), {}),
    "whole-tiles-of-queries": ((2, 2, 1, 64, 37, 16), {}),
    "causal": ((1, 2, 2, 130, 130, 32), {"causal": True}),
    "causal-long": ((1, 1, 1, 300, 300, 64), {"causal": True}),
    "causal-fewer-queries": ((1, 2, 1, 40, 150, 24), {"causal": True}),
    "causal-fewer-keys": ((1, 2, 1, 150, 40, 24), {"causal": True}),
    "grouped": ((2, 6, 2, 65, 80, 48), {"causal": True}),
    "wide-head": ((1, 2, 1, 50, 70, 256), {"causal": True}),
    "odd-head": ((1, 2, 2, 33, 45, 7), {}),
    "one-query": ((2, 4, 2, 1, 90, 64), {"causal": True}),
    "one-key-and-sink": ((2, 8, 2, 19, 1, 16), {"sinks": 0.0}),
    "window": ((1, 2, 1, 200, 200, 16), {"window_size": (17, 5)}),
    "window-left": ((1, 2, 2, 170, 170, 16), {"window_size": (33, None), "causal": True}),
    "window-shifted": ((1, 2, 2, 60, 170, 16), {"window_size": (20, -1)}),
    "window-one": ((1, 2, 1, 170, 170, 16), {"window_size": (1, 0)}),
    "window-right": ((1, 1, 1, 70, 90, 16), {"window_size": (-1, 3)}),
    "softcap": ((1, 2, 2, 60, 60, 32), {"softcap": 2.0, "scale": 1.0, "causal": True}),
    "scale": ((1, 2, 2, 60, 60, 32), {"scale": 0.7}),
    "scale-sharp": ((1, 2, 2, 200, 300, 32), {"scale": 2.0}),
    "scale-negative": ((1, 2, 2, 50, 60, 16), {"scale": -0.4, "causal": True}),
    "sinks": ((2, 8, 4, 50, 50, 32), {"sinks": 0.0, "causal": True}),
    "sinks-dominate": ((1, 16, 4, 40, 40, 32), {"sinks": 6.0}),
    "bias": ((2, 3, 3, 40, 50, 32), {"bias": (2, 3, 40, 50)}),
    "bias-over-batch": ((3, 4, 2, 60, 70, 32), {"bias": (1, 4, 60, 70), "causal": True}),
    "bias-over-heads": ((2, 4, 2, 40, 70, 32), {"bias": (2, 1, 40, 70)}),
    "bias-of-keys": ((2, 2, 1, 40, 70, 32), {"bias": (2, 1, 1, 70)}),
    "bias-of-queries": ((2, 16, 2, 40, 70, 32), {"bias": (40, 1), "sinks": 0.0}),
    "bias-of-heads": ((2, 8, 2, 40, 70, 32), {"bias": (8, 1, 1), "sinks": 0.0}),
    "padding": ((3, 2, 1, 50, 90, 32), {"mask": "random"}),
    "padding-causal": ((2, 2, 1, 90, 90, 32), {"mask": "padded", "causal": True}),
    "no-key": ((2, 2, 1, 30, 40, 16), {"mask": "none"}),
    "no-key-but-sink": ((4, 32, 8, 30, 40, 16), {"mask": "none", "sinks": 0.0}),
    "dropout": ((2, 2, 1, 67, 71, 32), {"dropout_p": 0.3, "seed": 11}),
    "dropout-causal": ((1, 2, 2, 70, 70, 32), {"dropout_p": 0.1, "seed": 2**62 + 5, "causal": True, "sinks": 0.0}),
    "lse": ((2, 2, 1, 40, 50, 32), {"return_lse": True}),
    "lse-masked": ((2, 2, 1, 90, 70, 32), {"return_lse": True, "causal": True, "sinks": 0.0, "mask": "padded"}),
    "everything": (
        (2, 4, 2, 75, 90, 40),
        {
            "causal": True,
            "window_size": (40, None),
            "softcap": 3.0,
            "scale": 0.5,
            "sinks": 1.0,
            "mask": "padded",
            "bias": (2, 4, 75, 90),
            "dropout_p": 0.2,
            "seed": 3,
            "return_lse": True,
        },
    ),
    "few-queries": (
        (4, 8, 4, 3, 190, 40),
        {
            "causal": True,
            "window_size": (150, None),
            "softcap": 3.0,
            "scale": 0.5,
            "sinks": 1.0,
            "mask": "padded",
            "bias": (4, 1, 3, 190),
            "dropout_p": 0.2,
            "seed": 3,
            "return_lse": True,
        },
    ),
    "few-queries-plain": ((2, 4, 2, 4, 600, 64), {}),
    "few-queries-odd": ((8, 9, 3, 1, 77, 40), {"dropout_p": 0.2, "seed": 7, "return_lse": True}),
    "one-query-two-heads": ((8, 8, 4, 1, 133, 40), {"mask": "random", "window_size": (60, 0)}),
    "few-queries-no-key": ((2, 8, 2, 4, 90, 32), {"mask": "none", "return_lse": True}),
    "short": ((3, 4, 4, 17, 33, 32), {"mask": "random"}),
    "short-lowest": ((4, 3, 3, 5, 16, 64), {"dropout_p": 0.2, "seed": 5, "return_lse": True}),
    "no-batch": ((0, 2, 1, 5, 6, 8), {}),
    "no-queries": ((2, 2, 1, 0, 6, 8), {"causal": True}),
    "no-keys": ((2, 2, 1, 5, 0, 8), {"return_lse": True}),
}
#: id -> (lengths of queries, lengths of keys, (H, Hkv, D), options)
VARLEN_CASES = {
    "plain": ([5, 70, 1, 130], [5, 70, 1, 130], (2, 1, 32), {}),
    "causal": ([33, 0, 64, 100], [33, 0, 64, 100], (4, 2, 64), {"causal": True}),
    "different-keys": ([10, 20, 0, 7], [40, 3, 9, 0], (2, 2, 24), {"causal": True}),
    "window-softcap": ([90, 50], [90, 50], (2, 1, 16), {"window_size": (12, 3), "softcap": 2.0, "scale": 0.8}),
    "sinks": ([0, 30, 50], [0, 0, 50], (2, 2, 32), {"sinks": 1.0}),
    "dropout": ([40, 25], [30, 45], (3, 3, 16), {"dropout_p": 0.25, "seed": 9}),
    "ragged": ([1, 0, 15, 16, 17, 33, 60, 5], [1, 0, 15, 16, 17, 33, 60, 5], (4, 4, 32), {}),
    "ragged-dropout": ([31, 1, 48, 9, 64], [31, 1, 48, 9, 64], (3, 1, 40), {"dropout_p": 0.1, "seed": 4}),
    "ragged-causal": ([7, 65, 2, 0, 128], [16, 65, 33, 3, 128], (4, 2, 64), {"causal": True, "sinks": 0.0}),
    "short-and-long": ([20, 300, 1, 3], [20, 200, 150, 7], (6, 2, 32), {"dropout_p": 0.2, "seed": 1, "causal": True}),
    "rest-unused": ([12, 20, -6], [12, 20, -4], (2, 1, 16), {"causal": True}),
}


def tensors(options, dtype, batch, heads, sk):
    """The options with sinks, bias and mask made into tensors."""
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = (torch.randn(heads) + options["sinks"]).to(dtype).requires_grad_()
    if "bias" in options:
        options["attn_bias"] = torch.randn(options.pop("bias")).to(dtype).requires_grad_()
    if "mask" in options:
        kind, mask = options.pop("mask"), torch.ones(batch, sk, dtype=torch.bool)
        if kind == "random":
            mask = torch.rand(batch, sk) < 0.6
        elif kind == "padded":
            mask[0, : sk // 3], mask[-1, sk - sk // 4 :] = False, False
        else:
            mask[0] = False
        options["attention_mask"] = mask
    return options


def inputs(case, dtype=torch.float32):
    (batch, heads, kv_heads, sq, sk, dim), options = CASES[case] if isinstance(case, str) else case
    shapes = ((batch, heads, sq, dim), (batch, kv_heads, sk, dim), (batch, kv_heads, sk, dim))
    return [torch.randn(s).to(dtype).requires_grad_() for s in shapes], tensors(options, dtype, batch, heads, sk)


def varlen_inputs(case, dtype=torch.float32):
    """A negative last length stands for rows after the last sequence."""
    lengths_q, lengths_k, (heads, kv_heads, dim), options = VARLEN_CASES[case] if isinstance(case, str) else case
    total_q, total_k = (sum(map(abs, lengths)) for lengths in (lengths_q, lengths_k))
    shapes = ((total_q, heads, dim), (total_k, kv_heads, dim), (total_k, kv_heads, dim))
    cu_q, cu_k = (
        torch.tensor([0, *[n for n in lengths if n >= 0]]).cumsum(0).to(torch.int32)
        for lengths in (lengths_q, lengths_k)
    )
    longest = [max(lengths, default=0) for lengths in (lengths_q, lengths_k)]
    args = [torch.randn(s).to(dtype).requires_grad_() for s in shapes]
    return [*args, cu_q, cu_k, *longest], tensors(options, dtype, len(lengths_q), heads, total_k)


def double(tree):
    return tree_map_only(
        torch.Tensor,
        lambda x: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x,
        tree,
    )


def by_loops(q, k, v, options):
    """attention, one score at a time, from its definition."""
    (batch, heads, sq, dim), (kv_heads, sk) = q.shape, k.shape[1:3]
    left, right = (math.inf if n in (None, -1) else n for n in options.get("window_size") or (None, None))
    right = 0 if options.get("causal") else right
    scale, softcap, p_drop = options.get("scale", dim**-0.5), options.get("softcap"), options.get("dropout_p", 0)
    bias = options["attn_bias"].expand(batch, heads, sq, sk) if "attn_bias" in options else None
    out = torch.zeros_like(q)
    for b in range(batch):
        for h in range(heads):
            kv = h // (heads // kv_heads)
            for i in range(sq):
                weights, position = {}, i + sk - sq
                for j in range(sk):
                    if position - j > left or j - position > right:
                        continue
                    if "attention_mask" in options and not options["attention_mask"][b, j]:
                        continue
                    s = float(q[b, h, i] @ k[b, kv, j]) * scale
                    s = s if softcap is None else softcap * math.tanh(s / softcap)
                    weights[j] = math.exp(s + (float(bias[b, h, i, j]) if bias is not None else 0))
                total = sum(weights.values()) + (math.exp(options["sinks"][h]) if "sinks" in options else 0)
                for j, w in weights.items():
                    if p_drop:
                        e = torch.tensor(((b * heads + h) * sq + i) * sk + j)
                        w = w / (1 - p_drop) if philox.keep_mask(e, p_drop, options["seed"]) else 0
                    out[b, h, i] += w / total * v[b, kv, j]
    return out


SMALL = {
    "causal": ((1, 2, 1, 3, 6, 4), {"causal": True}),
    "causal-more-queries": ((1, 2, 1, 6, 3, 4), {"causal": True}),
    "window": ((1, 1, 1, 5, 7, 4), {"window_size": (2, 1)}),
    "everything": (
        (2, 4, 2, 5, 6, 4),
        {
            "causal": True,
            "window_size": (3, None),
            "softcap": 2.0,
            "scale": 0.6,
            "sinks": 0.5,
            "mask": "padded",
            "bias": (1, 4, 5, 6),
            "dropout_p": 0.2,
            "seed": 3,
        },
    ),
}


@pytest.mark.parametrize("case", SMALL)
def test_reference_is_the_definition(case):
    args, options = double(inputs(SMALL[case]))
    with pyfast.use_backend("reference"), torch.no_grad():
        torch.testing.assert_close(attention(*args, **options), by_loops(*args, options), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", SMALL)
def test_reference_gradient(case):
    args, options = double(inputs(SMALL[case]))
    names = [n for n in ("sinks", "attn_bias") if n in options]

    def f(q, k, v, *extra):
        return attention(q, k, v, return_lse=True, **{**options, **dict(zip(names, extra, strict=True))})

    lse_finite = attention(*args, return_lse=True, **options)[1].isfinite().all()
    with pyfast.use_backend("reference"):
        g = f if lse_finite else lambda *a: f(*a)[0]
        assert torch.autograd.gradcheck(g, (*args, *(options[n] for n in names)))


@pytest.mark.parametrize("case", CASES)
def test_torch_agrees_with_reference(case):
    """In fp64, the torch backend's results and gradients are the reference's, rows without a key included."""
    args, options = double(inputs(case))
    expected = run(attention, args, options, "reference")
    actual = run(attention, args, options, "torch", cotangents=expected[2])
    torch.testing.assert_close(actual[:2], expected[:2], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", VARLEN_CASES)
def test_varlen_torch_agrees_with_reference(case):
    args, options = double(varlen_inputs(case))
    expected = run(attention_varlen, args, options, "reference")
    actual = run(attention_varlen, args, options, "torch", cotangents=expected[2])
    torch.testing.assert_close(actual[:2], expected[:2], rtol=1e-10, atol=1e-12)


def test_varlen_reference_is_attention_per_sequence():
    args, options = double(varlen_inputs("different-keys"))
    q, k, v, cu_q, cu_k = args[:5]
    with pyfast.use_backend("reference"):
        packed = attention_varlen(*args, **options)
        for n in range(len(cu_q) - 1):
            rows_q, rows_k = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
            alone = attention(*(x.transpose(0, 1)[None] for x in (q[rows_q], k[rows_k], v[rows_k])), **options)
            torch.testing.assert_close(packed[rows_q], alone[0].transpose(0, 1))


@pytest.mark.parametrize("case", CASES)
def test_error_rule(kernel, dtype, case):
    args, options = inputs(case, dtype)
    check(attention, args, options, *kernel)


@pytest.mark.parametrize("case", ["bias-of-heads", "bias-of-queries"])
def test_gradients_of_few_elements(kernel, case):
    """In fp32, of sinks and of a bias: a number per head or query, what is left of a sum over thousands of terms. Of 8
    such numbers the largest error is beyond twice another's, which is as exact, in 5 % of draws, so that here it is the
    root mean square of errors over several draws that counts. It is up to 1.9 times PyTorch's for sinks, whose terms
    are of dO O, with O as it was rounded, and not of the probabilities."""
    errors, own_errors = [], []
    for seed in range(8):
        torch.manual_seed(seed)
        args, options = inputs(case)
        _, own, cotangents = run(attention, args, options, "torch")
        truth = run(attention, *double((args, options)), "reference", cotangents=[c.double() for c in cotangents])[1]
        gradients = run(attention, args, options, *kernel, cotangents=cotangents)[1]
        for found, results in ((errors, gradients), (own_errors, own)):
            found.append([(x - y).flatten() for x, y in zip(results, truth, strict=True)])
    for i in (3, 4):  # after those of q, k and v
        error, own_error = (
            float(torch.cat([e[i] for e in found]).square().mean().sqrt()) for found in (errors, own_errors)
        )
        assert error <= 3 * own_error, f"{error:.3g} > 3 x PyTorch's own {own_error:.3g}"


@pytest.mark.parametrize("case", VARLEN_CASES)
def test_varlen_error_rule(kernel, dtype, case):
    args, options = varlen_inputs(case, dtype)
    check(attention_varlen, args, options, *kernel)


def test_varlen_rows_of_no_sequence(kernel, dtype):
    """They give zeros and zero gradients and reach no other row, even where they hold NaN."""
    (q, k, v, *_), _ = varlen_inputs("plain", dtype)
    used_q, used_k = len(q) - 5, len(k) - 70
    cu_q, cu_k = torch.tensor([0, 3, used_q]), torch.tensor([0, 9, used_k])

    def op(q, k, v):
        return attention_varlen(q, k, v, cu_q, cu_k, len(q), len(k), causal=True)

    alone = [x.detach()[:n].clone().requires_grad_() for x, n in ((q, used_q), (k, used_k), (v, used_k))]
    with torch.no_grad():
        for x, n in ((q, used_q), (k, used_k), (v, used_k)):
            x[n:] = torch.nan
    outputs, gradients, cotangents = run(op, [q, k, v], None, *kernel)
    used = run(op, alone, None, *kernel, cotangents=[cotangents[0][:used_q]])
    for whole, part in zip(outputs + gradients, used[0] + used[1], strict=True):
        assert torch.equal(whole[: len(part)], part)
        assert (whole[len(part) :] == 0).all()


def test_one_key(kernel, dtype):
    """The probability is 1 whatever the score: the value comes out as it is, and q and k get no gradient."""
    (q, k, v), _ = inputs(((2, 4, 2, 19, 1, 16), {}), dtype)
    (out,), (dq, dk, _), _ = run(attention, [q, k, v], {}, *kernel)
    torch.testing.assert_close(out, v.detach().repeat_interleave(2, 1).expand(2, 4, 19, 16), rtol=0, atol=0)
    assert dq.abs().max() < 1e-5 and dk.abs().max() < 1e-5
    (q, k, v), _ = inputs(((1, 2, 2, 170, 170, 16), {}), dtype)
    (out,), *_ = run(attention, [q, k, v], {"window_size": (0, 0)}, *kernel)
    assert torch.equal(out, v.detach())


def test_no_sequence(kernel):
    q, kv, none = torch.randn(3, 2, 8, requires_grad=True), torch.randn(5, 1, 8), torch.zeros(1, dtype=torch.int32)
    (out,), (dq,), _ = run(attention_varlen, [q, kv, kv, none, none, 0, 0], {}, *kernel)
    assert torch.equal(out, torch.zeros(3, 2, 8)) and torch.equal(dq, torch.zeros(3, 2, 8))


def check_drawn(op, args, options):
    """fp32 within 300 roundings of the truth: with few elements, PyTorch's own error may happen to be 0."""
    outputs, gradients, cotangents = run(op, args, options, "cpu")
    args, options = double((args, options))
    truth, truth_gradients, _ = run(op, args, options, "reference", cotangents=[c.double() for c in cotangents])
    for k, ref in zip(outputs + gradients, truth + truth_gradients, strict=True):
        largest = ref.abs().max().item() if ref.numel() else 0
        torch.testing.assert_close(k.double(), ref, rtol=0, atol=300 * 2**-24 * max(1, largest))


@given(
    st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 150), st.integers(0, 150), st.integers(1, 70)),
    st.booleans(),
    st.tuples(st.one_of(st.none(), st.integers(-1, 100)), st.one_of(st.none(), st.integers(-1, 100))),
)
@settings(max_examples=50, deadline=None)
def test_drawn_shapes(heads, lengths, causal, window_size):
    batch, kv_heads, group = heads
    shape = (batch, kv_heads * group, kv_heads, *lengths)
    check_drawn(attention, *inputs((shape, {"causal": causal, "window_size": window_size})))


@given(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90)), min_size=1, max_size=5), st.booleans())
@settings(max_examples=30, deadline=None)
def test_drawn_lengths(lengths, causal):
    lengths_q, lengths_k = map(list, zip(*lengths, strict=True))
    check_drawn(attention_varlen, *varlen_inputs((lengths_q, lengths_k, (4, 2, 24), {"causal": causal})))


@pytest.mark.parametrize("sinks_dtype, bias_dtype", [(torch.float32, torch.float32), (torch.bfloat16, torch.float16)])
def test_parameters_of_other_dtypes(kernel, sinks_dtype, bias_dtype):
    args, _ = inputs(((2, 4, 2, 30, 40, 32), {}), torch.bfloat16)
    options = {
        "sinks": torch.randn(4).to(sinks_dtype).requires_grad_(),
        "attn_bias": torch.randn(4, 30, 40).to(bias_dtype).requires_grad_(),
    }
    check(attention, args, options, *kernel)
    options["attn_bias"] = options["attn_bias"].detach().double().requires_grad_()
    assert run(attention, args, options, *kernel)[1][-1].dtype == torch.float64


def heads_last(x):
    """The same values as a (B, H, S, D) view of (B, S, H, D) memory, as models make it."""
    return x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()


def test_strides(kernel, dtype):
    """Transposed views, slices of joined projections, strided last dimensions and expanded tensors give the same."""
    (q, k, v), options = inputs("everything", dtype)
    expected = run(attention, [q, k, v], options, *kernel)
    for change in (
        heads_last,
        lambda x: torch.stack([x.detach()] * 2, -1)[..., 0].requires_grad_(),
        lambda x: torch.cat([x.detach()] * 2, 1)[:, : x.shape[1]].requires_grad_(),
    ):
        actual = run(attention, [change(q), change(k), change(v)], options, *kernel, cotangents=expected[2])
        torch.testing.assert_close(actual[:2], expected[:2], rtol=0, atol=0, equal_nan=True)
    bias = options["attn_bias"].detach()
    for strided in (bias.mT.contiguous().mT, torch.stack([bias] * 2, -1)[..., 1]):
        actual = run(
            attention, [q, k, v], {**options, "attn_bias": strided.requires_grad_()}, *kernel, cotangents=expected[2]
        )
        torch.testing.assert_close(actual[:2], expected[:2], rtol=0, atol=0, equal_nan=True)
    out = attention(q, k, v)
    alike = torch.autograd.grad(out, q, torch.ones((), dtype=dtype).expand(out.shape))
    assert torch.equal(alike[0], torch.autograd.grad(attention(q, k, v), q, torch.ones_like(out))[0])


def test_layout(kernel):
    """Models merge the heads of the result, and of the gradients, without a copy."""
    with pyfast.use_backend(kernel[0], arch=kernel[1]):
        q, k, v = (heads_last(x) for x in inputs("grouped")[0])
        out = attention(q, k, v)
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
        for x in (out, *gradients):
            assert x.transpose(1, 2).is_contiguous()
        args, _ = varlen_inputs("causal")
        q, k, v = (torch.cat([x.detach()] * 3, -2)[:, : x.shape[1]].requires_grad_() for x in args[:3])
        out = attention_varlen(q, k, v, *args[3:])
        for x in (out, *torch.autograd.grad(out.sum(), (q, k, v))):
            assert x.is_contiguous()


def test_padding_is_never_read(kernel, dtype):
    """What masked keys hold does not matter, and a packed sequence sees nothing of its neighbours."""
    (q, k, v), options = inputs("padding-causal", dtype)
    other = [torch.where(options["attention_mask"][:, None, :, None], x.detach(), 3.0) for x in (k, v)]
    first = run(attention, [q.detach(), k.detach(), v.detach()], options, *kernel)[0][0]
    second = run(attention, [q.detach(), *other], options, *kernel)[0][0]
    assert torch.equal(first, second)
    args, _ = varlen_inputs("causal", dtype)
    changed = [x.detach().clone() for x in args[:3]]
    for x in changed:
        x[args[3][2] :] = 9.0
    first = run(attention_varlen, [*(x.detach() for x in args[:3]), *args[3:]], {"causal": True}, *kernel)[0][0]
    second = run(attention_varlen, [*changed, *args[3:]], {"causal": True}, *kernel)[0][0]
    assert torch.equal(first[: args[3][2]], second[: args[3][2]])


def test_bias_of_minus_infinity_excludes(kernel, dtype):
    (q, k, v), options = inputs("padding", dtype)
    bias = torch.zeros(3, 1, 1, 90, dtype=dtype).masked_fill(~options["attention_mask"][:, None, None], -torch.inf)
    bias[0] = -torch.inf
    (out,), gradients, cotangents = run(attention, [q, k, v], {"attn_bias": bias}, *kernel)
    options["attention_mask"][0] = False
    expected = run(attention, [q, k, v], options, *kernel, cotangents=cotangents)
    torch.testing.assert_close([out, *gradients], [*expected[0], *expected[1]], rtol=0, atol=0)
    assert torch.equal(out[0], torch.zeros_like(out[0]))


def test_smallest_bias_masks(kernel, dtype):
    """Masks made of finfo.min, as models make them: a row of nothing else is a plain mean, its gradient too."""
    (q, k, v), options = inputs("padding", dtype)
    smallest = torch.finfo(dtype).min
    bias = torch.zeros(3, 1, 50, 90, dtype=dtype).masked_fill(~options["attention_mask"][:, None, None], smallest)
    bias[0, :, :20] = smallest
    check(attention, [q, k, v], {"attn_bias": bias}, *kernel)


def test_nan_passes(kernel, dtype):
    """A NaN in the input is seen in the result of its row, never hidden."""
    (q, k, v), _ = inputs("plain", dtype)
    q.detach()[0, 0, 3, 5] = torch.nan
    (out, lse), *_ = run(attention, [q, k, v], {"return_lse": True}, *kernel)
    assert out[0, 0, 3].isnan().all() and lse[0, 0, 3].isnan()
    assert out.isnan().sum() == out.shape[-1]


def test_deterministic_and_replayed(kernel, dtype):
    args, options = inputs("everything", dtype)
    with pyfast.use_backend(kernel[0], arch=kernel[1]):
        out, lse = attention(*args, **options)
        wanted = [*args, options["sinks"], options["attn_bias"]]
        first = torch.autograd.grad((out, lse), wanted, (out, lse), retain_graph=True)
        second = torch.autograd.grad((out, lse), wanted, (out, lse))
        again = attention(*args, **options)[0]
    assert torch.equal(out, again)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    seed = torch.tensor(options["seed"])
    with pyfast.use_backend(kernel[0], arch=kernel[1]):
        assert torch.equal(attention(*args, **{**options, "seed": seed})[0], again)
        assert not torch.equal(attention(*args, **{**options, "seed": 4})[0], again)


def test_seed_from_torch():
    """Without a seed, one is drawn from torch's default generator, so that checkpointing replays it."""
    (q, k, v), _ = inputs("plain")

    def f():
        torch.manual_seed(5)
        checkpointed = torch.utils.checkpoint.checkpoint(
            lambda q: attention(q, k, v, dropout_p=0.4), q, use_reentrant=False
        )
        return torch.autograd.grad(checkpointed.square().sum(), q)[0]

    torch.manual_seed(5)
    plain = torch.autograd.grad(attention(q, k, v, dropout_p=0.4).square().sum(), q)[0]
    assert torch.equal(f(), plain)


def test_autocast(kernel):
    args, options = inputs("sinks")
    with pyfast.use_backend(kernel[0], arch=kernel[1]), torch.autocast(args[0].device.type, torch.bfloat16):
        out = attention(*args, **options)
    with pyfast.use_backend(kernel[0], arch=kernel[1]):
        expected = attention(*(x.bfloat16() for x in args), **options)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    gradients = torch.autograd.grad(out.float().sum(), [*args, options["sinks"]])
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


def test_second_derivative_and_vmap_raise():
    (q, k, v), _ = inputs("plain")
    (dq,) = torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(dq.sum(), q)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda q: attention(q, k.detach(), v.detach()))(q.detach()[None])


OPTIONS = (4, 0.3, 2.0, 5, 3, 0.25)


def test_opcheck():
    args, options = inputs("everything")
    q, k, v = (x.detach() for x in args)
    extra = (options["sinks"].detach(), options["attention_mask"], options["attn_bias"].detach(), torch.tensor(3))
    call = (q, k, v, *extra, None, None, *OPTIONS)
    ops = torch.ops.pyfast_cpu
    torch.library.opcheck(ops.attention.default, call)
    out, maximum, log_sum = ops.attention(*call)
    torch.library.opcheck(
        ops.attention_backward.default, (out, maximum, q, k, v, out, maximum, log_sum, *call[3:], True)
    )
    q, k, v, cu_q, cu_k = (x.detach() for x in varlen_inputs("different-keys")[0][:5])
    call = (q, k, v, None, None, None, None, cu_q, cu_k, *OPTIONS[:-1], 0.0)
    torch.library.opcheck(ops.attention.default, call)
    out, maximum, log_sum = ops.attention(*call)
    torch.library.opcheck(ops.attention_backward.default, (out, None, q, k, v, out, maximum, log_sum, *call[3:], False))


def test_kernel_checks_its_arguments():
    """A direct call never reads out of bounds."""
    q, k = torch.randn(10, 2, 16), torch.randn(12, 1, 16)
    ends = torch.tensor([0, 4, 10])
    for cu_k in ([0, 4, 13], [0, 5, 4], [1, 2, 3], [0, 4], [0, -4, 12]):
        with pytest.raises(RuntimeError, match="cu_seqlens"):
            torch.ops.pyfast_cpu.attention(
                q, k, k, None, None, None, None, ends, torch.tensor(cu_k), *OPTIONS[:-1], 0.0
            )

    for dtype in (torch.float32, torch.int16, torch.uint8):  # read as int64, they would be too short
        with pytest.raises(RuntimeError, match="cu_seqlens_q must be int32 or int64"):
            torch.ops.pyfast_cpu.attention(
                q, k, k, None, None, None, None, ends.to(dtype), torch.tensor([0, 4, 12]), *OPTIONS[:-1], 0.0
            )


@pytest.mark.parametrize("queries", [3, 40])
def test_window_beyond_everything(kernel, queries):
    """No sum of a window and a position overflows."""
    q, k, v = torch.randn(1, 2, queries, 16), torch.randn(1, 2, 50, 16), torch.randn(1, 2, 50, 16)
    args = [x.requires_grad_() for x in (q, k, v)]
    expected = run(attention, args, {}, *kernel)
    for size in (90, 2**31, 2**62, 2**63 - 1):
        actual = run(attention, args, {"window_size": (size, size)}, *kernel, cotangents=expected[2])
        torch.testing.assert_close(actual[:2], expected[:2], rtol=0, atol=0)


@pytest.mark.parametrize("queries", [3, 40])
def test_nan_sink_passes(kernel, queries):
    q, k, v = torch.randn(1, 2, queries, 16), torch.randn(1, 2, 50, 16), torch.randn(1, 2, 50, 16)
    sinks = torch.tensor([math.nan, -math.inf])
    with pyfast.use_backend(kernel[0], arch=kernel[1]):
        out, plain = attention(q, k, v, sinks=sinks), attention(q, k, v)
    assert out[:, 0].isnan().all()
    torch.testing.assert_close(out[:, 1], plain[:, 1], rtol=0, atol=0)


def test_meta():
    """Shapes alone, as models on torch's meta device want them."""
    q, k = torch.empty(2, 4, 5, 16, device="meta"), torch.empty(2, 2, 6, 16, device="meta")
    assert attention(q, k, k, causal=True).shape == q.shape


@pytest.mark.parametrize("case", ["grouped", "everything"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(case, dynamic):
    args, options = inputs(case)
    if "seed" in options:
        options["seed"] = torch.tensor(options["seed"])
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    expected = run(attention, args, options, "cpu")
    actual = run(compiled, args, options, "cpu", cotangents=expected[2])
    torch.testing.assert_close(actual[:2], expected[:2], rtol=0, atol=0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_varlen_compile(dynamic):
    args, options = varlen_inputs("dropout")
    compiled = torch.compile(attention_varlen, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    expected = run(attention_varlen, args, options, "cpu")
    actual = run(compiled, args, options, "cpu", cotangents=expected[2])
    torch.testing.assert_close(actual[:2], expected[:2], rtol=0, atol=0)


def test_compile_of_one_tensor_twice():
    """One cu_seqlens for queries and keys, one tensor for keys and values."""
    q, k, cu_seqlens = torch.randn(10, 2, 16), torch.randn(10, 2, 16), torch.tensor([0, 4, 10])
    args = [q.requires_grad_(), k.requires_grad_()]

    def op(q, k):
        return attention_varlen(q, k, k, cu_seqlens, cu_seqlens, 6, 6)

    expected = run(op, args, {}, "cpu")
    actual = run(torch.compile(op, fullgraph=True, backend="aot_eager"), args, {}, "cpu", cotangents=expected[2])
    torch.testing.assert_close(actual[:2], expected[:2])


def test_inductor():
    args, options = inputs("sinks")
    compiled = torch.compile(lambda q, k, v: attention(q * 2, k, v, **options) + 1, fullgraph=True)
    expected = run(lambda q, k, v: attention(q * 2, k, v, **options) + 1, args, {}, "cpu")
    actual = run(compiled, args, {}, "cpu", cotangents=expected[2])
    torch.testing.assert_close(actual[:2], expected[:2])


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"q": torch.randn(4, 5, 16)}, ValueError, "q is float32 \\(4, 5, 16\\).*4 dimensions"),
        ({"q": None}, TypeError, "q is NoneType"),
        ({"q": torch.ones(2, 4, 5, 16, dtype=torch.int64)}, TypeError, "q is int64"),
        ({"k": torch.randn(2, 2, 6, 16).bfloat16()}, TypeError, "k is bfloat16"),
        ({"v": torch.randn(2, 2, 6, 16, device="meta")}, ValueError, "v is .* on meta"),
        ({"v": torch.randn(2, 2, 7, 16)}, ValueError, "v is .*expected the shape of k"),
        ({"q": torch.randn(2, 3, 5, 16)}, ValueError, "3 heads.*with 2"),
        ({"q": torch.randn(2, 4, 5, 8)}, ValueError, "head width"),
        ({"q": torch.randn(3, 4, 5, 16)}, ValueError, "batch size of q, 3"),
        ({"q": torch.randn(2, 4, 5, 16).to(torch.float8_e5m2)}, TypeError, "q is float8_e5m2"),
        ({"q": torch.randn(2, 4, 5, 16).to_sparse()}, TypeError, "q is .*sparse_coo, expected .* dense"),
        ({"scale": "a"}, TypeError, "scale is 'a', expected a number"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0"),
        ({"softcap": "a"}, TypeError, "softcap is 'a'"),
        ({"softcap": math.inf}, ValueError, "softcap is inf, expected a positive, finite number"),
        ({"window_size": (2**70, 0)}, ValueError, "window_size is"),
        ({"window_size": 5}, TypeError, "window_size is 5"),
        ({"window_size": (1.5, 0)}, TypeError, "two ints"),
        ({"window_size": (-2, 0)}, ValueError, "sizes of 0 or more"),
        ({"sinks": torch.randn(3)}, ValueError, "sinks is .*\\(4,\\)"),
        ({"attention_mask": torch.ones(2, 6)}, TypeError, "expected a bool tensor"),
        ({"attention_mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, "expected \\(B, Sk\\) = \\(2, 6\\)"),
        ({"attn_bias": torch.ones(2, 4, 5, 7)}, ValueError, "attn_bias is .*broadcasts to"),
        ({"attn_bias": torch.ones(6, dtype=torch.bool)}, TypeError, "attn_bias is bool"),
        ({"dropout_p": 1.0, "seed": 0}, ValueError, "dropout_p is 1.0"),
        ({"dropout_p": None}, TypeError, "dropout_p is None"),
        ({"dropout_p": 0.5, "seed": 1.5}, TypeError, "seed is float"),
    ],
)
def test_bad_input(changes, error, words):
    args = {"q": torch.randn(2, 4, 5, 16), "k": torch.randn(2, 2, 6, 16), "v": torch.randn(2, 2, 6, 16), **changes}
    with pytest.raises(error, match=words):
        attention(**args)


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"q": torch.randn(1, 10, 2, 16)}, ValueError, "3 dimensions"),
        ({"cu_seqlens_q": torch.tensor([0, 6, 4, 10])}, ValueError, "cu_seqlens_q decreases from 6 to 4 at position 2"),
        ({"cu_seqlens_k": torch.tensor([0, 4, 6, 13])}, ValueError, "cu_seqlens_k ends at 13, beyond the 12 rows"),
        ({"cu_seqlens_k": torch.tensor([1, 4, 6, 12])}, ValueError, "cu_seqlens_k begins with 1"),
        ({"cu_seqlens_k": torch.tensor([0, 12])}, ValueError, "one length for both"),
        ({"cu_seqlens_q": torch.tensor([0.0, 10.0])}, TypeError, "int32 or int64"),
        ({"cu_seqlens_q": [0, 10]}, TypeError, "cu_seqlens_q is list"),
        ({"cu_seqlens_q": torch.tensor(3)}, ValueError, "\\(N \\+ 1,\\)"),
        ({"max_seqlen_q": 3}, ValueError, "max_seqlen_q is 3, but cu_seqlens_q has a sequence of 4"),
        ({"max_seqlen_q": None}, TypeError, "max_seqlen_q is None, expected an int"),
        ({"max_seqlen_k": 6.0}, TypeError, "max_seqlen_k is 6.0, expected an int"),
    ],
)
def test_varlen_bad_input(changes, error, words):
    args = {"q": torch.randn(10, 2, 16), "k": torch.randn(12, 1, 16), "v": torch.randn(12, 1, 16)}
    args |= {"cu_seqlens_q": torch.tensor([0, 4, 6, 10]), "cu_seqlens_k": torch.tensor([0, 4, 6, 12])}
    args |= {"max_seqlen_q": 4, "max_seqlen_k": 6} | changes
    with pytest.raises(error, match=words):
        attention_varlen(**args)
