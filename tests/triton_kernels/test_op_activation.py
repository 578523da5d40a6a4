import torch
from test_activation import *  # noqa: F403


def test_strides_of_their_own(gated, kernel):
    """gate is a part of a wider tensor, up is not."""
    check(  # noqa: F405
        lambda wide, up: gated(wide[:, :70], up),
        [torch.randn(9, 100, requires_grad=True), torch.randn(9, 70, requires_grad=True)],
        backend="triton",
    )
