"""linear_cross_entropy with a frozen head: FLOPs are the two products of the supervised rows, logits and dx.

Bytes: x read, dx written, the weight read forward and backward.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from pyfast import ops

from .harness import DTYPES, Case, compiled

#: (rows, hidden, vocabulary, share of rows ignored); the last takes seconds per call, so that only eager is its peer
SHAPES = ((64, 256, 1000, 0.0), (2048, 768, 32000, 0.0), (2048, 2048, 128256, 0.5))
#: along the vocabulary, in bf16
SWEEP = tuple((512, 768, vocabulary, 0.0) for vocabulary in (4000, 8000, 16000, 32000, 64000, 128000))
CHUNK = 256  # rows


def eager(x, weight, target):
    return F.cross_entropy((x @ weight.T).float(), target)


def chunked(x, weight, target):
    """Eager in chunks of rows, each chunk's logits made again in backward so that none are held."""

    def loss(x, target):
        return F.cross_entropy((x @ weight.T).float(), target, reduction="sum")

    parts = zip(x.split(CHUNK), target.split(CHUNK), strict=True)
    return sum(checkpoint(loss, *part, use_reentrant=False) for part in parts) / (target != -100).sum()


def peers(rows: int, hidden: int) -> dict:
    """Those that this environment has; cut-cross-entropy (the extra `peers`) cannot be imported without triton."""
    found = {"eager": eager, "compile": compiled(eager), f"eager, chunks of {CHUNK} rows": chunked}
    # its documentation: a gain from rows >= hidden; below, at 128,000 classes, a call takes half a minute
    if hasattr(torch.nn, "LinearCrossEntropyOptions") and rows >= hidden:
        options = torch.nn.LinearCrossEntropyOptions()
        found["F.linear_cross_entropy, chunked"] = lambda x, w, t: F.linear_cross_entropy(x, w, t, options=options)
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        return found
    return found | {
        "cut-cross-entropy torch_compile": lambda x, w, t: linear_cross_entropy(x, w, t, impl="torch_compile")
    }


def gemms():
    """The two products of the supervised rows, the logits' memory reused."""
    buffer = []

    def products(x, weight, target):
        rows = x[target != -100]
        if not buffer:
            buffer.append(x.new_empty(len(rows), len(weight)))
        torch.mm(torch.mm(rows, weight.T, out=buffer[0]), weight)

    return products


def cases():
    for name, dtype in DTYPES.items():
        for rows, hidden, vocabulary, ignored in SHAPES + (SWEEP if name == "bf16" else ()):
            if dtype == torch.float32 and vocabulary > 100_000:
                continue  # minutes in fp32

            def inputs(rows=rows, hidden=hidden, vocabulary=vocabulary, ignored=ignored, dtype=dtype):
                target = torch.randint(vocabulary, (rows,))
                target[: int(rows * ignored)] = -100
                weight = (torch.randn(vocabulary, hidden) * hidden**-0.5).to(dtype)
                return torch.randn(rows, hidden).to(dtype).requires_grad_(), weight, target

            supervised = round(rows * (1 - ignored))
            yield Case(
                "linear_cross_entropy",
                f"{name} {rows} rows, {hidden} → {vocabulary}, {ignored:.0%} ignored",
                inputs,
                {"pyfast": ops.linear_cross_entropy} | (peers(rows, hidden) if hidden < 2048 else {"eager": eager}),
                dtype,
                {"two GEMMs": gemms()},
                flops=2 * 2 * supervised * hidden * vocabulary,
                bytes=(2 * rows * hidden + 2 * hidden * vocabulary) * dtype.itemsize,
                axis="vocabulary" if rows == 512 else None,
                x=vocabulary,
            )
