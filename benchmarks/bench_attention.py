"""attention: FLOPs are 2 products forward and 5 backward, as flash attention counts, of the unmasked pairs.

Bytes: q, k, v read and the output written forward; all four and its gradient read, three gradients written backward.
"""

import torch
import torch.nn.functional as F

from pyfast import ops

from .harness import DTYPES, Case, compiled

#: (batch, heads, key/value heads, length, width, causal)
SHAPES = (
    (1, 4, 4, 64, 64, True),
    (4, 12, 4, 512, 64, True),
    (8, 12, 12, 128, 32, False),
    (1, 16, 16, 2048, 64, True),
    (1, 16, 4, 2048, 128, True),
)
#: along the sequence length, in bf16
SWEEP = tuple((1, 16, 16, length, 64, True) for length in (256, 512, 1024, 4096))
LONGEST_EAGER = 2048  # beyond it the scores of eager attention are gigabytes


def eager(q, k, v, causal):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1) @ v


def cases():
    for name, dtype in DTYPES.items():
        for batch, heads, kv_heads, length, width, causal in SHAPES + (SWEEP if name == "bf16" else ()):

            def inputs(batch=batch, heads=heads, kv_heads=kv_heads, length=length, width=width, dtype=dtype):
                sizes = (heads, kv_heads, kv_heads)
                q, k, v = (torch.randn(batch, length, h, width).to(dtype).transpose(1, 2) for h in sizes)
                return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()

            def sdpa(q, k, v, causal=causal):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

            def plain(q, k, v, causal=causal):
                return eager(q, k, v, causal)

            variants = {"pyfast": lambda q, k, v, c=causal: ops.attention(q, k, v, causal=c), "sdpa": sdpa}
            if length <= LONGEST_EAGER:
                variants |= {"eager": plain, "compile": compiled(plain)}
            pairs = length * (length + 1) / 2 if causal else length * length
            yield Case(
                "attention",
                f"{name} B{batch} H{heads}/{kv_heads} S{length} D{width}{' causal' if causal else ''}",
                inputs,
                variants,
                dtype,
                flops=7 * 2 * batch * heads * pairs * width,
                bytes=6 * batch * (heads + kv_heads) * length * width * dtype.itemsize,
                tolerance=3e-2,
                axis="sequence length" if (batch, heads, kv_heads, name) == (1, 16, 16, "bf16") else None,
                x=length,
            )
