"""The plain PyTorch truth of every op: short and obviously right, not fast.

Each function takes the arguments of the public op of the same name, computes in fp64 for fp64 inputs and in fp32
otherwise, and returns the inputs' dtype. Autograd gives its gradients.
"""

import math

import torch

from pyfast import philox
from pyfast.quantized import QuantizedWeight, dequantize


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """fp32 for lower precisions, fp64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


# ---- activations
def gelu(x, approximate="none"):
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * torch.special.erfc(-x / math.sqrt(2))


def swiglu(gate, up):
    g = wide(gate)
    return (g * torch.sigmoid(g) * wide(up)).to(gate.dtype)


def geglu(gate, up, approximate="none"):
    return (gelu(wide(gate), approximate) * wide(up)).to(gate.dtype)


def gelu_bias(x, bias, approximate="none"):
    return gelu(wide(x) + wide(bias), approximate).to(x.dtype)


# ---- norms
def rms_norm(x, weight, eps, *, residual=None, weight_offset=0.0):
    total = x if residual is None else (wide(x) + wide(residual)).to(x.dtype)
    h = wide(total)
    y = h / torch.sqrt(h.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (wide(weight) + weight_offset)
    y = y.to(x.dtype)
    return y if residual is None else (y, total)


def layer_norm(x, weight, bias, eps, *, residual=None):
    total = x if residual is None else (wide(x) + wide(residual)).to(x.dtype)
    h = wide(total)
    h = h - h.mean(-1, keepdim=True)
    y = h / torch.sqrt(h.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * wide(weight)
    if bias is not None:
        y = y + wide(bias)
    y = y.to(x.dtype)
    return y if residual is None else (y, total)


# ---- rotary position embedding
def rotate(x, interleaved):
    """The quarter turn of each pair (a, b) -> (-b, a)."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def dropout(x, p, *, seed):
    keep = philox.keep_mask(torch.arange(x.numel(), device=x.device).view(x.shape), p, seed)
    return torch.where(keep, wide(x) / (1 - p), 0.0).to(x.dtype)


def rope(q, k, cos, sin, *, interleaved=False):
    width = cos.shape[-1]
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # one for all heads

    def turn(x):
        a = wide(x[..., :width])
        return torch.cat(((a * wide(cos) + rotate(a, interleaved) * wide(sin)).to(x.dtype), x[..., width:]), -1)

    return turn(q), turn(k)


# ---- attention
def visible_keys(sq, sk, causal, window_size, device):
    """(Sq, Sk) bool: True where key j lies in the window of query i, which stands at position i + Sk - Sq."""
    left, right = window_size or (None, None)
    offset = torch.arange(sk, device=device) - (torch.arange(sq, device=device)[:, None] + sk - sq)
    visible = offset <= 0 if causal else torch.ones_like(offset, dtype=torch.bool)
    if right is not None and right >= 0:
        visible &= offset <= right
    if left is not None and left >= 0:
        visible &= offset >= -left
    return visible


def _attend(q, k, v, visible, scale, softcap, sinks, attn_bias, dropout_p, seed, index):
    """(out, lse) for q (B, H, Sq, D); visible and index, the elements' numbers for dropout, (B, H, Sq, Sk)."""
    k, v = (wide(x).repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    s = wide(q) @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if attn_bias is not None:
        s = s + attn_bias.to(s.dtype)
    excluded = ~visible | (s == -torch.inf)
    logits = s = s.masked_fill(excluded, -torch.inf)
    if sinks is not None:
        logits = torch.cat([s, sinks.to(s.dtype)[:, None, None].expand(*s.shape[:3], 1)], -1)
    p = torch.softmax(logits, -1)[..., : s.shape[-1]].masked_fill(excluded, 0)
    if dropout_p > 0:
        p = p * philox.keep_mask(index, dropout_p, seed) / (1 - dropout_p)
    return (p @ v).to(q.dtype), torch.logsumexp(logits, -1)


def attention(
    q,
    k,
    v,
    *,
    causal=False,
    scale=None,
    window_size=None,
    softcap=None,
    sinks=None,
    attention_mask=None,
    attn_bias=None,
    dropout_p=0.0,
    seed=None,
    return_lse=False,
):
    batch, heads, sq, sk = *q.shape[:3], k.shape[2]
    visible = visible_keys(sq, sk, causal, window_size, q.device)
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, None, :]
    index = torch.arange(batch * heads * sq * sk, device=q.device).view(batch, heads, sq, sk) if dropout_p > 0 else None
    out, lse = _attend(q, k, v, visible, scale, softcap, sinks, attn_bias, dropout_p, seed, index)
    return (out, lse) if return_lse else out


def attention_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    *,
    causal=False,
    scale=None,
    window_size=None,
    softcap=None,
    sinks=None,
    dropout_p=0.0,
    seed=None,
):
    (total, heads, _), bounds_q, bounds_k = q.shape, cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs = []
    for q0, q1, k0, k1 in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
        visible = visible_keys(q1 - q0, k1 - k0, causal, window_size, q.device)
        rows = torch.arange(heads, device=q.device)[:, None] * total + torch.arange(q0, q1, device=q.device)
        index = rows[..., None] * max_seqlen_k + torch.arange(k1 - k0, device=q.device)
        qs, ks, vs = (x.transpose(0, 1)[None] for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
        out, _ = _attend(qs, ks, vs, visible, scale, softcap, sinks, None, dropout_p, seed, index)
        outs.append(out[0].transpose(0, 1))
    return torch.cat([*outs, q.new_zeros(total - bounds_q[-1], *q.shape[1:])])


# ---- losses
def cross_entropy(
    input, target, *, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0, softcap=None, z_loss=0.0
):
    logits = wide(input)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return _loss(logits, target, weight, ignore_index, reduction, label_smoothing, z_loss)


def linear_cross_entropy(
    input,
    linear_weight,
    target,
    *,
    linear_bias=None,
    lora_A=None,
    lora_B=None,
    scaling=1.0,
    weight=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    softcap=None,
    z_loss=0.0,
    logit_scale=1.0,
    num_items_in_batch=None,
):
    x = wide(input)
    logits = x @ linear_weight.to(x.dtype).T
    if linear_bias is not None:
        logits = logits + linear_bias.to(x.dtype)
    if lora_A is not None:
        logits = logits + scaling * (x @ lora_A.to(x.dtype).T) @ lora_B.to(x.dtype).T
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return _loss(logits, target, weight, ignore_index, reduction, label_smoothing, z_loss, num_items_in_batch)


def _loss(logits, target, weight, ignore_index, reduction, label_smoothing, z_loss, num_items_in_batch=None):
    counted = target != ignore_index
    index = target.where(counted, 0)
    classes = logits.shape[-1]
    weight = logits.new_ones(classes) if weight is None else weight.to(logits.dtype)
    lse = logits.logsumexp(-1)
    surprise = lse.unsqueeze(-1) - logits  # -log p of every class
    row_weight = weight[index].where(counted, 0)
    loss = (1 - label_smoothing) * row_weight * surprise.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    if label_smoothing:
        loss = loss + label_smoothing / classes * (surprise * weight).sum(-1)
    loss, z = loss.where(counted, 0), z_loss * lse.square().where(counted, 0)
    if reduction == "none":
        return loss + z
    if reduction == "sum":
        return loss.sum() + z.sum()
    if num_items_in_batch is not None:
        items = torch.as_tensor(num_items_in_batch, dtype=logits.dtype, device=logits.device)
        return (loss.sum() + z.sum()) / items.where(counted.any(), 1)
    return loss.sum() / row_weight.sum() + z.sum() / counted.sum()


# ---- lora
def lora_linear(x, weight, lora_A, lora_B, scaling, *, bias=None, dropout_p=0.0, seed=None):
    """y = x W^T + bias + scaling (dropout(x) A^T) B^T; without an adapter (lora_A None) its term is absent."""
    xw = wide(x)
    w = dequantize(weight, xw.dtype) if isinstance(weight, QuantizedWeight) else weight.to(xw.dtype)
    y = xw @ w.T
    if bias is not None:
        y = y + bias.to(xw.dtype)
    if lora_A is not None:
        dropped = philox.dropout(xw, dropout_p, seed)
        y = y + scaling * (dropped @ lora_A.to(xw.dtype).T @ lora_B.to(xw.dtype).T)
    return y.to(x.dtype)


def lora_linears(x, projections, *, dropout_p=0.0, seeds=None):
    seeds = seeds or [None] * len(projections)
    return tuple(
        lora_linear(x, p.weight, p.lora_A, p.lora_B, p.scaling, bias=p.bias, dropout_p=dropout_p, seed=seed)
        for p, seed in zip(projections, seeds, strict=True)
    )


#: the activations of lora_mlp
ACTIVATIONS = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": gelu,
    "gelu_tanh": lambda x: gelu(x, "tanh"),
    "relu": lambda x: x.clamp_min(0),
}


def lora_mlp(x, gate, up, down, *, activation="silu", dropout_p=0.0, seeds=None):
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) without a gate; wide from end to end."""
    first = [up] if gate is None else [gate, up]
    seeds = seeds or [None] * (len(first) + 1)
    hidden = lora_linears(wide(x), first, dropout_p=dropout_p, seeds=seeds[:-1])
    a = ACTIVATIONS[activation](hidden[0])
    if gate is not None:
        a = a * hidden[1]
    return lora_linears(a, [down], dropout_p=dropout_p, seeds=seeds[-1:])[0].to(x.dtype)
