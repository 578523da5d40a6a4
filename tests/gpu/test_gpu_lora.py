from test_op_lora import *  # noqa: F403
from test_op_lora import LoraWeights, check, drawn, lora_linears, lora_mlp, projection, pytest


@pytest.mark.parametrize("transposed", [False, True])
def test_large_products(kernel, dtype, transposed):
    """Enough tiles that every processor has one, or two: what forms them on sm_90a leaves smaller ones to cuBLAS."""
    x, p = drawn(2600, 1032, dtype=dtype), [projection(n, 1032, dtype, bias=n > 600) for n in (2056, 520, 264)]
    if transposed:
        p = [LoraWeights(q.weight.t().contiguous().t(), *q[1:]) for q in p]
    check(lora_linears, [x, p], {}, *kernel)


def test_large_mlp(kernel, dtype):
    x, shapes = drawn(2600, 1032, dtype=dtype), [(2056, 1032), (2056, 1032), (1032, 2056)]
    check(lora_mlp, [x, *(projection(*shape, dtype, rank=16) for shape in shapes)], {}, *kernel)
