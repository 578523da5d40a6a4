"""Activations fused with the gate or the bias beside them.

swiglu, geglu: the gated activations of Llama- and Gemma-like MLPs (Shazeer 2020, "GLU Variants Improve Transformer").
gelu_bias: GELU (Hendrycks and Gimpel 2016) of a sum with a bias, as in GPT-2 and BERT.
"""

import torch
import torch.nn.functional as F

from pyfast import dispatch, reference
from pyfast.ops.autograd import distinct, first_order
from pyfast.ops.checks import check_floating, check_parameter, check_same


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, elementwise.

    gate, up: (...), floating, of one shape and dtype. Returns (...) in that dtype, contiguous; computed in fp32.
    The halves of a joined (..., 2N) tensor are read in place. Saves gate and up for backward, nothing else.
    Raises TypeError for non-floating or differing dtypes, ValueError for differing shapes or devices.
    """
    check_floating("swiglu", gate=gate)
    check_same("swiglu", gate=gate, up=up)
    backend = dispatch.choose("swiglu", gate, gate.numel())
    if backend == "reference":
        return reference.swiglu(gate, up)
    if backend == "torch":
        return F.silu(gate) * up
    return _Gated.apply(*distinct(gate, up), "silu", backend)


def geglu(gate: torch.Tensor, up: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """gelu(gate) * up, elementwise.

    gate, up: (...), floating, of one shape and dtype. Returns (...) in that dtype, contiguous; computed in fp32.
    approximate: "none" (erf) or "tanh", as in torch.nn.functional.gelu.
    The halves of a joined (..., 2N) tensor are read in place. Saves gate and up for backward, nothing else.
    Raises TypeError for non-floating or differing dtypes, ValueError for differing shapes or devices or another
    approximate.
    """
    check_floating("geglu", gate=gate)
    check_same("geglu", gate=gate, up=up)
    _check_approximate("geglu", approximate)
    backend = dispatch.choose("geglu", gate)
    if backend == "reference":
        return reference.geglu(gate, up, approximate)
    if backend == "torch":
        return F.gelu(gate, approximate=approximate) * up
    return _Gated.apply(*distinct(gate, up), _GELU[approximate], backend)


def gelu_bias(x: torch.Tensor, bias: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """gelu(x + bias).

    x: (..., N); bias: (N,) in x's dtype or fp32. Returns (..., N) in x's dtype, contiguous; computed in fp32.
    approximate: "none" (erf) or "tanh", as in torch.nn.functional.gelu.
    Saves x and bias for backward, nothing else; bias gets a gradient only where it requires one.
    Raises TypeError for non-floating or unserved dtypes, ValueError for a bias of another shape or device or another
    approximate.
    """
    check_floating("gelu_bias", x=x)
    if x.dim() == 0:
        raise ValueError("gelu_bias: x is a scalar, expected (..., N)")
    check_parameter("gelu_bias", x, bias=bias)
    if bias.shape != x.shape[-1:]:
        raise ValueError(f"gelu_bias: bias is {tuple(bias.shape)}, expected {tuple(x.shape[-1:])}, x's last dimension")
    _check_approximate("gelu_bias", approximate)
    backend = dispatch.choose("gelu_bias", x)
    if backend == "reference":
        return reference.gelu_bias(x, bias, approximate)
    if backend == "torch":
        return F.gelu(x + bias, approximate=approximate).to(x.dtype)
    return _Activate.apply(*distinct(x, bias), _GELU[approximate], backend)


#: approximate -> the kernels' name of the activation
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


def _check_approximate(op: str, approximate: str) -> None:
    if approximate not in tuple(_GELU):
        raise ValueError(f'{op}: approximate is {approximate!r}, expected "none" or "tanh"')


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation, backend):
        ctx.activation, ctx.backend = activation, backend
        ctx.save_for_backward(gate, up)
        return dispatch.kernels(backend).gated(gate, up, activation)

    @staticmethod
    @first_order
    def backward(ctx, dy):
        return (*dispatch.kernels(ctx.backend).gated_backward(dy, *ctx.saved_tensors, ctx.activation), None, None)


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, activation, backend):
        ctx.activation, ctx.backend = activation, backend
        ctx.save_for_backward(x, bias)
        return dispatch.kernels(backend).activate(x, bias, activation)

    @staticmethod
    @first_order
    def backward(ctx, dy):
        wanted = ctx.needs_input_grad[1]
        dx, dbias = dispatch.kernels(ctx.backend).activate_backward(dy, *ctx.saved_tensors, ctx.activation, wanted)
        return dx, dbias if wanted else None, None, None
