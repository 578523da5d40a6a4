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
