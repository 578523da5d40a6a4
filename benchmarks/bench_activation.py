"""swiglu, geglu, gelu_bias: bytes are one read of each input and one write of each result, forward and backward."""

from functools import partial

import torch.nn.functional as F

from pyfast import ops

from .harness import on_rows
from .machine import elements_beyond_cache

SHAPES = ((64, 768), (2048, 2048), (elements_beyond_cache() // 4096, 4096))


def swiglu(gate, up):
    return F.silu(gate) * up


def geglu(gate, up):
    return F.gelu(gate, approximate="tanh") * up


def gelu_bias(x, bias):
    return F.gelu(x + bias)


#: as `on_rows` takes them
OPS = (
    ("swiglu", ops.swiglu, swiglu, "xx", 8),
    ("geglu", partial(ops.geglu, approximate="tanh"), geglu, "xx", 8),
    ("gelu_bias", ops.gelu_bias, gelu_bias, "xv", 5),
)


def cases():
    return on_rows(SHAPES, OPS)
