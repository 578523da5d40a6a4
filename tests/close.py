"""Asserts the error rule of pyfast/close.py."""

import torch

from pyfast.close import violation


def assert_close(k: torch.Tensor, ref: torch.Tensor, torch_result: torch.Tensor, name: str = "result") -> None:
    reason = violation(k, ref, torch_result)
    assert reason is None, f"{name}: {reason}"
