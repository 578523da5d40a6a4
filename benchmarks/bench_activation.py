"""swiglu, geglu, gelu_bias: bytes are one read of each input and one write of each result, forward and backward."""

import torch
import torch.nn.functional as F

from pyfast import ops

from .harness import Case

SHAPES = ((64, 768), (2048, 2048), (4096, 8192))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def cases():
    for name, dtype in DTYPES.items():
        for shape in SHAPES:
            size = torch.Size(shape).numel() * dtype.itemsize

            def pair(shape=shape, dtype=dtype):
                return tuple(torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))

            def with_bias(shape=shape, dtype=dtype):
                return torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape[1]).to(dtype).requires_grad_()

            label = f"{name} {shape[0]} × {shape[1]}"
            gated = {"inputs": pair, "bytes": 8 * size}
            yield Case("swiglu", label, variants={"pyfast": ops.swiglu, "torch": lambda g, u: F.silu(g) * u}, **gated)
            geglu = {
                "pyfast": lambda g, u: ops.geglu(g, u, "tanh"),
                "torch": lambda g, u: F.gelu(g, approximate="tanh") * u,
            }
            yield Case("geglu", label, variants=geglu, **gated)
            biased = {"pyfast": ops.gelu_bias, "torch": lambda x, b: F.gelu(x + b)}
            yield Case("gelu_bias", label, with_bias, biased, bytes=5 * size)
