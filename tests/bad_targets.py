"""Tests that the losses' kernels for GPUs share: their targets are not checked on the host. A bad one makes its own row
NaN, and nothing is read outside."""

import torch

from pyfast import dispatch

TARGET, BAD = [0, 33, -1, 32, -(2**40)], [False, True, True, False, True]


def assert_bad_rows_are_nan(*results):
    for result in results:
        assert result.isnan().reshape(len(BAD), -1).any(1).tolist() == BAD


def test_cross_entropy_target_out_of_range(kernel):
    loss, _, dinput = dispatch.kernels(kernel[0]).cross_entropy(
        torch.randn(5, 33), torch.tensor(TARGET), torch.rand(33), torch.ones(5, 2, dtype=torch.float64), -100, 0.1, None
    )
    assert_bad_rows_are_nan(loss, dinput)


def test_linear_cross_entropy_target_out_of_range(kernel):
    target, upstream = torch.tensor(TARGET), torch.ones(5, 2, dtype=torch.float64)
    arguments = (torch.randn(5, 20), torch.randn(33, 20), None, None, None, target, torch.rand(33), upstream)
    loss, _, dx, *_ = dispatch.kernels(kernel[0]).linear_cross_entropy(
        *arguments, 1.0, -100, 0.1, None, 1.0, 1000, [True, False, False, False, False]
    )
    assert_bad_rows_are_nan(loss, dx)
