"""Calls of every Triton kernel's launcher at the sizes of training (Llama-3-8B's where an op has a place in it).

`python -m benchmarks.aot` makes them on meta tensors and compiles what they would launch, `pyfast tune` makes them on a
GPU and times it. A call takes the problem size (what the launcher passes to `launch.tile`) and the dtype; tensors are
made on torch's default device.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from pyfast.kernels import launch
from pyfast.kernels.tiles import TILES
from pyfast.ops.linear_cross_entropy import GPU_LOGITS_BYTES

_HEAD_ROWS = 512  # of 128256 classes they are one chunk of GPU_LOGITS_BYTES, so that a call is one launch


class Case(NamedTuple):
    """size: the largest problem of the main path. calls: variant -> call; the first is the main path. work: of that
    call for a size in a 16-bit dtype, (FLOPs of matrix products, bytes that must come from memory or go there)."""

    size: int
    calls: dict[str, Callable[[int, torch.dtype], object]]
    work: Callable[[int], tuple[float, float]]


def _randn(*shape, dtype):
    return torch.randn(shape, dtype=dtype)


def _fp32(*shape):
    return torch.rand(shape, dtype=torch.float32)


def _seed():
    return torch.zeros((), dtype=torch.int64)


def _gated(n, dtype):
    return launch.launchers()["gated"](*(_randn(4096, 2 * n, dtype=dtype)[:, :n] for _ in range(2)), "silu")


def _gated_backward(n, dtype):
    views = (_randn(4096, 2 * n, dtype=dtype)[:, :n] for _ in range(3))
    return launch.launchers()["gated_backward"](*views, "silu")


def _activate(n, dtype):
    return launch.launchers()["activate"](_randn(4096, n, dtype=dtype), _randn(n, dtype=dtype), "gelu")


def _activate_backward(n, dtype):
    x = _randn(4096, n, dtype=dtype)
    return launch.launchers()["activate_backward"](x, x, _randn(n, dtype=dtype), "gelu", True)


def _cross_entropy(n, dtype):
    upstream, target = torch.rand(4096, 2, dtype=torch.float64), torch.randint(n, (4096,))
    return launch.launchers()["cross_entropy"](
        _randn(4096, n, dtype=dtype), target, _fp32(n), upstream, -100, 0.1, 30.0
    )


def _linear_cross_entropy(n, dtype, everything=False):
    """A frozen head of 4096 columns; everything: all options and gradients, and two numbers kept of each logit."""
    rows = _HEAD_ROWS // 2 if everything else _HEAD_ROWS
    x, weight, target = _randn(rows, 4096, dtype=dtype), _randn(n, 4096, dtype=dtype), torch.randint(n, (rows,))
    upstream = torch.rand(rows, 2, dtype=torch.float64)
    call, tail = launch.launchers()["linear_cross_entropy"], (1 / 64, GPU_LOGITS_BYTES)
    if everything:
        extra = [_randn(n, dtype=dtype), _randn(16, 4096, dtype=dtype), _randn(n, 16, dtype=dtype)]
        return call(x, weight, *extra, target, _fp32(n), upstream, 2.0, -100, 0.1, 30.0, *tail, [True] * 5)
    needs = [True, False, False, False, False]
    return call(x, weight, None, None, None, target, None, upstream, 1.0, -100, 0.0, None, *tail, needs)


def _norm(n, dtype):
    x, w = _randn(4096, n, dtype=dtype), _randn(n, dtype=dtype)
    return launch.launchers()["norm"](x, w, w, x, 1e-5, 0.0, True)


def _norm_backward(n, dtype):
    x, w, one = _randn(4096, n, dtype=dtype), _randn(n, dtype=dtype), _fp32(4096)
    return launch.launchers()["norm_backward"](x, x, x, one, one, w, w, 0.0, True, True, True)


def _rope(n, dtype):
    angles = _randn(1, 2048, n, dtype=dtype)
    x = _randn(4, 2048, 32, n, dtype=dtype).transpose(1, 2)
    return launch.launchers()["rope"](x, angles, angles, False, False)


def _attention(dim, dtype, packed=False, everything=False, backward=False):
    """Llama-3's heads, causal; packed with a window, as long-context models train; and every option at once."""
    batch, heads, kv_heads, rows = 2, 32, 8, 4096
    if packed:
        q, out, dout = (_randn(batch * rows, heads, dim, dtype=dtype) for _ in range(3))
        k, v = (_randn(batch * rows, kv_heads, dim, dtype=dtype) for _ in range(2))
        sums = _fp32(heads, batch * rows)
    else:
        q, out, dout = (_randn(batch, rows, heads, dim, dtype=dtype).transpose(1, 2) for _ in range(3))
        k, v = (_randn(batch, rows, kv_heads, dim, dtype=dtype).transpose(1, 2) for _ in range(2))
        sums = _fp32(batch, heads, rows)
    cu_seqlens = torch.arange(0, 9 * 1024, 1024, dtype=torch.int32) if packed else None
    extra = [None, None, None, None, cu_seqlens, cu_seqlens]
    options = [rows, dim**-0.5, 0.0, 1024 if packed else -1, 0, 0.0]
    if everything:
        bias, mask = _randn(batch, 1, rows, rows, dtype=dtype), torch.ones(batch, rows, dtype=torch.bool)
        extra = [_fp32(heads), mask, bias, _seed(), None, None]
        options = [rows, dim**-0.5, 30.0, 1024, 0, 0.1]
    if backward:
        dlse, maximum, log_sum = sums if everything else None, sums + 4, sums + 7
        return launch.launchers()["attention_backward"](
            dout, dlse, q, k, v, out, maximum, log_sum, *extra, *options, everything
        )
    return launch.launchers()["attention"](q, k, v, *extra, *options)


def _matmul(n, dtype):
    """A projection of 4096 columns with its adapter in the epilogue."""
    from pyfast.kernels.lora import matmul

    x, weight = _randn(8192, 4096, dtype=dtype), _randn(n, 4096, dtype=dtype)
    return matmul(x, weight.T, dtype, adapter=(_fp32(8192, 16), _randn(n, 16, dtype=dtype).T, 2.0))


def _matmul_dropout(n, dtype):
    """x lora_Aᵀ where there are few columns, else a projection's gradient by x, with dropout."""
    from pyfast.kernels.lora import matmul

    x = _randn(8192, 4096, dtype=dtype)
    if n <= 64:
        return matmul(x, _randn(n, 4096, dtype=dtype).T, dtype, dropout=(_seed(), 0.1, (4096, 1)), drop_a=True)
    adapter = (_fp32(8192, 16), _randn(16, n, dtype=dtype), 2.0)
    return matmul(x, _randn(4096, n, dtype=dtype), dtype, adapter=adapter, dropout=(_seed(), 0.1, (n, 1)))


def _adapter_gradients(rank, dtype):
    """Of a projection to 4096 columns with a bias."""
    from pyfast.kernels.lora import adapter_gradients

    d, lora_B = _randn(8192, 4096, dtype=dtype), _randn(4096, rank, dtype=dtype)
    return adapter_gradients(d, lora_B, _fp32(8192, rank), low=True, db=True, dbias=True)


def _dropout(n, dtype):
    return launch.launchers()["dropout"](_randn(4096, n, dtype=dtype), _seed(), 0.1)


def _dequantize(n, dtype):
    codes = torch.randint(256, (4096 * n // 2, 1), dtype=torch.uint8)
    levels = [i / 16 for i in range(16)]
    return launch.launchers()["dequantize"](codes, _fp32(64 * n), levels, 1, 4096 * n, 1, 64, dtype)


_ATTENTION = {"causal": {}, "packed window": {"packed": True}, "everything": {"everything": True}}
_FORWARD = {name: partial(_attention, **options) for name, options in _ATTENTION.items()}
_BACKWARD = {name: partial(_attention, **options, backward=True) for name, options in _ATTENTION.items()}
_HEAD = {"frozen head": _linear_cross_entropy, "everything": partial(_linear_cross_entropy, everything=True)}


def _elements(per_column: float):
    """The work of a kernel that only moves so many bytes per column of the size."""
    return lambda n: (0.0, per_column * n)


def _attention_work(products: int, of_queries: int, of_keys: int):
    """Of so many products of the causal pairs, and so many tensors like q and like k read or written."""

    def work(dim):
        pairs, queries, keys = 2 * 32 * 4096 * 4097 / 2, 2 * 4096 * 32, 2 * 4096 * 8
        return 2 * products * pairs * dim, 2 * dim * (of_queries * queries + of_keys * keys) + 8 * queries

    return work


def _matmul_work(n):
    return 2 * 8192 * n * (4096 + 16), 2 * (8192 * 4096 + 4096 * n + 8192 * n) + 4 * 8192 * 16


def _head_work(n):
    return 2 * _HEAD_ROWS * 4096 * n, 2 * (_HEAD_ROWS * 4096 + 4096 * n + _HEAD_ROWS * n)


CASES = {
    "gated_kernel": Case(14336, {"": _gated}, _elements(3 * 2 * 4096)),
    "gated_backward_kernel": Case(14336, {"": _gated_backward}, _elements(5 * 2 * 4096)),
    "activate_kernel": Case(16384, {"": _activate}, _elements(2 * 2 * 4096)),
    "activate_backward_kernel": Case(16384, {"": _activate_backward}, _elements(3 * 2 * 4096)),
    "cross_entropy_kernel": Case(128256, {"": _cross_entropy}, _elements(2 * 2 * 4096)),
    "exponentials_kernel": Case(128256, _HEAD, _head_work),
    "logits_gradient_kernel": Case(128256, _HEAD, _elements(2 * 2 * _HEAD_ROWS)),
    "norm_kernel": Case(8192, {"": _norm}, _elements(4 * 2 * 4096)),
    "norm_backward_kernel": Case(8192, {"": _norm_backward}, _elements(4 * 2 * 4096)),
    "rope_kernel": Case(128, {"": _rope}, _elements(2 * 2 * 4 * 2048 * 32)),
    "attention_dbias_kernel": Case(128, {"everything": _BACKWARD["everything"]}, _attention_work(2, 2, 2)),
    "dropout_kernel": Case(4096, {"": _dropout}, _elements(2 * 2 * 4096)),
    "dequantize_kernel": Case(4096, {"": _dequantize}, _elements((0.5 + 4 / 64 + 2) * 4096)),
    "adapter_gradients_kernel": Case(
        32,
        {"": _adapter_gradients},
        lambda rank: (2 * 2 * 8192 * 4096 * rank, 2 * (8192 * 4096 + 4096 * rank) + 8 * (8192 + 4096) * rank),
    ),
    "matmul_kernel": Case(4096, {"": _matmul}, _matmul_work),
    "matmul_kernel with dropout": Case(4096, {"": _matmul_dropout}, _matmul_work),
    "attention_kernel": Case(128, _FORWARD, _attention_work(2, 2, 2)),
    "attention_dq_kernel": Case(128, _BACKWARD, _attention_work(3, 4, 2)),
    "attention_dkv_kernel": Case(128, _BACKWARD, _attention_work(4, 2, 4)),
}
#: kernels that multiply matrices
MATRIX = {
    "adapter_gradients_kernel",
    "attention_dbias_kernel",
    "attention_dkv_kernel",
    "attention_dq_kernel",
    "attention_kernel",
    "exponentials_kernel",
    "matmul_kernel",
    "matmul_kernel with dropout",
}


def classes(kernel: str, architecture: str) -> list[tuple[int | None, int]]:
    """(limit, a problem size to try it at) of every row of a kernel's tile table."""
    found, size = [], 0
    for limit, _ in TILES[kernel].get(architecture, TILES[kernel]["default"]):
        size = limit or max(2 * size, CASES[kernel].size)
        found.append((limit, size))
    return found
