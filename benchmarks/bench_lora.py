"""lora_linear and lora_mlp: FLOPs are the products with the frozen weights, forward and dx: what LoRA should cost."""

import torch
import torch.nn.functional as F

from pyfast import ops
from pyfast.ops import LoraWeights

from .bench_activation import DTYPES
from .harness import Case

#: (rows, in, out, rank)
SHAPES = ((64, 256, 256, 8), (2048, 768, 2048, 16), (2048, 2048, 5632, 16))


def projection(n, k, r, dtype):
    weight = (torch.randn(n, k) * k**-0.5).to(dtype)
    return weight, torch.randn(r, k).mul(k**-0.5).requires_grad_(), torch.randn(n, r).mul(r**-0.5).requires_grad_()


def peft(x, weight, a, b):
    """As PEFT computes it beside a lower-precision base: the adapter in fp32, its result added after."""
    return F.linear(x, weight) + (F.linear(F.linear(x.float(), a), b) * 2.0).to(x.dtype)


def peft_mlp(x, *weights):
    gate, up, down = (weights[i : i + 3] for i in (0, 3, 6))
    return peft(F.silu(peft(x, *gate)) * peft(x, *up), *down)


def mlp(x, *weights):
    return ops.lora_mlp(x, *(LoraWeights(*weights[i : i + 3], 2.0) for i in (0, 3, 6)))


def cases():
    for name, dtype in DTYPES.items():
        for rows, k, n, r in SHAPES:
            label = f"{name} {rows} rows, {k} → {n}, r {r}"

            def inputs(rows=rows, k=k, n=n, r=r, dtype=dtype):
                return torch.randn(rows, k).to(dtype).requires_grad_(), *projection(n, k, r, dtype)

            variants = {"pyfast": lambda x, w, a, b: ops.lora_linear(x, w, a, b, 2.0), "peft": peft}
            yield Case("lora_linear", label, inputs, variants, flops=2 * 2 * rows * k * n)

            def mlp_inputs(rows=rows, k=k, n=n, r=r, dtype=dtype):
                weights = projection(n, k, r, dtype) + projection(n, k, r, dtype) + projection(k, n, r, dtype)
                return torch.randn(rows, k).to(dtype).requires_grad_(), *weights

            variants = {"pyfast": mlp, "peft": peft_mlp}
            yield Case("lora_mlp", label, mlp_inputs, variants, flops=3 * 2 * 2 * rows * k * n, tolerance=4e-2)
