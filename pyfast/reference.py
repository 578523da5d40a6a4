"""The plain PyTorch truth of every op: short and obviously right, not fast.

Each function takes the arguments of the public op of the same name, computes in fp64 for fp64 inputs and in fp32
otherwise, and returns the inputs' dtype. Autograd gives its gradients.
"""

import math

import torch


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


def rope(q, k, cos, sin, *, interleaved=False):
    width = cos.shape[-1]
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # one for all heads

    def turn(x):
        a = wide(x[..., :width])
        return torch.cat(((a * wide(cos) + rotate(a, interleaved) * wide(sin)).to(x.dtype), x[..., width:]), -1)

    return turn(q), turn(k)
