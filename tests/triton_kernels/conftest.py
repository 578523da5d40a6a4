"""The Triton kernels in the interpreter: the tests of every op that take a `kernel`, with that kernel."""

import pytest

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


def pytest_collection_modifyitems(items):
    """Of the tests that test_op_*.py borrow, those that take no kernel run in their own module."""
    items[:] = [i for i in items if not i.path.name.startswith("test_op_") or "kernel" in i.fixturenames]
