"""attention: FLOPs are 2 products forward and 5 backward, as flash attention counts, of the unmasked pairs."""

import torch
import torch.nn.functional as F

from pyfast import ops

from .bench_activation import DTYPES
from .harness import Case

#: (batch, heads, key/value heads, length, width, causal)
SHAPES = (
    (1, 4, 4, 64, 64, True),
    (4, 12, 4, 512, 64, True),
    (1, 16, 16, 2048, 64, True),
    (1, 16, 4, 2048, 128, True),
    (8, 12, 12, 128, 32, False),
)


def cases():
    for name, dtype in DTYPES.items():
        for batch, heads, kv_heads, length, width, causal in SHAPES:

            def inputs(batch=batch, heads=heads, kv_heads=kv_heads, length=length, width=width, dtype=dtype):
                sizes = (heads, kv_heads, kv_heads)
                q, k, v = (torch.randn(batch, length, h, width).to(dtype).transpose(1, 2) for h in sizes)
                return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()

            variants = {
                "pyfast": lambda q, k, v, c=causal: ops.attention(q, k, v, causal=c),
                "sdpa": lambda q, k, v, c=causal: F.scaled_dot_product_attention(q, k, v, is_causal=c, enable_gqa=True),
            }
            pairs = length * (length + 1) / 2 if causal else length * length
            label = f"{name} B{batch} H{heads}/{kv_heads} S{length} D{width}{' causal' if causal else ''}"
            yield Case("attention", label, inputs, variants, flops=7 * 2 * batch * heads * pairs * width)
