"""swiglu: the gated activation of Llama-like MLPs (Shazeer 2020, "GLU Variants Improve Transformer")."""

import torch
import torch.nn.functional as F

from pyfast import dispatch, reference
from pyfast.ops.autograd import first_order
from pyfast.ops.checks import check_floating, check_same


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, elementwise.

    gate, up: (...), floating, of one shape and dtype. Returns (...) in that dtype; computed in fp32.
    Saves gate and up for backward, nothing else.
    Raises TypeError for non-floating or differing dtypes, ValueError for differing shapes or devices.
    """
    check_floating("swiglu", gate=gate)
    check_same("swiglu", gate=gate, up=up)
    backend = dispatch.choose("swiglu", gate)
    if backend == "reference":
        return reference.swiglu(gate, up)
    if backend == "torch":
        return F.silu(gate) * up
    return _Swiglu.apply(gate, up, backend)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, backend):
        gate, up = gate.contiguous(), up.contiguous()
        ctx.backend = backend
        ctx.save_for_backward(gate, up)
        return dispatch.kernels(backend).swiglu(gate, up)

    @staticmethod
    @first_order
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        return (*dispatch.kernels(ctx.backend).swiglu_backward(dy.contiguous(), gate, up), None)
