"""rms_norm and layer_norm, fused with the residual sum before them.

RMSNorm: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization"; LayerNorm: Ba et al. 2016.
"""

import torch
import torch.nn.functional as F

from pyfast import dispatch, reference
from pyfast.ops.autograd import distinct, first_order
from pyfast.ops.checks import beside, check_floating, check_number, check_parameter, check_same
from pyfast.reference import wide


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    weight_offset: float = 0.0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = h / sqrt(mean(h², last dimension) + eps) * (weight + weight_offset), where h = x, or x + residual.

    x: (..., N); residual: x's shape and dtype. Returns y in x's dtype; with residual (y, h), and gradients flow through
    both. weight: (N,), or (G, N) and so on for the trailing dimensions of x (a weight per head; the mean stays over
    N), in x's dtype or fp32, or None for no scaling at all. weight_offset is 1.0 in Gemma.
    Computed in fp32 and rounded once (h is rounded to x's dtype first, as it is returned). Saves h and one fp32 number
    per row; weight gets a gradient only where it requires one.
    Raises TypeError for non-floating or unserved dtypes, ValueError for shapes or devices that do not fit.
    """
    _check("rms_norm", x, eps, residual, weight=weight)
    check_number("rms_norm", weight_offset=weight_offset)
    backend = dispatch.choose("rms_norm", x)
    if backend == "reference":
        return reference.rms_norm(x, weight, eps, residual=residual, weight_offset=weight_offset)
    if backend != "torch":
        return _norm(x, weight, None, eps, residual, weight_offset, False, backend)
    h = x if residual is None else x + residual
    if weight is None or (weight.dim() == 1 and weight.dtype == x.dtype and weight_offset == 0):
        y = F.rms_norm(h, h.shape[-1:], weight, eps)
    else:
        y = (F.rms_norm(wide(h), h.shape[-1:], None, eps) * (wide(weight) + weight_offset)).to(x.dtype)
    return y if residual is None else (y, h)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias over the last dimension, where h = x, or x + residual.

    x: (..., N); residual: x's shape and dtype. Returns y in x's dtype; with residual (y, h), and gradients flow through
    both. weight, bias: (N,), or (G, N) and so on for the trailing dimensions of x (a weight per head; the mean stays
    over N), each in x's dtype or fp32, or None.
    Computed in fp32 and rounded once (h is rounded to x's dtype first, as it is returned). Saves h and two fp32 numbers
    per row; weight and bias get gradients only where they require them.
    Raises TypeError for non-floating or unserved dtypes, ValueError for shapes or devices that do not fit.
    """
    _check("layer_norm", x, eps, residual, weight=weight, bias=bias)
    plain = all(p is None or (p.dim() == 1 and p.dtype == x.dtype) for p in (weight, bias))
    backend = dispatch.choose("layer_norm", x, x.numel() if plain and residual is None else None)
    if backend == "reference":
        return reference.layer_norm(x, weight, bias, eps, residual=residual)
    if backend != "torch":
        return _norm(x, weight, bias, eps, residual, 0.0, True, backend)
    h = x if residual is None else x + residual
    if plain:
        y = F.layer_norm(h, h.shape[-1:], weight, bias, eps)
    else:
        y = F.layer_norm(wide(h), h.shape[-1:], None, None, eps)
        y = y if weight is None else y * wide(weight)
        y = (y if bias is None else y + wide(bias)).to(x.dtype)
    return y if residual is None else (y, h)


def _check(op, x, eps, residual, **parameters):
    check_floating(op, x=x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (..., N) with N at least 1")
    check_number(op, eps=eps)
    if not eps >= 0:
        raise ValueError(f"{op}: eps is {eps}, expected a number that is not negative")
    if residual is not None:
        check_same(op, x=x, residual=residual)
    for name, parameter in parameters.items():
        if parameter is None or (beside(parameter, x) and parameter.shape == x.shape[-1:]):
            continue
        check_parameter(op, x, **{name: parameter})
        dims = parameter.dim()
        if not 1 <= dims <= x.dim() or parameter.shape != x.shape[x.dim() - dims :]:
            raise ValueError(
                f"{op}: {name} has shape {tuple(parameter.shape)}, expected {tuple(x.shape[-1:])} or more of the"
                f" trailing dimensions of x, {tuple(x.shape)}"
            )


def _norm(x, weight, bias, eps, residual, weight_offset, center, backend):
    y, h = _Norm.apply(*distinct(x, weight, bias, residual), float(eps), float(weight_offset), center, backend)
    return y if residual is None else (y, h)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, eps, weight_offset, center, backend):
        y, h, mean, rstd = dispatch.kernels(backend).norm(x, weight, bias, residual, eps, weight_offset, center)
        ctx.options = weight_offset, center
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if residual is None else h, mean, rstd, weight, bias)
        return y, None if residual is None else h

    @staticmethod
    @first_order
    def backward(ctx, dy, dh):
        h, mean, rstd, weight, bias = ctx.saved_tensors
        if dy is None:  # only the sum was used
            return dh, None, None, dh, None, None, None, None
        wanted = ctx.needs_input_grad[1:3]
        dx, dweight, dbias = dispatch.kernels(ctx.backend).norm_backward(
            dy, dh, h, mean, rstd, weight, bias, *ctx.options, *wanted
        )
        dweight, dbias = (g if w else None for g, w in zip((dweight, dbias), wanted, strict=True))
        return dx, dweight, dbias, dx if ctx.needs_input_grad[3] else None, None, None, None, None
