"""rope: rotary position embedding (Su et al. 2021, "RoFormer") of queries and keys in one call."""

import torch

from pyfast import dispatch, reference
from pyfast.ops.autograd import distinct, first_order
from pyfast.ops.checks import check_floating, check_parameter, check_same


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns each pair of elements of q and k by its position's angle: x * cos + turned(x) * sin.

    q: (B, H, S, D), k: (B, Hkv, S, D), any strides: transposed views of (B, S, H * D) are read in place, and the
    results have their layout. cos, sin: (B, S, R), (1, S, R) or (S, R), R even and at most D, in q's dtype or fp32,
    transformers' layout: a value for every element. The pair of element j < R / 2 is j + R / 2; interleaved: elements
    2j and 2j + 1 (GPT-J, Cohere). The rest of D passes through.
    Returns (q, k) turned, in their dtype; computed in fp32. cos and sin get no gradient; saves them alone.
    Raises TypeError for non-floating or differing dtypes, ValueError for shapes or devices that do not fit.
    """
    check_floating("rope", q=q)
    check_same("rope", shape=False, q=q, k=k)
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 4:
            raise ValueError(f"rope: {name} has shape {tuple(x.shape)}, expected (B, heads, S, D)")
    if k.shape[0] != q.shape[0] or k.shape[2:] != q.shape[2:]:
        raise ValueError(f"rope: k has shape {tuple(k.shape)}, expected q's B, S and D, {tuple(q.shape)}")
    batch, _, seq, dim = q.shape
    check_parameter("rope", q, cos=cos, sin=sin)
    check_same("rope", cos=cos, sin=sin)
    width = cos.shape[-1] if cos.dim() else 0
    if cos.dim() not in (2, 3) or cos.shape[-2] != seq or (cos.dim() == 3 and cos.shape[0] not in (1, batch)):
        raise ValueError(
            f"rope: cos has shape {tuple(cos.shape)}, expected (B, S, R), (1, S, R) or (S, R) with B = {batch} and"
            f" S = {seq} as in q"
        )
    if width == 0 or width % 2 or width > dim:
        raise ValueError(f"rope: cos is {width} wide, expected an even width from 2 to q's D, {dim}")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("rope: cos and sin get no gradient: pass them detached")
    backend = dispatch.choose("rope", q)
    if backend == "reference":
        return reference.rope(q, k, cos, sin, interleaved=interleaved)
    if backend == "torch":
        return _torch(q, k, cos, sin, interleaved)
    if cos.dim() == 2:
        cos, sin = cos[None], sin[None]
    return _Rope.apply(*distinct(q, k, cos, sin), bool(interleaved), backend)


def _torch(q, k, cos, sin, interleaved):
    width = cos.shape[-1]
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def turn(x):
        a = x[..., :width]
        turned = (a * cos + reference.rotate(a, interleaved) * sin).to(x.dtype)
        return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), -1)

    return turn(q), turn(k)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, interleaved, backend):
        ctx.interleaved, ctx.backend = interleaved, backend
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cos, sin)
        turn = dispatch.kernels(backend).rope
        return turn(q, cos, sin, interleaved, False), turn(k, cos, sin, interleaved, False)

    @staticmethod
    @first_order
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        turn = dispatch.kernels(ctx.backend).rope
        needed = zip((dq, dk), ctx.needs_input_grad, strict=False)
        dq, dk = (turn(d, cos, sin, ctx.interleaved, True) if n and d is not None else None for d, n in needed)
        return dq, dk, None, None, None, None
