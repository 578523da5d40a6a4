"""Every kernel's schema and fake, on one page.

A schema is defined once per backend namespace (pyfast_cpu, ...): two backends on one dispatch key would silently
replace each other. A fake computes the shapes, dtypes and strides of the results, for torch.compile. Kernels take
contiguous tensors unless their comment says otherwise, and change none of their inputs.
"""

import torch

from pyfast import dispatch

_LIBRARIES = {
    namespace: torch.library.Library(namespace, "DEF") for namespace, _ in dispatch.BACKENDS.values() if namespace
}


def kernel(schema: str):
    """Defines `schema` in every backend's namespace, with the decorated function as its fake."""

    def define(fake):
        for namespace, library in _LIBRARIES.items():
            library.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
            torch.library.register_fake(f"{namespace}::{schema.split('(')[0]}", fake, lib=library)
        return fake

    return define


_LIBRARIES["pyfast_cpu"].define("get_isa() -> str")
_LIBRARIES["pyfast_cpu"].define("set_isa(str name) -> ()")
_LIBRARIES["pyfast_cpu"].define("allocate_by_dispatcher(bool on) -> ()")
_LIBRARIES["pyfast_cpu"].define("empty_cache() -> ()")  # frees memory that is kept for large results
_LIBRARIES["pyfast_cuda"].define("architectures() -> str")
_LIBRARIES["pyfast_emu"].define("emulate(str order, int seed, bool lazy, str arch) -> ()")


# ---- activations: "silu", "gelu", "gelu_tanh", "relu"; any strides, results contiguous
@kernel("gated(Tensor gate, Tensor up, str activation) -> Tensor")
def _(gate, up, activation):
    return gate.new_empty(gate.shape)


@kernel("gated_backward(Tensor dy, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)")
def _(dy, gate, up, activation):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


@kernel("activate(Tensor x, Tensor bias, str activation) -> Tensor")
def _(x, bias, activation):
    return x.new_empty(x.shape)


@kernel("activate_backward(Tensor dy, Tensor x, Tensor bias, str activation, bool bias_gradient) -> (Tensor, Tensor)")
def _(dy, x, bias, activation, bias_gradient):
    return x.new_empty(x.shape), bias.new_empty(bias.shape if bias_gradient else (0,))


# ---- norms: x (..., N) of any strides; weight and bias (N,) or more of x's trailing dimensions; results contiguous.
# sum is empty without residual, mean without center (RMSNorm), a gradient where it is not asked for.
@kernel(
    "norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, float weight_offset, bool center)"
    " -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)"
)
def _(x, weight, bias, residual, eps, weight_offset, center):
    rows = x.shape[:-1]
    return (
        x.new_empty(x.shape),
        x.new_empty((0,) if residual is None else x.shape),
        x.new_empty(rows if center else (0,), dtype=torch.float32),
        x.new_empty(rows, dtype=torch.float32),
    )


@kernel(
    "norm_backward(Tensor dy, Tensor? dsum, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias,"
    " float weight_offset, bool center, bool weight_gradient, bool bias_gradient)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)"
)
def _(dy, dsum, x, mean, rstd, weight, bias, weight_offset, center, weight_gradient, bias_gradient):
    return (
        x.new_empty(x.shape),
        *(
            (x if p is None else p).new_empty(p.shape if wanted else (0,))
            for p, wanted in ((weight, weight_gradient), (bias, bias_gradient))
        ),
    )


# ---- rotary embedding: x (B, H, S, D); cos and sin (B or 1, S, R); the result has x's memory layout
@kernel("rope(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor")
def _(x, cos, sin, interleaved, inverse):
    y = torch.empty_like(x)
    return y if y.stride(-1) == 1 else x.new_empty(x.shape)


# ---- lora: x (rows, K) contiguous; weight (N, K), lora_A (r, K), lora_B (N, r) and bias (N,) of any strides (forward
# in cuda also (N, 0), for a caller who adds the frozen product to what he gets); the second result is h = x A^T in
# fp32, (rows, sum of r). The backward returns the gradients that `wanted` asks for: of x, then per projection of
# weight, lora_A, lora_B and bias.
_PROJECTIONS = (
    "Tensor[] weight, Tensor?[] lora_A, Tensor?[] lora_B, float[] scaling, Tensor?[] bias, "
    "float dropout_p, Tensor?[] seed"
)


@kernel(f"lora_linears(Tensor x, {_PROJECTIONS}) -> (Tensor[], Tensor)")
def _(x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed):
    rank = sum(a.shape[0] for a in lora_A if a is not None)
    results = [x.new_empty((x.shape[0], w.shape[0])) for w in weight]
    return results, x.new_empty((x.shape[0], rank), dtype=torch.float32)


@kernel(f"lora_linears_backward(Tensor[] dy, Tensor? x, Tensor? h, {_PROJECTIONS}, bool[] wanted) -> Tensor[]")
def _(dy, x, h, weight, lora_A, lora_B, scaling, bias, dropout_p, seed, wanted):
    return _wanted_gradients(dy[0], weight, lora_A, lora_B, bias, wanted)


def _wanted_gradients(dy, weight, lora_A, lora_B, bias, wanted):
    parameters = [p for projection in zip(weight, lora_A, lora_B, bias, strict=True) for p in projection]
    results = [dy.new_empty((dy.shape[0], weight[0].shape[1]))] if wanted[0] else []
    return results + [p.new_empty(p.shape) for p, w in zip(parameters, wanted[1:], strict=True) if w]


# gate, up and down, or up and down: hidden is the result of all but the last (a backend may leave up's bias to the
# activation), h and h_down belong to them
@kernel(f"lora_mlp(Tensor x, {_PROJECTIONS}, str activation) -> (Tensor, Tensor[] hidden, Tensor h, Tensor h_down)")
def _(x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed, activation):
    ranks = [0 if a is None else a.shape[0] for a in lora_A]
    y, *hidden = (x.new_empty((x.shape[0], w.shape[0])) for w in (weight[-1], *weight[:-1]))
    return y, hidden, *(x.new_empty((x.shape[0], r), dtype=torch.float32) for r in (sum(ranks[:-1]), ranks[-1]))


@kernel(
    "lora_mlp_backward(Tensor dy, Tensor? x, Tensor[] hidden, Tensor? h, Tensor? h_down, "
    f"{_PROJECTIONS}, str activation, bool[] wanted) -> Tensor[]"
)
def _(dy, x, hidden, h, h_down, weight, lora_A, lora_B, scaling, bias, dropout_p, seed, activation, wanted):
    return _wanted_gradients(dy, weight, lora_A, lora_B, bias, wanted)


# ---- quantised weights: (n, k) from uint8 codes of 256 levels, or pairs of 16 levels, times a fp32 scale per block
@kernel(
    "dequantize(Tensor codes, Tensor scale, float[] levels, SymInt n, SymInt k, SymInt block_rows, "
    "SymInt block_columns, ScalarType dtype) -> Tensor"
)
def _(codes, scale, levels, n, k, block_rows, block_columns, dtype):
    return codes.new_empty((n, k), dtype=dtype)


# y = x weight^T + add, of a few rows, contiguous, in 16 bits, with such a weight as it is: cuda only. An (n, columns)
# weight, columns those of x, may be described to its scales by other sizes, as nf4's long row is.
@kernel(
    "quantized_linear(Tensor x, Tensor? add, Tensor codes, Tensor scale, float[] levels, SymInt n, SymInt k, "
    "SymInt block_rows, SymInt block_columns) -> Tensor"
)
def _(x, add, codes, scale, levels, n, k, block_rows, block_columns):
    return x.new_empty((x.shape[0], n * k // x.shape[1]))


# ---- dropout: the factor, 0 or 1 / (1 - p), of each logical element index from begin on
@kernel("dropout_factors(Tensor seed, SymInt begin, SymInt count, float p) -> Tensor")
def _(seed, begin, count, p):
    return seed.new_empty((count,), dtype=torch.float32)


# ---- dropout: any strides, the result contiguous; backward is the same on dy
@kernel("dropout(Tensor x, Tensor seed, float p) -> Tensor")
def _(x, seed, p):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# ---- losses: per row the loss and the logsumexp of the logits (0 where target is ignore_index), then the gradients for
# upstream (rows, 2): the result's gradient with respect to each row's loss and squared logsumexp. A gradient is empty
# without upstream, or where not needed. loss, lse and upstream are fp64, weight is fp32.
@kernel(
    "cross_entropy(Tensor input, Tensor target, Tensor? weight, Tensor? upstream, int ignore_index,"
    " float label_smoothing, float? softcap) -> (Tensor, Tensor, Tensor)"
)
def _(input, target, weight, upstream, ignore_index, label_smoothing, softcap):
    """input (rows, V) may have any row stride."""
    loss = input.new_empty(target.shape[0], dtype=torch.float64)
    return loss, torch.empty_like(loss), input.new_empty(input.shape if upstream is not None else 0)


@kernel(
    "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor? lora_A, Tensor? lora_B,"
    " Tensor target, Tensor? weight, Tensor? upstream, float scaling, int ignore_index, float label_smoothing,"
    " float? softcap, float logit_scale, int logits_bytes, bool[5] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _(input, linear_weight, linear_bias, lora_A, lora_B, target, weight, upstream, *options):
    """The parameters have input's dtype and any strides; their gradients are fp32. The logits (the
    GPU kernels' exponentials of them) of at most logits_bytes, or of 16 rows, exist at a time."""
    loss = input.new_empty(target.shape[0], dtype=torch.float64)
    needs = options[-1] if upstream is not None else [False] * 5
    gradients = [
        input.new_empty(p.shape if p is not None and needed else 0, dtype=torch.float32 if i else input.dtype)
        for i, (p, needed) in enumerate(zip((input, linear_weight, linear_bias, lora_A, lora_B), needs, strict=True))
    ]
    return loss, torch.empty_like(loss), *gradients


# ---- attention: q (B, H, Sq, D), k and v (B, Hkv, Sk, D), or with cu_seqlens, int32 or int64 (N + 1,): q (Tq, H, D),
# k and v (Tk, Hkv, D). Any strides with a contiguous last dimension; attn_bias has 4 dimensions and any strides. sinks
# are fp32. softcap 0: none. left, right: -1 for no limit. Results lie in memory as (B, S, H, D). maximum + log_sum is
# lse: per query, (B, H, Sq), packed (H, Tq), the largest score, and the logarithm of the sum of the exponentials above
# it.
_ATTENTION = (
    "Tensor? sinks, Tensor? attention_mask, Tensor? attn_bias, Tensor? seed, Tensor? cu_seqlens_q,"
    " Tensor? cu_seqlens_k, SymInt max_seqlen_k, float scale, float softcap, int left, int right, float dropout_p"
)


def _rows_first(like):
    return torch.empty_like(like.transpose(1, -2), memory_format=torch.contiguous_format).transpose(1, -2)


@kernel(f"attention(Tensor q, Tensor k, Tensor v, {_ATTENTION}) -> (Tensor out, Tensor maximum, Tensor log_sum)")
def _(q, k, v, *options):
    queries = q.shape[:-1] if q.dim() == 4 else (q.shape[1], q.shape[0])
    return _rows_first(q), *(q.new_empty(queries, dtype=torch.float32) for _ in range(2))


@kernel(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor maximum,"
    f" Tensor log_sum, {_ATTENTION}, bool bias_gradient)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks, Tensor dbias)"
)
def _(dout, dlse, q, k, v, out, maximum, log_sum, sinks, attention_mask, attn_bias, *options):
    dsinks = q.new_empty(0 if sinks is None else q.shape[1], dtype=torch.float32)
    dbias = q.new_empty(attn_bias.shape if options[-1] else 0, dtype=torch.float32)
    return _rows_first(q), _rows_first(k), _rows_first(k), dsinks, dbias


for _backend, _reason in {
    "cpu": dispatch._load_native(),
    "cuda": dispatch._load_cuda(),
    "emulator": dispatch._load_emulator(),
    "triton": dispatch._load_triton(_LIBRARIES["pyfast_triton"]),
}.items():
    if _reason is not None:
        dispatch._UNAVAILABLE[_backend] = _reason
