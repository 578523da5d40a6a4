"""The instructions that the emulator imitates, on the GPU itself: the same small kernels, compiled by nvcc."""

import instructions
import pytest
import torch


@pytest.fixture(scope="module")
def kernels():
    if not torch.cuda.is_available() or torch.version.hip:
        pytest.skip("PyTorch sees no NVIDIA GPU here")
    path = instructions.compiled_for_gpus()
    if isinstance(path, str):
        pytest.skip(path)
    return instructions.Kernels(path, "cuda")


@pytest.mark.parametrize("kernel", instructions.SM_80 + instructions.SM_90A, ids=lambda k: k.__name__)
def test_right(kernels, kernel):
    """Several times: a race may be lost once."""
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0) or (kernel in instructions.SM_90A and capability != (9, 0)):
        pytest.skip(f"this GPU, sm_{capability[0]}{capability[1]}, does not have these instructions")
    for _ in range(5):
        torch.testing.assert_close(*kernel(kernels), rtol=0, atol=0)
