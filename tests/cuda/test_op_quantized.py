"""Weights in nf4, int8 and fp8: dequantised by the CUDA kernels."""

import pytest
import torch
from test_lora import test_quantized  # noqa: F401

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
