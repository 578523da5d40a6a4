"""attention and attention_varlen: softmax attention that never holds its scores (Dao et al. 2022, "FlashAttention")."""

import itertools

import torch
import torch.nn.functional as F

from pyfast import dispatch, philox, reference
from pyfast.ops.autograd import autocast, distinct, first_order
from pyfast.ops.checks import check_floating, check_number, check_same, check_softcap, describe, values_known


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window_size: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * q kᵀ) v per head, as torch's scaled_dot_product_attention and flash-attn name things.

    q: (B, H, Sq, D); k, v: (B, Hkv, Sk, D), Hkv dividing H: query head h reads key/value head h // (H / Hkv). Any
        strides: transposed views of (B, S, H, D) are read in place.
    causal, window_size=(left, right): query i stands at position i + Sk - Sq (bottom right) and sees keys from
        position - left to position + right; -1 or None means no limit. causal means right = 0.
    scale: D ** -0.5 by default. softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).
    sinks: (H,), a logit per head that joins the softmax's denominator (gpt-oss, StreamingLLM).
    attention_mask: (B, Sk) bool, True where a key counts.
    attn_bias: floating, broadcast to (B, H, Sq, Sk), added after scale and softcap; -inf excludes a key.
    dropout_p, seed: dropout of the probabilities, replayed in backward. seed: an int, a 0-dim int64 tensor, or None to
        draw one from torch's default generator. The logical index of element (b, h, i, j) is
        ((b * H + h) * Sq + i) * Sk + j.
    Returns (B, H, Sq, D) in q's dtype, from the kernels so that `out.transpose(1, 2).reshape(B, Sq, H * D)` is a view
    (the gradients of q, k and v too), and with return_lse also the logarithm of the softmax's denominator, sink
    included, (B, H, Sq) fp32. A query that sees no key gives zeros, lse -inf, and zero gradients; with sinks its
    denominator is the sink alone.
    Gradients go to q, k, v, sinks and attn_bias (summed over its broadcast dimensions), each in its tensor's dtype.
    Saves q, k, v, the output and two numbers per query for backward; the probabilities are recomputed.
    Raises TypeError for wrong types or differing dtypes, ValueError for shapes that do not fit or values out of range.
    """
    name = "attention"
    q, k, v, options = _arguments(
        name, q, k, v, "(B, H, S, D)", causal, scale, window_size, softcap, sinks, dropout_p, seed
    )
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"{name}: k is {describe(k)}, expected the batch size of q, {q.shape[0]}")
    batch, heads, sq, sk = *q.shape[:3], k.shape[2]
    if attention_mask is not None:
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.dtype != torch.bool:
            given = describe(attention_mask) if isinstance(attention_mask, torch.Tensor) else type(attention_mask)
            raise TypeError(
                f"{name}: attention_mask is {given}, expected a bool tensor (B, Sk), True where a key counts"
            )
        if attention_mask.shape != (batch, sk):
            raise ValueError(
                f"{name}: attention_mask is {describe(attention_mask)}, expected (B, Sk) = ({batch}, {sk})"
            )
        _check_device(name, "attention_mask", attention_mask, q)
    if attn_bias is not None:
        check_floating(name, attn_bias=attn_bias)
        _check_device(name, "attn_bias", attn_bias, q)
        full = (batch, heads, sq, sk)
        fits = attn_bias.dim() <= 4 and all(
            n == 1 or n == m for n, m in zip(reversed(attn_bias.shape), reversed(full), strict=False)
        )
        if not fits:
            raise ValueError(
                f"{name}: attn_bias is {describe(attn_bias)}, expected a shape that broadcasts to"
                f" (B, H, Sq, Sk) = {full}"
            )
    options |= {"attention_mask": attention_mask, "attn_bias": attn_bias, "return_lse": return_lse}
    size = 2 * q.numel() * sk if sq == 1 and _plain(q, k, v, options) else None
    backend = dispatch.choose(name, q, size)
    if backend in ("reference", "torch"):
        return (reference.attention if backend == "reference" else _torch_attention)(q, k, v, **options)
    return _kernel(backend, q, k, v, **options)


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    window_size: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """attention over packed sequences: no padding, and no query sees another sequence's keys.

    q: (Tq, H, D); k, v: (Tk, Hkv, D), any strides (slices of a joined (T, 3 * H * D) are read in place).
    cu_seqlens_q, cu_seqlens_k: (N + 1,) int32 or int64, where each sequence begins, and the last one's end: sequence n
        holds queries cu_seqlens_q[n] to cu_seqlens_q[n + 1] and likewise its keys; empty ones are allowed. Rows after
        the last end belong to no sequence and give zeros.
    max_seqlen_q, max_seqlen_k: no sequence is longer.
    causal, scale, window_size, softcap, sinks, dropout_p, seed: as in `attention`, within each sequence. The logical
        index of (query row t of all, head h, key j of its sequence) for dropout is (h * Tq + t) * max_seqlen_k + j.
    Returns (Tq, H, D) in q's dtype. cu_seqlens that decrease or overrun raise ValueError for CPU tensors.
    """
    name = "attention_varlen"
    q, k, v, options = _arguments(
        name, q, k, v, "(T, H, D)", causal, scale, window_size, softcap, sinks, dropout_p, seed
    )
    for which, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
            given = describe(cu_seqlens) if isinstance(cu_seqlens, torch.Tensor) else type(cu_seqlens).__name__
            raise TypeError(f"{name}: {which} is {given}, expected an int32 or int64 tensor (N + 1,)")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"{name}: {which} is {describe(cu_seqlens)}, expected (N + 1,) for N sequences")
        _check_device(name, which, cu_seqlens, q)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"{name}: cu_seqlens_q is {describe(cu_seqlens_q)} and cu_seqlens_k {describe(cu_seqlens_k)}, expected one"
            " length for both"
        )
    for which, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        scalar = isinstance(length, torch.Tensor) and length.dim() == 0 and not length.is_floating_point()
        if not scalar and (isinstance(length, bool) or not isinstance(length, int | torch.SymInt)):
            raise TypeError(f"{name}: {which} is {length!r}, expected an int")
    if values_known(q):
        _check_cu_seqlens(name, "cu_seqlens_q", cu_seqlens_q, q.shape[0], "max_seqlen_q", max_seqlen_q)
        _check_cu_seqlens(name, "cu_seqlens_k", cu_seqlens_k, k.shape[0], "max_seqlen_k", max_seqlen_k)
    backend = dispatch.choose(name, q)
    if backend in ("reference", "torch"):
        implementation = reference.attention_varlen if backend == "reference" else _torch_attention_varlen
        return implementation(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)
    return _kernel(backend, q, k, v, cu_seqlens=(cu_seqlens_q, cu_seqlens_k), max_seqlen_k=max_seqlen_k, **options)


def _arguments(op, q, k, v, layout: str, causal, scale, window_size, softcap, sinks, dropout_p, seed):
    """(q, k, v, options): what both ops share, checked; q, k and v in autocast's dtype."""
    check_floating(op, q=q, k=k, v=v)
    q, k, v = autocast(q, k, v)
    _check_heads(op, q, k, v, layout)
    philox.check_dropout(op, dropout_p)
    if scale is not None:
        check_number(op, scale=scale)
    check_softcap(op, softcap)
    if sinks is not None:
        check_floating(op, sinks=sinks)
        _check_device(op, "sinks", sinks, q)
        if sinks.shape != q.shape[1:2]:
            raise ValueError(f"{op}: sinks is {describe(sinks)}, expected a logit per query head, ({q.shape[1]},)")
    return (
        q,
        k,
        v,
        {
            "causal": causal,
            "scale": q.shape[-1] ** -0.5 if scale is None else float(scale),
            "window_size": _window(op, window_size),
            "softcap": softcap,
            "sinks": sinks,
            "dropout_p": dropout_p,
            "seed": philox.seed_tensor(op, seed, q.device) if dropout_p > 0 else None,
        },
    )


def _plain(q, k, v, options) -> bool:
    """Whether SDPA serves a single query without a mask, and no gradient is wanted: its backward is slow."""
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    off = (options[name] is None for name in ("softcap", "sinks", "attention_mask", "attn_bias"))
    window = options["window_size"] == (-1, -1)
    return not grad and window and all(off) and options["dropout_p"] == 0 and not options["return_lse"]


def _check_heads(op: str, q, k, v, layout: str) -> None:
    check_same(op, shape=False, q=q, k=k, v=v)
    rank = layout.count(",") + 1
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != rank:
            raise ValueError(f"{op}: {name} is {describe(tensor)}, expected {rank} dimensions {layout}")
    if k.shape != v.shape:
        raise ValueError(f"{op}: v is {describe(v)}, expected the shape of k, {tuple(k.shape)}")
    if q.shape[-1] != k.shape[-1] or q.shape[-1] == 0:
        raise ValueError(f"{op}: q is {describe(q)} and k {describe(k)}, expected one head width D >= 1 for both")
    heads, kv_heads = q.shape[1], k.shape[1]
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(
            f"{op}: q is {describe(q)} with {heads} heads and k {describe(k)} with {kv_heads}, expected a number of"
            " key/value heads that divides the number of query heads"
        )


def _check_device(op: str, name: str, tensor, q) -> None:
    if tensor.device != q.device:
        raise ValueError(f"{op}: {name} is {describe(tensor)}, expected the device of q, {q.device}")


def _check_cu_seqlens(op: str, name: str, cu_seqlens, total: int, max_name: str, max_seqlen: int) -> None:
    bounds = cu_seqlens.tolist()  # at once: an element of a tensor costs as much
    lengths = [last - first for first, last in itertools.pairwise(bounds)]
    if bounds[0] != 0:
        raise ValueError(f"{op}: {name} begins with {bounds[0]}, expected 0")
    if min(lengths, default=0) < 0:
        n = next(n for n, length in enumerate(lengths) if length < 0)
        raise ValueError(
            f"{op}: {name} decreases from {bounds[n]} to {bounds[n + 1]} at position {n + 1},"
            " expected boundaries that never decrease"
        )
    if bounds[-1] > total:
        raise ValueError(f"{op}: {name} ends at {bounds[-1]}, beyond the {total} rows that there are")
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(f"{op}: {max_name} is {max_seqlen}, but {name} has a sequence of {max(lengths)}")


def _window(op: str, window_size) -> tuple[int, int]:
    """(left, right) with -1 for no limit."""
    if window_size is None:
        return -1, -1
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise TypeError(f"{op}: window_size is {window_size!r}, expected (left, right)")
    sizes = tuple(-1 if n is None else n for n in window_size)
    for n in sizes:
        if isinstance(n, bool) or not isinstance(n, int | torch.SymInt):
            raise TypeError(f"{op}: window_size is {window_size!r}, expected two ints, None or -1 meaning no limit")
        if not -1 <= n < 2**63:
            raise ValueError(f"{op}: window_size is {window_size!r}, expected sizes of 0 or more, or -1 for no limit")
    return sizes


def _kernel(
    backend,
    q,
    k,
    v,
    *,
    causal,
    scale,
    window_size,
    softcap,
    sinks,
    dropout_p,
    seed,
    attention_mask=None,
    attn_bias=None,
    return_lse=False,
    cu_seqlens=(None, None),
    max_seqlen_k=0,
):
    """out, or with return_lse (out, lse), from a backend's kernels."""
    left, right = window_size
    if sinks is not None:
        sinks = sinks.float()
    if attn_bias is not None:
        attn_bias = attn_bias.reshape((1,) * (4 - attn_bias.dim()) + attn_bias.shape)
        if attn_bias.dtype not in dispatch.KERNEL_DTYPES:
            attn_bias = attn_bias.float()
    options = (max_seqlen_k, scale, softcap or 0.0, left, 0 if causal else right, float(dropout_p))
    tensors = (q, k, v, sinks, attn_bias, attention_mask, seed, *cu_seqlens)
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in tensors[:5]):
        (out, maximum, log_sum), _ = _forward(*tensors, options, backend)
        return (out, maximum + log_sum) if return_lse else out
    return _Attention.apply(*distinct(*tensors), options, backend, return_lse)


def _rows_contiguous(x):
    """x, copied only where its last dimension is strided: kernels take any other strides."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _forward(q, k, v, sinks, attn_bias, attention_mask, seed, cu_seqlens_q, cu_seqlens_k, options, backend):
    """The kernel's (out, maximum, log_sum), and its tensor arguments as backward takes them."""
    q, k, v = map(_rows_contiguous, (q, k, v))
    sinks, attention_mask, cu_seqlens_q, cu_seqlens_k = (
        x if x is None else x.contiguous() for x in (sinks, attention_mask, cu_seqlens_q, cu_seqlens_k)
    )
    tensors = (q, k, v, sinks, attention_mask, attn_bias, seed, cu_seqlens_q, cu_seqlens_k)
    return dispatch.kernels(backend).attention(*tensors, *options), tensors


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *tensors, options, backend, return_lse = arguments
        (out, maximum, log_sum), (q, k, v, *extra) = _forward(*tensors, options, backend)
        ctx.save_for_backward(q, k, v, out, maximum, log_sum, *extra)
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        return (out, maximum + log_sum) if return_lse else out

    @staticmethod
    @first_order
    def backward(ctx, dout, dlse=None):
        q, k, v, out, maximum, log_sum, *extra = ctx.saved_tensors
        sinks, _, attn_bias, *_ = extra
        dout = torch.zeros_like(out) if dout is None else _rows_contiguous(dout)
        dlse = dlse if dlse is None else dlse.contiguous()
        bias_gradient = ctx.needs_input_grad[4]
        dq, dk, dv, dsinks, dbias = dispatch.kernels(ctx.backend).attention_backward(
            dout, dlse, q, k, v, out, maximum, log_sum, *extra, *ctx.options, bias_gradient
        )
        dsinks = dsinks if sinks is not None else None
        dbias = dbias.to(attn_bias.dtype) if bias_gradient else None
        return dq, dk, dv, dsinks, dbias, *(None,) * 7


def _torch_attention(
    q,
    k,
    v,
    *,
    causal,
    scale,
    window_size,
    softcap,
    sinks,
    attention_mask,
    attn_bias,
    dropout_p,
    seed,
    return_lse,
    index=None,
):
    """SDPA where it serves the options, else PyTorch's composite: products in the input's dtype, softmax in fp32."""
    (batch, heads, sq, _), sk = q.shape, k.shape[2]
    visible = None
    causal = causal and sq > 1  # one query, the last, sees every key
    if causal or window_size != (-1, -1):
        visible = reference.visible_keys(sq, sk, causal, window_size, q.device)
    if attention_mask is not None:
        mask = attention_mask[:, None, None, :]
        visible = mask if visible is None else visible & mask
    served = softcap is None and sinks is None and dropout_p == 0 and not return_lse
    if served and batch * sq * sk > 0:
        options = {"scale": scale, "enable_gqa": heads != k.shape[1]}
        if attn_bias is None and attention_mask is None and causal and window_size == (-1, -1) and sq == sk:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
        mask = visible
        if attn_bias is not None:
            mask = attn_bias.to(q.dtype)
            mask = mask if visible is None else mask.masked_fill(~visible, -torch.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    s = q @ k.mT * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if attn_bias is not None:
        s = s + attn_bias.to(s.dtype)
    excluded = s == -torch.inf if visible is None else ~visible | (s == -torch.inf)
    s = s.masked_fill(excluded, -torch.inf).to(torch.promote_types(s.dtype, torch.float32))
    logits = s
    if sinks is not None:
        logits = torch.cat([s, sinks.to(s.dtype)[:, None, None].expand(batch, heads, sq, 1)], -1)
    p = torch.softmax(logits, -1)[..., :sk].masked_fill(excluded, 0)
    if dropout_p > 0:
        if index is None:
            index = torch.arange(s.numel(), device=s.device).view(s.shape)
        p = p * philox.keep_mask(index, dropout_p, seed) / (1 - dropout_p)
    out = p.to(q.dtype) @ v
    return (out, torch.logsumexp(logits, -1)) if return_lse else out


def _torch_attention_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, dropout_p, seed, **options
):
    """One call of `_torch_attention` per sequence."""
    (total, heads, _), bounds_q, bounds_k = q.shape, cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs = []
    for q0, q1, k0, k1 in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
        index = None
        if dropout_p > 0:
            rows = torch.arange(heads, device=q.device)[:, None] * total + torch.arange(q0, q1, device=q.device)
            index = rows[..., None] * max_seqlen_k + torch.arange(k1 - k0, device=q.device)
        qs, ks, vs = (x.transpose(0, 1)[None] for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
        out = _torch_attention(
            qs,
            ks,
            vs,
            attention_mask=None,
            attn_bias=None,
            return_lse=False,
            dropout_p=dropout_p,
            seed=seed,
            index=index,
            **options,
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat([*outs, q.new_zeros(total - bounds_q[-1], *q.shape[1:])])
