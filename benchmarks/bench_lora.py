"""lora_linear and lora_mlp: FLOPs are the products with the frozen weights, forward and dx: what LoRA should cost.

Bytes: x read and y written forward, x and dy read and dx written backward, the weights read twice; the MLP's gate and
up are also written and read once.
"""

import torch
import torch.nn.functional as F

from pyfast import ops
from pyfast.ops import LoraWeights

from .harness import DTYPES, Case, compiled

#: (rows, in, out, rank)
SHAPES = ((64, 256, 256, 8), (2048, 768, 768, 16), (2048, 768, 2048, 16), (2048, 2048, 5632, 16))


def projection(n, k, r, dtype):
    weight = (torch.randn(n, k) * k**-0.5).to(dtype)
    return weight, torch.randn(r, k).mul(k**-0.5).requires_grad_(), torch.randn(n, r).mul(r**-0.5).requires_grad_()


def peft(x, weight, a, b):
    """As PEFT computes it beside a lower-precision base: the adapter in fp32, its result added after."""
    return F.linear(x, weight) + (F.linear(F.linear(x.float(), a), b) * 2.0).to(x.dtype)


def peft_same_dtype(x, weight, a, b):
    """As PEFT computes it with autocast_adapter_dtype=False: the adapter in the base's dtype."""
    a, b = a.to(x.dtype), b.to(x.dtype)
    return F.linear(x, weight) + F.linear(F.linear(x, a), b) * 2.0


def peft_mlp(x, *weights):
    gate, up, down = (weights[i : i + 3] for i in (0, 3, 6))
    return peft(F.silu(peft(x, *gate)) * peft(x, *up), *down)


def linear(x, weight, a, b):
    return ops.lora_linear(x, weight, a, b, 2.0)


def mlp(x, *weights):
    return ops.lora_mlp(x, *(LoraWeights(*weights[i : i + 3], 2.0) for i in (0, 3, 6)))


def gemms(x, *weights):
    """Each frozen weight's two products; the second takes the first's result for the incoming gradient."""
    down = weights[6:7]
    for weight in weights[0:6:3]:
        y = x @ weight.T
        y @ weight
    for weight in down:
        (y @ weight.T) @ weight


def cases():
    for name, dtype in DTYPES.items():
        for rows, k, n, r in SHAPES:
            label = f"{name} {rows} rows, {k} → {n}, r {r}"

            def inputs(rows=rows, k=k, n=n, r=r, dtype=dtype):
                return torch.randn(rows, k).to(dtype).requires_grad_(), *projection(n, k, r, dtype)

            def mlp_inputs(rows=rows, k=k, n=n, r=r, dtype=dtype):
                weights = projection(n, k, r, dtype) + projection(n, k, r, dtype) + projection(k, n, r, dtype)
                return torch.randn(rows, k).to(dtype).requires_grad_(), *weights

            variants = {"pyfast": linear, "peft": peft, "compile": compiled(peft)}
            if name == "bf16":
                variants["peft, adapters in bf16"] = peft_same_dtype
            yield Case(
                "lora_linear",
                label,
                inputs,
                variants,
                dtype,
                {"two GEMMs": gemms},
                flops=2 * 2 * rows * k * n,
                bytes=(3 * rows * k + 2 * rows * n + 2 * n * k) * dtype.itemsize,
                tolerance=4e-2,
            )
            yield Case(
                "lora_mlp",
                label,
                mlp_inputs,
                {"pyfast": mlp, "peft": peft_mlp, "compile": compiled(peft_mlp)},
                dtype,
                {"six GEMMs": gemms},
                flops=3 * 2 * 2 * rows * k * n,
                bytes=(5 * rows * k + 4 * rows * n + 6 * n * k) * dtype.itemsize,
                tolerance=4e-2,
            )
