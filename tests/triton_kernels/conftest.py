"""The Triton kernels in the interpreter: the tests of every op that take a `kernel`, with that kernel."""

import pytest
import torch

from pyfast import dispatch


@pytest.fixture
def kernel():
    """Instead of the native kernels of tests/conftest.py."""
    reason = dispatch.unavailable("triton")
    if reason is None and not dispatch.INTERPRETING:
        reason = "this process compiles Triton kernels for a GPU: TRITON_INTERPRET was not set"
    if reason is not None:
        pytest.skip(reason)
    return "triton", None


#: what takes the interpreter longest and crosses no border that other tests do not
LONG = (
    "few-queries",
    "one-query-two-heads",
    "bfloat16-no-key-but-sink",
    "bfloat16-short-and-long",
    "test_deterministic_and_replayed[float32",
    "test_strides",
    "300-257-515-33",
    "2-32003",
    "test_mixed_dtypes",
    "test_gradients_of_few_elements",
    "test_many_chunks[float32",
    "test_many_chunks[bfloat16-1]",
    "test_many_chunks[bfloat16-40000]",
    "test_upstream_gradient",
    "test_frozen_head",
    "True-shape4",
    *(f"{p}-shape4" for p in (0.0, 0.1, 0.9)),
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of the tests that test_op_*.py borrow, those that take no kernel run in their own module; the longest, and fp16,
    which differs from bf16 in a cast, are left to `make test-all`."""
    borrowed = [item for item in items if item.path.name.startswith("test_op_")]
    for item in borrowed:
        half = hasattr(item, "callspec") and item.callspec.params.get("dtype") == torch.float16
        if half or any(part in item.name for part in LONG):
            item.add_marker(pytest.mark.slow)
    repeated = {item for item in borrowed if "kernel" not in item.fixturenames}
    items[:] = [item for item in items if item not in repeated]
