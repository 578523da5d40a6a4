"""rms_norm and layer_norm, fused with the residual sum before them.

RMSNorm: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization"; LayerNorm: Ba et al. 2016.
"""

import torch
import torch.nn.functional as F

from pyfast import dispatch, reference
from pyfast.ops.checks import check_floating, check_parameter, check_same
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
    N), in x's dtype or fp32, or None for ones. weight_offset is 1.0 in Gemma.
    Computed in fp32 and rounded once (h is rounded to x's dtype first, as it is returned). Saves h and one fp32 number
    per row; weight gets a gradient only where it requires one.
    Raises TypeError for non-floating or unserved dtypes, ValueError for shapes or devices that do not fit.
    """
    _check("rms_norm", x, eps, residual, weight=weight)
    backend = dispatch.choose("rms_norm", x)
    if backend == "reference":
        return reference.rms_norm(x, weight, eps, residual=residual, weight_offset=weight_offset)
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
    backend = dispatch.choose("layer_norm", x)
    if backend == "reference":
        return reference.layer_norm(x, weight, bias, eps, residual=residual)
    h = x if residual is None else x + residual
    given = [p for p in (weight, bias) if p is not None]
    if all(p.dim() == 1 and p.dtype == x.dtype for p in given):
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
    if not eps >= 0:
        raise ValueError(f"{op}: eps is {eps}, expected a number that is not negative")
    if residual is not None:
        check_same(op, x=x, residual=residual)
    for name, parameter in parameters.items():
        if parameter is None:
            continue
        check_parameter(op, x, **{name: parameter})
        dims = parameter.dim()
        if not 1 <= dims <= x.dim() or parameter.shape != x.shape[x.dim() - dims :]:
            raise ValueError(
                f"{op}: {name} has shape {tuple(parameter.shape)}, expected {tuple(x.shape[-1:])} or more of the"
                f" trailing dimensions of x, {tuple(x.shape)}"
            )
