"""`make gpu` without a GPU: its runs of tests end and tell what failed. Its benchmarks: test_gpu_bench.py."""

import importlib.util
import os
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import gpu, gpu_tests

#: takes this machine for one with a GPU, from which every failing test takes it
PRETEND = """import torch
torch.version.cuda = torch.version.cuda or "13.0"
torch.cuda.is_available = lambda: True

def synchronize():
    raise RuntimeError("an illegal memory access\\nand more")

torch.cuda.synchronize = synchronize
"""


@pytest.fixture
def pretending(tmp_path):
    (tmp_path / "pretend.py").write_text(PRETEND)
    return os.environ | {"PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "0", "COLUMNS": "240"}


def test_every_run_of_tests_ends(monkeypatch, tmp_path, capsys):
    """What failed, what never ends and what a sanitizer found are returned; a missing sanitizer is named."""
    script = "import time; print('FAILED a.py::test_one[1] - off by 3'); print('FAILED a.py::test_one[2] - off by 4')"
    command = [sys.executable, "-c", f"{script}; time.sleep(99)"]
    monkeypatch.setattr(gpu_tests, "pytest_command", lambda *arguments, **options: command)
    monkeypatch.setattr(gpu_tests, "sanitizer", lambda: None)
    begin = time.monotonic()
    failed = gpu_tests.run_tests(tmp_path, 3)
    assert time.monotonic() - begin < 15
    assert failed[0] == "tests: 2 × FAILED a.py::test_one[1] off by 3"
    assert failed[-1] == f"tests: no end after 3 s, see {tmp_path}/tests.log"
    assert "memcheck, racecheck, synccheck: not run" in capsys.readouterr().out

    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "========= $2 $PYTORCH_NO_CUDA_MEMORY_CACHING SUMMARY: 0"\n[ $2 != racecheck ]\n')
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_tests, "sanitizer", lambda: str(tool))
    monkeypatch.setattr(gpu_tests, "pytest_command", lambda *arguments, **options: ["/bin/true"])
    assert gpu_tests.run_tests(tmp_path, 60) == [f"racecheck: ended with 1, see {tmp_path}/racecheck.log"]
    assert "memcheck 1 SUMMARY: 0" in capsys.readouterr().out


def test_findings_of_the_sanitizers():
    log = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at pyfast::cuda::one_kernel<float>(Launch)+0x70
=========     by thread (0,0,0) in block (0,0,0)
========= Invalid __global__ write of size 4 bytes
=========     at pyfast::cuda::one_kernel<float>(Launch)+0x70
=========     by thread (1,0,0) in block (0,0,0)
========= Error: Race reported between Write access at pyfast::cuda::two_kernel(int *)+0xf0
=========     and Read access at pyfast::cuda::two_kernel(int *)+0x220 [4 hazards]
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"""
    assert gpu_tests.findings(log.splitlines()) == [
        "2 × Invalid __global__ write of size 4 bytes in pyfast::cuda::one_kernel<float>",
        "1 × Error: Race reported between Write access in pyfast::cuda::two_kernel",
    ]


def test_what_is_sanitized_is_there(pretending):
    """Every name in SANITIZED is a test that tests/gpu collects on a GPU machine."""
    chosen = ["-k", " or ".join(gpu_tests.SANITIZED), "tests/gpu"]
    command = gpu_tests.pytest_command("-q", "-q", "-p", "pretend", "--collect-only", *chosen)
    listed = subprocess.run(command, cwd=gpu_tests.ROOT, env=pretending, capture_output=True, text=True).stdout
    names = [line for line in listed.splitlines() if "::" in line]
    assert 20 < len(names) < 100 and all("[cuda" in name for name in names)
    assert all(any(part in name for name in names) for part in gpu_tests.SANITIZED)


@pytest.mark.parametrize("processes", [0, 1])
def test_a_lost_gpu_fails_no_other_test(pretending, processes):
    """Of one process, the tests that follow are not run; of several, another process runs them."""
    missing = [name for name in ("triton", *["xdist"][:processes]) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{missing} not installed")
    # both of them fail, since there is no GPU
    command = gpu_tests.pytest_command(
        "-p",
        "pretend",
        "tests/gpu/test_gpu_rope.py",
        "-k",
        "test_layout_is_kept and triton-float32",
        processes=processes,
    )
    done = subprocess.run(command, cwd=gpu_tests.ROOT, env=pretending, capture_output=True, text=True)
    assert done.returncode == 1
    if processes:
        assert all(
            f"FAILED tests/gpu/test_gpu_rope.py::test_layout_is_kept[triton-float32-{kind}] - " in done.stdout
            for kind in ("halves", "interleaved")
        )
    else:
        assert (
            "1 failed" in done.stdout
            and "the GPU no longer answers this process: an illegal memory access" in done.stdout
        )


def test_builds_for_the_card(monkeypatch, tmp_path, capsys):
    """Its architecture alone, and again only for other sources; without nvcc, Triton's kernels alone are tested."""
    for folder in ("build", "pyfast", "csrc"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(gpu_tests, "ROOT", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    script = "import sys, pathlib; print(sys.argv[1]); pathlib.Path('pyfast/_cuda.so').touch()"
    monkeypatch.setattr(gpu_tests, "build_command", lambda *options: [sys.executable, "-c", script, *options])
    monkeypatch.setattr(gpu_tests.toolchain, "find_cuda", lambda: gpu_tests.toolchain.Cuda("nvcc", "cudart", "13.0"))
    log = tmp_path / "build.log"
    for changed in (True, False, True):
        if changed:
            (tmp_path / "csrc" / "new.cu").write_text(str(len(list(tmp_path.rglob("*")))))
        log.unlink(missing_ok=True)
        assert gpu_tests.build(tmp_path, tests=False) == []
        assert log.exists() == changed
    assert log.read_text() == "sm_90a\n"
    script = "import sys; sys.exit(3)"
    (tmp_path / "csrc" / "new.cu").write_text("wrong")
    for _ in range(2):
        assert gpu_tests.build(tmp_path, tests=False) == [f"build: ended with 3, see {log}"]

    monkeypatch.setattr(gpu_tests.toolchain, "find_cuda", lambda: "no nvcc found")
    assert gpu_tests.build(tmp_path, tests=False) == []
    assert "build: no nvcc found: Triton's kernels alone" in capsys.readouterr().out
    architectures = [gpu_tests.toolchain.architecture_for(c) for c in [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]]
    assert architectures == ["sm_80", "sm_80", "sm_90a", "compute_90", "compute_90"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_refuses_without_a_gpu(capsys):
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "benchmarks.gpu: PyTorch sees no GPU here\n"
