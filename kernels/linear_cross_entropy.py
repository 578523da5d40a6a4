"""The language-model head and its loss in Triton: the logits of a chunk of rows at a time, never of all.

Rows that count come first (a stable sort, so that the order is always the same), and the products stop at their number,
which only the GPU knows. For each chunk: the logits with LoRA in the product's epilogue, the cross-entropy kernel,
which turns them into their gradient, and that gradient's products with what needs one (Liger-Kernel's scheme).
"""

import torch

from pyfast.kernels import launch
from pyfast.kernels.cross_entropy import row_losses
from pyfast.kernels.lora import matmul


@launch.launcher
def linear_cross_entropy(
    input, linear_weight, linear_bias, lora_A, lora_B, target, weight, upstream, scaling, ignore_index,
    label_smoothing, softcap, logit_scale, logits_bytes, needs,
):  # fmt: skip
    rows, classes = len(target), len(linear_weight)
    loss = input.new_empty(rows, dtype=torch.float64)
    lse = torch.empty_like(loss)
    need_x, need_weight, need_bias, need_A, need_B = needs if upstream is not None else [False] * 5
    dx = torch.zeros_like(input) if need_x else input.new_empty(0)
    dweight, dbias, dA, dB = (
        (
            input.new_zeros(p.shape if p is not None and needed else 0, dtype=torch.float32)
            for p, needed in zip((linear_weight, linear_bias, lora_A, lora_B), needs[1:], strict=True)
        )
        if upstream is not None
        else (input.new_empty(0, dtype=torch.float32) for _ in range(4))
    )

    ignored = target == ignore_index
    order = torch.argsort(ignored.to(torch.int8), stable=True)
    counted = rows - ignored.sum()
    bias = None if linear_bias is None else linear_bias.float() * logit_scale
    chunk_rows = max(16, logits_bytes // (4 * classes))
    for begin in range(0, rows, chunk_rows):
        at = order[begin : begin + chunk_rows]
        limit = (counted - begin).clamp(0)
        x = torch.where(ignored[at, None], 0, input[at])  # what ignored rows hold must not reach a gradient
        adapter = None
        if lora_A is not None:
            h = matmul(x, lora_A.T, torch.float32)
            adapter = (h, lora_B.T, scaling * logit_scale)
        logits = matmul(x, linear_weight.T, torch.float32, bias=bias, adapter=adapter, alpha=logit_scale, limit=limit)
        d = None if upstream is None else input.new_empty(logits.shape)
        chunk_loss, chunk_lse = row_losses(
            logits, target[at], weight, None if d is None else upstream[at], d, ignore_index, label_smoothing, softcap
        )
        loss[at], lse[at] = chunk_loss, chunk_lse
        if d is None:
            continue
        if need_weight:
            matmul(d.T, x, torch.float32, out=dweight, add=dweight, alpha=logit_scale)
        if need_bias:
            dbias += d.sum(0, dtype=torch.float32) * logit_scale
        if need_B:
            dB += matmul(d.T, h, torch.float32, alpha=scaling * logit_scale, split=True)
        adapter = None
        if lora_A is not None and (need_x or need_A):
            adapter = (matmul(d, lora_B, torch.float32), lora_A, scaling * logit_scale)
        if need_A:
            dA += matmul(x.T, adapter[0], torch.float32, alpha=scaling * logit_scale, split=True).T
        if need_x:
            out = torch.zeros_like(x)
            dx[at] = matmul(d, linear_weight, x.dtype, out=out, adapter=adapter, alpha=logit_scale, limit=limit)
    return loss, lse, dx, dweight, dbias, dA, dB
