"""rope: bytes are q and k read and written, forward and backward."""

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pyfast import ops

from .harness import DTYPES, Case, clone, compiled
from .machine import elements_beyond_cache

#: (batch, heads, key/value heads, length, width)
SHAPES = ((1, 12, 4, 64, 64), (4, 12, 4, 512, 64), (1, 32, 8, elements_beyond_cache() // (32 * 128), 128))


def cases():
    for name, dtype in DTYPES.items():
        for batch, heads, kv_heads, length, width in SHAPES:

            def inputs(batch=batch, heads=heads, kv_heads=kv_heads, length=length, width=width, dtype=dtype):
                q, k = (torch.randn(batch, length, h, width).to(dtype).transpose(1, 2) for h in (heads, kv_heads))
                angle = torch.randn(1, length, width // 2).repeat(1, 1, 2)
                return q.requires_grad_(), k.requires_grad_(), angle.cos().to(dtype), angle.sin().to(dtype)

            stock = {"transformers": apply_rotary_pos_emb, "compile": compiled(apply_rotary_pos_emb)}
            label = f"{name} B{batch} H{heads}/{kv_heads} S{length} D{width}"
            size = 4 * batch * (heads + kv_heads) * length * width * dtype.itemsize
            yield Case("rope", label, inputs, {"pyfast": ops.rope} | stock, dtype, clone(2, of=2), bytes=size)
