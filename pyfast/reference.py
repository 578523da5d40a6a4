"""The plain PyTorch truth of every op: short and obviously right, not fast.

Each function takes the arguments of the public op of the same name, computes in fp64 for fp64 inputs and in fp32
otherwise, and returns the inputs' dtype. Autograd gives its gradients.
"""

import torch


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """fp32 for lower precisions, fp64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def swiglu(gate, up):
    g = wide(gate)
    return (g * torch.sigmoid(g) * wide(up)).to(gate.dtype)
