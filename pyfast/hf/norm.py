"""RMSNorm and LayerNorm modules, alone and with the residual addition before them."""

import torch
from torch import nn

from pyfast import ops
from pyfast.hf.families import Family
from pyfast.hf.swap import PLAIN_TENSORS, get, is_plain, swapped_as


def refusal(module: nn.Module) -> str | None:
    """Why the ops cannot serve this norm, or None."""
    weight = module.weight
    if weight is None or weight.dim() != 1:
        return "its weight is not one vector over the last dimension"
    return None


def norm_forward(self, family: Family, stock, **kwargs):
    """The generic forward of a norm module."""
    (x,) = kwargs.values()
    return _norm(self, family, x) if _is_served(self) else stock.forward(self, x)


def _is_served(module):
    return type(module.weight) in PLAIN_TENSORS


def _norm(module, family, x, residual=None):
    eps = get(module, family.norm_eps)
    if family.norm_op == "rms_norm":
        return ops.rms_norm(x, module.weight, eps, residual=residual, weight_offset=family.norm_weight_offset)
    return ops.layer_norm(x, module.weight, getattr(module, "bias", None), eps, residual=residual)


def add_norm(module: nn.Module, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(x + residual), x + residual), in one op where the module allows it."""
    same = x.dtype == residual.dtype  # under autocast the residual stays in fp32
    if same and swapped_as(module, norm_forward) and is_plain(module) and _is_served(module):
        return _norm(module, type(module)._pyfast_family, x, residual)
    residual = residual + x
    return module(residual), residual
