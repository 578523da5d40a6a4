import math

import pytest
import torch
from harness import run
from torch.utils._pytree import tree_map_only

import pyfast
from pyfast import philox
from pyfast.ops import attention, attention_varlen

#: id -> ((B, H, Hkv, Sq, Sk, D), options). "sinks" is a mean, "bias" a shape, "mask" one of
#: "random", "padded", "none" (no key for the first batch).
CASES = {
    "plain": ((2, 3, 3, 37, 37, 64), {}),
    "causal": ((1, 2, 2, 130, 130, 32), {"causal": True}),
    "causal-long": ((1, 1, 1, 300, 300, 64), {"causal": True}),
    "causal-fewer-queries": ((1, 2, 1, 40, 150, 24), {"causal": True}),
    "causal-fewer-keys": ((1, 2, 1, 150, 40, 24), {"causal": True}),
    "grouped": ((2, 6, 2, 65, 80, 48), {"causal": True}),
    "wide-head": ((1, 2, 1, 50, 70, 256), {"causal": True}),
    "odd-head": ((1, 2, 2, 33, 45, 7), {}),
    "one-query": ((2, 4, 2, 1, 90, 64), {"causal": True}),
    "one-key": ((2, 2, 2, 19, 1, 16), {}),
    "window": ((1, 2, 1, 200, 200, 16), {"window_size": (17, 5)}),
    "window-left": ((1, 2, 2, 170, 170, 16), {"window_size": (33, None), "causal": True}),
    "window-shifted": ((1, 2, 2, 60, 170, 16), {"window_size": (20, -1)}),
    "window-zero": ((1, 1, 1, 70, 70, 16), {"window_size": (0, 0)}),
    "window-right": ((1, 1, 1, 70, 90, 16), {"window_size": (-1, 3)}),
    "softcap": ((1, 2, 2, 60, 60, 32), {"softcap": 2.0, "scale": 1.0, "causal": True}),
    "scale": ((1, 2, 2, 60, 60, 32), {"scale": 0.7}),
    "sinks": ((2, 4, 2, 50, 50, 32), {"sinks": 0.0, "causal": True}),
    "sinks-dominate": ((1, 2, 2, 40, 40, 32), {"sinks": 6.0}),
    "bias": ((2, 3, 3, 40, 50, 32), {"bias": (2, 3, 40, 50)}),
    "bias-over-batch": ((3, 2, 1, 40, 70, 32), {"bias": (1, 2, 40, 70), "causal": True}),
    "bias-over-heads": ((2, 4, 2, 40, 70, 32), {"bias": (2, 1, 40, 70)}),
    "bias-of-keys": ((2, 2, 1, 40, 70, 32), {"bias": (2, 1, 1, 70)}),
    "bias-of-queries": ((2, 2, 2, 40, 70, 32), {"bias": (40, 1), "sinks": 0.0}),
    "bias-of-heads": ((2, 2, 2, 40, 70, 32), {"bias": (2, 1, 1), "sinks": 0.0}),
    "padding": ((3, 2, 1, 50, 90, 32), {"mask": "random"}),
    "padding-causal": ((2, 2, 1, 90, 90, 32), {"mask": "padded", "causal": True}),
    "no-key": ((2, 2, 1, 30, 40, 16), {"mask": "none"}),
    "no-key-but-sink": ((2, 2, 1, 30, 40, 16), {"mask": "none", "sinks": 0.0}),
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
    "rest-unused": ([12, 20, -6], [12, 20, -4], (2, 1, 16), {"causal": True}),
    "no-sequence": ([], [], (2, 1, 16), {}),
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
        ({"softcap": 0.0}, ValueError, "softcap is 0.0"),
        ({"window_size": 5}, TypeError, "window_size is 5"),
        ({"window_size": (1.5, 0)}, TypeError, "two ints"),
        ({"window_size": (-2, 0)}, ValueError, "sizes of 0 or more"),
        ({"sinks": torch.randn(3)}, ValueError, "sinks is .*\\(4,\\)"),
        ({"attention_mask": torch.ones(2, 6)}, TypeError, "expected a bool tensor"),
        ({"attention_mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, "expected \\(B, Sk\\) = \\(2, 6\\)"),
        ({"attn_bias": torch.ones(2, 4, 5, 7)}, ValueError, "attn_bias is .*broadcasts to"),
        ({"attn_bias": torch.ones(6, dtype=torch.bool)}, TypeError, "attn_bias is bool"),
        ({"dropout_p": 1.0, "seed": 0}, ValueError, "dropout_p is 1.0"),
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
    ],
)
def test_varlen_bad_input(changes, error, words):
    args = {"q": torch.randn(10, 2, 16), "k": torch.randn(12, 1, 16), "v": torch.randn(12, 1, 16)}
    args |= {"cu_seqlens_q": torch.tensor([0, 4, 6, 10]), "cu_seqlens_k": torch.tensor([0, 4, 6, 12])}
    args |= {"max_seqlen_q": 4, "max_seqlen_k": 6} | changes
    with pytest.raises(error, match=words):
        attention_varlen(**args)
