"""Every family, patched, takes the training step on a GPU that it takes stock. Model and batch are made on the CPU and
moved, as a user's are: nothing that PyFast makes of its own may then lie on the CPU."""

import pytest
import torch
from hf.test_families import check_training_step, combinations

from benchmarks.end_to_end_gpu import serving


@pytest.fixture
def kernel(kernel):
    torch.set_default_device(None)
    with serving(kernel[0], "triton"):  # CUDA C++ has kernels for some ops alone
        yield kernel


@pytest.mark.parametrize(("case", "adapter", "kind", "dtype"), [row for row in combinations() if row[1] != "none"])
def test_training_step(case, adapter, kind, dtype, kernel):
    check_training_step(case, adapter, kind, dtype, "cuda")
