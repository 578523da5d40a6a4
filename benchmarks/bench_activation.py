"""swiglu, geglu, gelu_bias: bytes are one read of each input and one write of each result, forward and backward."""

from functools import partial

import torch
import torch.nn.functional as F

from pyfast import ops

from .harness import DTYPES, Case, compiled
from .machine import elements_beyond_cache
from .roofline import clones

SHAPES = ((64, 768), (2048, 2048), (elements_beyond_cache() // 4096, 4096))


def swiglu(gate, up):
    return F.silu(gate) * up


def geglu(gate, up):
    return F.gelu(gate, approximate="tanh") * up


def gelu_bias(x, bias):
    return F.gelu(x + bias)


#: op, PyFast's function, torch's, whether the second input is a bias, tensors of x's size moved forward and backward
OPS = (
    ("swiglu", ops.swiglu, swiglu, False, 8),
    ("geglu", partial(ops.geglu, approximate="tanh"), geglu, False, 8),
    ("gelu_bias", ops.gelu_bias, gelu_bias, True, 5),
)


def cases():
    for name, dtype in DTYPES.items():
        for shape in SHAPES:
            for op, ours, torchs, bias, moved in OPS:

                def inputs(shape=shape, dtype=dtype, bias=bias):
                    shapes = (shape, shape[1:] if bias else shape)
                    return tuple(torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)

                yield Case(
                    op,
                    f"{name} {shape[0]} × {shape[1]}",
                    inputs,
                    {"pyfast": ours, "torch": torchs, "compile": compiled(torchs)},
                    dtype,
                    {"clone": lambda x, _, moved=moved: clones(moved / 2, x)},
                    bytes=moved * torch.Size(shape).numel() * dtype.itemsize,
                )
