"""cross_entropy: bytes are the logits read once and their gradient written once."""

import torch
import torch.nn.functional as F

from pyfast import ops

from .harness import DTYPES, Case, clone, compiled

SHAPES = ((32, 1000), (1024, 32000), (512, 128256))
#: along the vocabulary, in bf16
SWEEP = tuple((512, vocabulary) for vocabulary in (4000, 8000, 16000, 32000, 64000))


def eager(logits, target):
    return F.cross_entropy(logits.float(), target)


def cases():
    for name, dtype in DTYPES.items():
        for rows, vocabulary in SHAPES + (SWEEP if name == "bf16" else ()):

            def inputs(rows=rows, vocabulary=vocabulary, dtype=dtype):
                logits = torch.randn(rows, vocabulary).to(dtype).requires_grad_()
                return logits, torch.randint(vocabulary, (rows,))

            yield Case(
                "cross_entropy",
                f"{name} {rows} × {vocabulary}",
                inputs,
                {"pyfast": ops.cross_entropy, "torch": eager, "compile": compiled(eager)},
                dtype,
                clone(1),
                bytes=2 * rows * vocabulary * dtype.itemsize,
                axis="vocabulary" if rows == 512 and name == "bf16" else None,
                x=vocabulary,
            )
