"""The CUDA kernels in the emulator: the tests of every op that take a `kernel`, with that kernel."""

import zlib

import pytest
import torch

from pyfast import dispatch, emulator

#: (order of threads, whether asynchronous copies come late)
SCHEDULES = [(order, lazy) for order in emulator.ORDERS for lazy in (True, False)]


@pytest.fixture
def arch():
    return "sm_80"


@pytest.fixture(params=SCHEDULES, ids=lambda s: f"{s[0]}-{'lazy' if s[1] else 'eager'}")
def kernel(request, arch):
    """Instead of the native kernels of tests/conftest.py."""
    reason = dispatch.unavailable("emulator")
    if reason is not None:
        pytest.skip(reason)
    order, lazy = request.param
    with emulator.emulating(order, lazy=lazy, arch=arch):
        yield "emulator", None


#: what takes the emulator longest and crosses no border that other tests do not
LONG = ("test_frozen_head[", "test_frozen_head_of_many_features", "test_gradients_of_few_elements")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of the tests that test_op_*.py borrow, those that take no kernel run in their own module. `make test` runs each
    test in one schedule, by its name; the others, and the longest, and fp32 on sm_90a, which has no kernels of its own
    there, are left to `make test-all`."""
    borrowed = [item for item in items if item.path.name.startswith("test_op_") and item.path.parent.name == "cuda"]
    for item in borrowed:
        if "kernel" in item.fixturenames:
            schedule = item.callspec.params["kernel"]
            name = item.name.replace(item.callspec.id, "") + repr(
                [(k, str(v)) for k, v in sorted(item.callspec.params.items()) if k != "kernel"]
            )
            chosen = SCHEDULES[zlib.crc32(name.encode()) % len(SCHEDULES)]
            repeats = (
                item.callspec.params.get("arch") == "sm_90a" and item.callspec.params.get("dtype") == torch.float32
            )
            if schedule != chosen or repeats or item.name.startswith(LONG):
                item.add_marker(pytest.mark.slow)
    repeated = {item for item in borrowed if "kernel" not in item.fixturenames}
    items[:] = [item for item in items if item not in repeated]
