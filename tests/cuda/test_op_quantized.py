"""Weights in nf4, int8 and fp8: dequantised by the CUDA kernels, or multiplied with as they are."""

import pytest
import torch
from test_lora import check, drawn, linear, projection, test_quantized  # noqa: F401

import pyfast
from pyfast.ops import lora, lora_linear
from pyfast.ops.lora import _dequantize
from pyfast.quantized import QuantizedWeight, dequantize


@pytest.mark.parametrize(
    "format, shape, options",
    [
        ("nf4", (3, 10), {"blocksize": 6}),
        ("nf4", (5, 2050), {"blocksize": 2}),
        ("int8", (7, 13), {}),
        ("int8", (300, 8), {}),
        ("fp8", (11, 3), {}),
        ("fp8", (130, 259), {"tiles": True}),
    ],
)
def test_dequantized_blocks_begin_anywhere(kernel, dtype, format, shape, options):
    """Equal to the last bit, wherever a block, a row or a thread's elements end."""
    weight = QuantizedWeight.quantize(torch.randn(shape), format, **options)
    assert torch.equal(_dequantize(kernel[0], weight, dtype), dequantize(weight, dtype))


@pytest.mark.parametrize("format", ["nf4", "int8", "fp8", "fp8_tiles"])
@pytest.mark.parametrize("rows, k, n", [(1, 64, 16), (9, 1088, 24), (16, 1090, 33), (32, 40, 17)])
def test_few_rows(kernel, dtype, format, rows, k, n):
    """Up to 32 rows are multiplied with codes: more columns than the warps take at a time, and vectors that are not
    whole."""
    weight = QuantizedWeight.quantize(
        torch.randn(n, k) * k**-0.5, format.removesuffix("_tiles"), blocksize=n * 2, tiles=format == "fp8_tiles"
    )
    p = projection(n, k, dtype, bias=True)
    check(linear, [drawn(rows, k, dtype=dtype), p._replace(weight=weight)], {}, *kernel)
    frozen = p._replace(weight=weight, lora_A=None, lora_B=None, bias=None)
    check(linear, [drawn(rows, k, dtype=dtype), frozen], {}, *kernel)


def test_few_rows_write_no_weight_out(kernel, monkeypatch):
    """Forward, in 16 bits, up to 32 rows; else the weight is dequantised."""
    called = []
    monkeypatch.setattr(lora, "_dequantize", lambda *a: called.append(a[1].format) or _dequantize(*a))
    weight = QuantizedWeight.quantize(torch.randn(24, 64), "nf4")
    with pyfast.use_backend(kernel[0]):
        for rows, dtype, expected in ((32, torch.bfloat16, 0), (33, torch.bfloat16, 1), (2, torch.float32, 2)):
            lora_linear(torch.randn(rows, 64, dtype=dtype), weight)
            assert len(called) == expected
