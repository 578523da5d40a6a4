"""The MLP of every family: gated or plain, its projections apart or joined, with or without adapters."""

import torch
from torch import nn
from transformers import activations

from pyfast import ops
from pyfast.hf.families import Family
from pyfast.hf.lora import linear, linears, seeds, weights
from pyfast.hf.swap import get, is_plain

#: activation module -> lora_mlp's name of it
ACTIVATIONS = {
    nn.SiLU: "silu",
    activations.SiLUActivation: "silu",
    activations.GELUActivation: "gelu",
    activations.NewGELUActivation: "gelu_tanh",
    activations.GELUTanh: "gelu_tanh",
    activations.FastGELUActivation: "gelu_tanh",
    nn.ReLU: "relu",
}


def refusal(module: nn.Module, family: Family) -> str | None:
    """Why the op cannot serve this MLP, or None."""
    activation = get(module, family.activation)
    if type(activation) not in ACTIVATIONS:
        return f"its activation {type(activation).__name__} has no kernel"
    return None


def mlp_forward(self, family: Family, stock, **kwargs):
    """The generic forward of an MLP module."""
    (x,) = kwargs.values()
    y = mlp(self, family, x)
    return y if family.mlp_dropout is None else get(self, family.mlp_dropout)(y)


def mlp(module: nn.Module, family: Family, x: torch.Tensor) -> torch.Tensor:
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) where there is no gate."""
    activation = get(module, family.activation)
    modules = [get(module, path) for path in (*family.gate_up, family.down)]
    served = [weights(projection) for projection in modules]
    if None in served or not is_plain(activation) or len({p for _, p in served}) > 1:
        return _by_modules(modules, activation, family.joined_gate_up, x)
    projections = [projection for projection, _ in served]
    p = served[0][1]
    drawn = seeds(p, len(projections), x.device)
    if family.joined_gate_up:
        projections = [*_halves(projections[0]), projections[1]]
        drawn = drawn and (drawn[0], drawn[0], drawn[1])  # both halves see the same dropped x
    gate, up, down = projections if len(projections) == 3 else (None, *projections)
    return ops.lora_mlp(x, gate, up, down, activation=ACTIVATIONS[type(activation)], dropout_p=p, seeds=drawn)


def _by_modules(modules, activation, joined, x):
    """The same where a projection or the activation must be called as the module it is."""
    *inner, down = modules
    inner = linears(inner, x)
    gate, *up = inner[0].chunk(2, dim=-1) if joined else inner
    hidden = activation(gate)
    return linear(down, hidden * up[0] if up else hidden)


def _halves(joined):
    """A projection to [gate, up] as two of them."""
    n = joined.weight.shape[0] // 2
    return [
        joined._replace(
            weight=joined.weight[rows],
            lora_B=None if joined.lora_B is None else joined.lora_B[rows],
            bias=None if joined.bias is None else joined.bias[rows],
        )
        for rows in (slice(n), slice(n, None))
    ]
