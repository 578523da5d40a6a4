import pytest
import torch

import pyfast
from pyfast.ops import layer_norm, rms_norm


def leaf(*shape, dtype=torch.float32, scale=1.0, shift=0.0):
    return (torch.randn(*shape) * scale + shift).to(dtype).requires_grad_()


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("weight_shape", [(5,), (3, 5), None])
@pytest.mark.parametrize("residual", [False, True])
def test_reference_gradient(backend, weight_shape, residual):
    x, r = leaf(2, 3, 5, dtype=torch.float64), leaf(2, 3, 5, dtype=torch.float64) if residual else None
    w = b = None
    if weight_shape:
        w, b = leaf(*weight_shape, dtype=torch.float64), leaf(*weight_shape, dtype=torch.float64)
    with pyfast.use_backend(backend):
        for f in (
            lambda x, r, w, b: rms_norm(x, w, 1e-2, residual=r, weight_offset=0.5),
            lambda x, r, w, b: layer_norm(x, w, b, 1e-2, residual=r),
        ):
            assert torch.autograd.gradcheck(f, (x, r, w, b))


def test_reference_values():
    """Against the formulas of transformers' LlamaRMSNorm, Gemma2RMSNorm and torch's layer_norm."""
    x, r, w, b = leaf(4, 24), leaf(4, 24), leaf(24), leaf(24)
    llama = w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
    gemma = (1 + w) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
    for backend in ("reference", "torch"):
        with pyfast.use_backend(backend):
            torch.testing.assert_close(rms_norm(x, w, 1e-6), llama)
            torch.testing.assert_close(rms_norm(x, w, 1e-6, weight_offset=1.0), gemma)
            y, h = layer_norm(x, w, b, 1e-5, residual=r)
            torch.testing.assert_close(h, x + r)
            torch.testing.assert_close(y, torch.nn.functional.layer_norm(x + r, (24,), w, b, 1e-5))


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"x": torch.randn(())}, ValueError, r"x has shape \(\)"),
        ({"x": torch.randn(3, 0)}, ValueError, "N at least 1"),
        ({"x": torch.ones(3, 8, dtype=torch.int64)}, TypeError, "x is int64"),
        ({"x": None}, TypeError, "x is NoneType"),
        ({"weight": torch.randn(7)}, ValueError, r"weight has shape \(7,\), expected \(8,\)"),
        ({"weight": torch.randn(4, 8)}, ValueError, "weight has shape"),
        ({"weight": torch.randn(1, 3, 8)}, ValueError, "weight has shape"),
        ({"weight": torch.randn(8).bfloat16()}, TypeError, "weight is bfloat16"),
        ({"weight": torch.randn(8, device="meta")}, ValueError, "weight is .* on meta"),
        ({"weight": [1.0]}, TypeError, "weight is list"),
        ({"residual": torch.randn(8)}, ValueError, "residual is"),
        ({"residual": torch.randn(3, 8).half()}, TypeError, "residual is float16"),
        ({"eps": -1.0}, ValueError, "eps is -1"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"x": torch.randn(3, 8), "weight": torch.randn(8), "eps": 1e-6} | change
    with pytest.raises(error, match=words):
        rms_norm(**arguments)
    with pytest.raises(error, match=words):
        layer_norm(**arguments, bias=None)
    if "weight" in change:
        arguments["bias"], arguments["weight"] = arguments["weight"], None
        with pytest.raises(error, match=words.replace("weight", "bias")):
            layer_norm(**arguments)
