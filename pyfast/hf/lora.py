"""PEFT's LoRA layers: what the ops need from one, and when PEFT's own forward must be called instead.

A projection is looked at anew at each call, so that adapters may be added, switched, disabled or merged at any time.
"""

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from pyfast import ops
from pyfast.hf.swap import PLAIN_TENSORS, is_plain, stock_class
from pyfast.ops import LoraWeights


def _base(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """weight (N, K) and bias of a plain linear layer, None for anything else."""
    kind = type(module)
    if kind not in (nn.Linear, Conv1D) or type(module.weight) not in PLAIN_TENSORS:
        return None
    return (module.weight if kind is nn.Linear else module.weight.t()), module.bias


def refusal(layer: LoraLinear) -> str | None:
    """Why the kernel cannot serve this LoRA layer as it is now, so that PEFT's own forward does; None where it can."""
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "its adapter is merged"
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1:
        return f"{len(active)} adapters are active, the kernel serves one"
    name = active[0]
    if name in layer.lora_variant:
        return f"its variant of LoRA ({type(layer.lora_variant[name]).__name__}) has no kernel"
    if layer.lora_bias.get(name):
        return "lora_bias=True has no kernel"
    if _base(layer.base_layer) is None:
        return f"its base layer is a {type(layer.base_layer).__name__} without a plain weight"
    if stock_class(layer.lora_dropout[name]) not in (nn.Identity, nn.Dropout):
        return f"its dropout is a {type(layer.lora_dropout[name]).__name__}"
    for module in (layer.base_layer, layer.lora_A[name], layer.lora_B[name]):
        if not is_plain(module):
            return "a part of it has hooks or a forward of its own"
        if type(module.weight) not in PLAIN_TENSORS:
            return "a part of it is sharded or quantized"
    return None


def _lora(layer: LoraLinear) -> tuple[LoraWeights, float] | None:
    if refusal(layer) is not None:
        return None
    name = next(name for name in layer.active_adapters if name in layer.lora_A)
    weight, bias = _base(layer.base_layer)
    dropout = layer.lora_dropout[name]
    p = dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0
    return LoraWeights(weight, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], bias), p


def weights(module: nn.Module) -> tuple[LoraWeights, float] | None:
    """The projection's weights and its LoRA dropout probability; None where it must be called as the module it is:
    it has hooks, is sharded or quantized, or is of a kind that the ops do not serve."""
    if not is_plain(module):
        return None
    if isinstance(module, ModulesToSaveWrapper):
        active = [] if module.disable_adapters else [n for n in module.active_adapters if n in module.modules_to_save]
        return weights(module.modules_to_save[active[0]] if active else module.original_module)
    if stock_class(module) is LoraLinear:
        return _lora(module)
    base = _base(module)
    return base and (LoraWeights(base[0], None, None, 0.0, base[1]), 0.0)


def seeds(dropout_p: float, count: int, device: torch.device) -> tuple[torch.Tensor, ...] | None:
    """Independent dropout seeds from torch's generator, which checkpointing rewinds; None without dropout.

    On the device itself: a copy to a GPU would wait for all that it has still to do.
    """
    return torch.randint(2**63 - 1, (count,), device=device).unbind() if dropout_p else None


def lora_forward(self, family, stock, x, **kwargs):
    """The forward of a LoRA layer that is called as a module."""
    served = None if kwargs else _lora(self)
    if served is None:
        return stock.forward(self, x, **kwargs)
    return _linear(x, *served)


def _linear(x, projection, dropout_p):
    seed = seeds(dropout_p, 1, x.device)
    bias = projection.bias
    return ops.lora_linear(x, *projection[:4], bias=bias, dropout_p=dropout_p, seed=seed and seed[0])


def linear(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The projection of x, by the kernel where it has an adapter that the kernel serves."""
    served = weights(module)
    if served is None or served[0].lora_A is None:
        return module(x)
    return _linear(x, *served)


def linears(modules: list[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """Several projections of one x, in one op where all of them allow it."""
    served = [weights(module) for module in modules]
    if None in served or len({p for _, p in served}) > 1 or all(w.lora_A is None for w, _ in served):
        return [linear(module, x) for module in modules]
    p = served[0][1]
    return ops.lora_linears(x, [w for w, _ in served], dropout_p=p, seeds=seeds(p, len(served), x.device))
