"""linear_cross_entropy with a frozen head: FLOPs are the two products of the supervised rows, logits and dx."""

import torch
import torch.nn.functional as F

from pyfast import ops

from .bench_activation import DTYPES
from .harness import Case

#: (rows, hidden, vocabulary, share of rows ignored)
SHAPES = ((64, 256, 1000, 0.0), (2048, 768, 32000, 0.0), (2048, 2048, 128256, 0.5))


def eager(x, weight, target):
    return F.cross_entropy((x @ weight.T).float(), target)


def cases():
    for name, dtype in DTYPES.items():
        for rows, hidden, vocabulary, ignored in SHAPES:
            if dtype == torch.float32 and vocabulary > 100_000:
                continue  # minutes in fp32

            def inputs(rows=rows, hidden=hidden, vocabulary=vocabulary, ignored=ignored, dtype=dtype):
                target = torch.randint(vocabulary, (rows,))
                target[: int(rows * ignored)] = -100
                weight = (torch.randn(vocabulary, hidden) * hidden**-0.5).to(dtype)
                return torch.randn(rows, hidden).to(dtype).requires_grad_(), weight, target

            variants = {"pyfast": ops.linear_cross_entropy, "eager": eager}
            if hasattr(F, "linear_cross_entropy"):
                variants["F.linear_cross_entropy"] = F.linear_cross_entropy
            flops = 2 * 2 * rows * (1 - ignored) * hidden * vocabulary
            label = f"{name} {rows} rows, {hidden} → {vocabulary}, {ignored:.0%} ignored"
            yield Case("linear_cross_entropy", label, inputs, variants, flops=flops)
