"""Shared fixtures. Uninitialised memory is NaN in every test, in C++ kernels' allocations too."""

import os
from pathlib import Path

import pytest
import torch

if torch.cuda.is_available():
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what deterministic algorithms ask for
else:
    # before pyfast is imported: tests/triton_kernels then runs on this machine's CPU
    os.environ["TRITON_INTERPRET"] = "1"

from harness import DTYPES, KERNELS, available

from pyfast import dispatch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty and its kin return NaN, so that an element that a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if dispatch.unavailable("cpu") is None:
        torch.ops.pyfast_cpu.allocate_by_dispatcher(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def kernels_serve_small_calls(monkeypatch):
    """The tests' shapes are small, and it is the kernels that they test; tests/test_dispatch.py tests the choice."""
    monkeypatch.setattr(dispatch, "SMALL", {})


@pytest.fixture(params=KERNELS, ids=lambda k: "-".join(filter(None, k)))
def kernel(request):
    """(backend, arch) of every kernel that this machine can run."""
    reason = available(*request.param)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture(scope="session")
def data_folder():
    """The real data sets: PYFAST_DATA, else ../shared/data beside the repository."""
    folder = Path(os.environ.get("PYFAST_DATA", Path(__file__).parents[1] / ".." / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set PYFAST_DATA to the folder that holds gsm8k/ and sst2/")
    return folder
