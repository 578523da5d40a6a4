"""The Triton and the CUDA C++ kernels on this machine's GPU: the op tests of tests/triton_kernels and tests/cuda, with
tensors made on the GPU."""

import collections
import contextlib
import os
import tempfile
from pathlib import Path

import pytest
import torch

from pyfast import dispatch, emulator

DEVICE = "cuda"  # ROCm's too
BACKENDS = ("triton", "cuda")


def unavailable(backend: str) -> str | None:
    """Why this machine cannot run the backend's kernels on a GPU, or None."""
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU here"
    return dispatch.unavailable(backend)


def served(item) -> bool:
    """Whether the backend of a test has kernels for the op of its module: in CUDA C++, those of tests/cuda."""
    op, backend = item.path.stem.removeprefix("test_gpu_"), item.callspec.params["kernel"]
    if op == "cuda":
        return backend == "cuda"
    if backend == "triton" or op in ("registration", "families"):
        return True
    return (Path(__file__).parents[1] / "cuda" / f"test_op_{op}.py").exists()


@pytest.fixture(params=BACKENDS)
def kernel(request, monkeypatch):
    """Instead of the native kernels of tests/conftest.py; every tensor of the test is made on the GPU, which has its
    own order of threads and architecture."""
    reason = unavailable(request.param)
    bf16 = request.node.callspec.params.get("dtype") == torch.bfloat16
    if reason is None and bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        reason = "this GPU has no bfloat16"
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(emulator, "emulating", lambda *order, **options: contextlib.nullcontext())
    torch.set_default_device(DEVICE)
    yield request.param, None
    torch.set_default_device(None)


def lost() -> str | None:
    """Why the GPU no longer answers this process, which an access out of bounds takes it from for good; or None."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return f"the GPU no longer answers this process: {str(error).splitlines()[0]}"
    return None


def begun(item) -> Path | None:
    """A file that stands for the test while it runs, where pytest-xdist replaces a process that was lost to one."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        return None
    folder = Path(tempfile.gettempdir()) / f"pyfast-{run}"
    folder.mkdir(exist_ok=True)
    backend = item.callspec.params["kernel"] if hasattr(item, "callspec") and "kernel" in item.callspec.params else ""
    return folder / f"{item.path.stem}.{item.originalname}.{backend}.{os.getpid()}"


def alive(process: str) -> bool:
    try:
        return Path("/proc", process, "cmdline").read_bytes() != b""  # empty: it has ended, and nobody asked how
    except OSError:
        return False


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """A kernel that hangs would take a minute of a process for each of its tests: three have shown enough."""
    file = begun(item)
    if file is None:
        return
    lost_before = [other for other in file.parent.glob(f"{file.stem}.*") if not alive(other.suffix[1:])]
    if len(lost_before) >= 3:
        pytest.fail("not run: three processes were lost to this function before", pytrace=False)
    file.touch()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    item.failed = getattr(item, "failed", False) or report.failed
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item):
    """After a failure, which has been reported by now. Later tests must not fail for it: they get another process from
    pytest-xdist, or without it are not run."""
    reason = lost() if item.failed and torch.cuda.is_available() else None
    if reason and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)
    if reason:
        pytest.exit(reason, returncode=1)
    if file := begun(item):
        file.unlink(missing_ok=True)


def _order(items):
    """Modules take turns, so that processes side by side rarely compile the same kernel; fp16 in Triton comes last: it
    differs from bf16 in a cast, and is what may be left over when time runs out."""
    counts = collections.Counter()
    keys = {}
    for item in items:
        counts[item.path] += 1
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        last = parameters.get("kernel") == "triton" and parameters.get("dtype") == torch.float16
        keys[item] = (last, counts[item.path], item.path)
    return keys.get


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Of the tests that test_gpu_*.py borrow, those that take no kernel run in their own module; ops that a backend has
    no kernels for are left out. Without a GPU one test of each module, skipped, stands for all."""
    here = [item for item in items if item.path.name.startswith("test_gpu_")]
    left_out = {item for item in here if "kernel" not in item.fixturenames or not served(item)}
    if not torch.cuda.is_available():
        first = {item.path: item for item in reversed(here) if item not in left_out}
        without_gpu = set(here) - set(first.values()) - left_out
        config.hook.pytest_deselected(items=list(without_gpu))
        left_out |= without_gpu
    if config.pluginmanager.hasplugin("timeout"):
        for item in here:  # nothing is compiled for these: a kernel that hangs is known sooner
            if item not in left_out and item.callspec.params["kernel"] == "cuda":
                item.add_marker(pytest.mark.timeout(90))
    items[:] = [item for item in items if item not in here] + sorted(set(here) - left_out, key=_order(here))
