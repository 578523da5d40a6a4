import pytest
import torch

import pyfast
from pyfast.ops import LoraWeights, QuantizedWeight, lora_linear, lora_linears, lora_mlp

OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "no_adapter": {"rank": 0, "bias": True},
    "rank_17": {"rank": 17},
    "rank_70": {"rank": 70},
    "fp32_adapter": {"adapter": torch.float32, "bias": True},
    "full": {"weight_grad": True, "bias": True},
    "adapter_dominates": {"scaling": 64.0},
    "bias_dominates": {"bias": True, "bias_size": 100.0, "scaling": 1e-3},
}


def drawn(*shape, dtype, size=1.0, grad=True):
    return (torch.randn(shape) * size).to(dtype).requires_grad_(grad)


def projection(
    n, k, dtype, *, rank=8, bias=False, adapter=None, weight_grad=False, scaling=2.0, bias_size=1.0
) -> LoraWeights:
    adapter = adapter or dtype
    return LoraWeights(
        drawn(n, k, dtype=dtype, size=k**-0.5, grad=weight_grad),
        drawn(rank, k, dtype=adapter, size=k**-0.5) if rank else None,
        drawn(n, rank, dtype=adapter, size=rank**-0.5) if rank else None,
        scaling,
        drawn(n, dtype=adapter, size=bias_size) if bias else None,
    )


def linear(x, p, **kwargs):
    return lora_linear(x, p.weight, p.lora_A, p.lora_B, p.scaling, bias=p.bias, **kwargs)


def test_nf4_layout():
    """bitsandbytes' layout: the first of two elements in the high four bits, a scale per block."""
    data = torch.tensor([[0x0F], [0x70]], dtype=torch.uint8)
    weight = QuantizedWeight("nf4", data, torch.tensor([2.0, 10.0]), (2, 2), blocksize=2)
    expected = torch.tensor([[-2.0, 2.0], [0.0, -10.0]])
    assert torch.equal(pyfast.quantized.dequantize(weight, torch.float32), expected)


def test_reference_gradient():
    x, p = drawn(5, 6, dtype=torch.float64), projection(4, 6, torch.float64, rank=2, bias=True, weight_grad=True)
    down = projection(3, 4, torch.float64, rank=2)
    with pyfast.use_backend("reference"):
        assert torch.autograd.gradcheck(lambda x, *p: lora_linear(x, *p[:3], 2.0, bias=p[3]), (x, *p[:3], p.bias))
        for activation in ("silu", "gelu", "gelu_tanh", "relu"):
            assert torch.autograd.gradcheck(
                lambda x, *p, a=activation: lora_mlp(
                    x, LoraWeights(*p[:3]), LoraWeights(*p[:3]), LoraWeights(*p[3:]), activation=a
                ),
                (x, *p[:3], *down[:3]),
            )


W, A, B = torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ((torch.randn(3, 7), W, A, B, 1.0), ValueError, r"weight has shape \(6, 8\), expected \(N, 7\)"),
        ((torch.tensor(1.0), W, A, B, 1.0), ValueError, "x is float32"),
        ((torch.ones(3, 8, dtype=torch.int64), W, A, B, 1.0), TypeError, "x is int64"),
        ((torch.randn(3, 8), W[0], A, B, 1.0), ValueError, "weight has shape"),
        ((torch.randn(3, 8), W.bfloat16(), A, B, 1.0), TypeError, "weight is bfloat16"),
        ((torch.randn(3, 8), W.to("meta"), A, B, 1.0), ValueError, "weight is on meta"),
        ((torch.randn(3, 8), W, A[:0], B[:, :0], 1.0), ValueError, "lora_A has rank r = 0"),
        ((torch.randn(3, 8), W, A[:, :7], B, 1.0), ValueError, r"lora_A is .*expected \(r, K\) = \(2, 8\)"),
        ((torch.randn(3, 8), W, A, B[:5], 1.0), ValueError, r"lora_B is .*expected \(N, r\) = \(6, 2\)"),
        ((torch.randn(3, 8), W, A, B[:, :1], 1.0), ValueError, "lora_B is"),
        ((torch.randn(3, 8), W, A, None, 1.0), ValueError, "lora_A and lora_B must both be given"),
        ((torch.randn(3, 8), W, A.half(), B, 1.0), TypeError, "lora_A is float16"),
        ((torch.randn(3, 8), W, A, B, "2"), TypeError, "scaling is str"),
        ((torch.randn(3, 8), None, A, B, 1.0), TypeError, "weight is NoneType"),
        (([1.0], W, A, B, 1.0), TypeError, "x is list"),
    ],
)
def test_bad_input(arguments, error, words):
    with pytest.raises(error, match="lora_linear: " + words):
        lora_linear(*arguments)


def test_bad_options():
    x, p = torch.randn(3, 8), LoraWeights(W, A, B)
    wide = LoraWeights(torch.randn(7, 8), torch.randn(2, 8), torch.randn(7, 2))
    cases = [
        (lambda: linear(x, p._replace(bias=torch.randn(5))), ValueError, "bias is"),
        (lambda: linear(x, p, dropout_p=1.5), ValueError, "dropout_p is 1.5"),
        (lambda: linear(x, p, dropout_p=0.5, seed="a"), TypeError, "seed is str"),
        (lambda: lora_linears(x, []), ValueError, "projections is empty"),
        (lambda: lora_linears(x, [W]), TypeError, "projections.0. is Tensor, expected LoraWeights"),
        (lambda: lora_linears(x, [p, p._replace(lora_A=A[:1])]), ValueError, "projections.1..lora_B is"),
        (lambda: lora_linears(x, [p, p], dropout_p=0.1, seeds=[1]), ValueError, "expected a sequence of 2"),
        (lambda: lora_mlp(x, p, p, p, activation="tanh"), ValueError, "activation is 'tanh'"),
        (lambda: lora_mlp(x, p, wide, p), ValueError, "up.weight has shape"),
        (lambda: lora_mlp(x, p, p, p), ValueError, "down.weight has shape"),
        (lambda: lora_mlp(x, p, None, p), TypeError, "up is NoneType"),
        (lambda: QuantizedWeight.quantize(torch.randn(3, 5), "nf4"), ValueError, "multiple of blocksize"),
        (lambda: QuantizedWeight("int4", A, A, (2, 8)), ValueError, "format is 'int4'"),
        (lambda: QuantizedWeight("int8", A, A, (2, 8)), TypeError, "data is"),
        (lambda: QuantizedWeight("int8", A.char(), A, (2, 8)), ValueError, "scale has shape"),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()
