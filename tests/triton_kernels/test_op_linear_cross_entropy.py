import torch
from test_linear_cross_entropy import *  # noqa: F403
from test_linear_cross_entropy import check, inputs, linear_cross_entropy


def test_trainable_parts(kernel):
    """As borrowed, with more elements: the 72 of the original gradient leave PyTorch's worst error to luck."""
    (x, head, target), options = inputs(60, 72, 301, bias=True, rank=2)
    tensors = {"input": x, "linear_weight": head, **{k: v for k, v in options.items() if torch.is_tensor(v)}}
    for trained in tensors:
        given = {k: v.detach().requires_grad_(k == trained) for k, v in tensors.items()}
        check(linear_cross_entropy, [], {**options, **given, "target": target}, *kernel)


def test_target_out_of_range_is_nan(kernel):
    """A GPU's targets are not checked on the host: a bad one makes its own row NaN, and nothing is read outside."""
    target, upstream = torch.tensor([0, 33, -1, 32, -(2**40)]), torch.ones(5, 2, dtype=torch.float64)
    arguments = (torch.randn(5, 20), torch.randn(33, 20), None, None, None, target, torch.rand(33), upstream)
    loss, _, dx, *_ = torch.ops.pyfast_triton.linear_cross_entropy(
        *arguments, 1.0, -100, 0.1, None, 1.0, 1000, [True, False, False, False, False]
    )
    for result in (loss, dx):
        assert result.isnan().reshape(5, -1).any(1).tolist() == [False, True, True, False, True]
