"""cross_entropy: bytes are the logits read once and their gradient written once."""

import torch
import torch.nn.functional as F

from pyfast import ops

from .bench_activation import DTYPES
from .harness import Case

SHAPES = ((32, 1000), (1024, 32000), (512, 128256))


def cases():
    for name, dtype in DTYPES.items():
        for rows, vocabulary in SHAPES:

            def inputs(rows=rows, vocabulary=vocabulary, dtype=dtype):
                logits = torch.randn(rows, vocabulary).to(dtype).requires_grad_()
                return logits, torch.randint(vocabulary, (rows,))

            variants = {"pyfast": ops.cross_entropy, "torch": lambda x, t: F.cross_entropy(x.float(), t)}
            size = rows * vocabulary * dtype.itemsize
            yield Case("cross_entropy", f"{name} {rows} × {vocabulary}", inputs, variants, bytes=2 * size)
