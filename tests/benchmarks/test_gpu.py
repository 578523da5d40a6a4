"""`make gpu` without a GPU: its runs of tests end and tell what failed. Its benchmarks: test_gpu_bench.py."""

import os
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu


def test_every_run_of_tests_ends(monkeypatch, tmp_path, capsys):
    """What failed, what never ends and what a sanitizer found are returned; a missing sanitizer is named."""
    script = "import sys, time; print('FAILED one'); sys.exit(1) if 'instr' in sys.argv[1] else time.sleep(99)"
    monkeypatch.setattr(gpu, "pytest_command", lambda *arguments: [sys.executable, "-c", script, *arguments])
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu.run_tests(tmp_path, 3) == ["instructions: FAILED one", "tests: FAILED one"]
    assert "memcheck, racecheck, synccheck: not run" in capsys.readouterr().out

    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\necho "$2 $PYTORCH_NO_CUDA_MEMORY_CACHING"\n[ $2 != racecheck ] || exit 99\n')
    tool.chmod(0o755)
    monkeypatch.setattr(gpu, "pytest_command", lambda *arguments: ["/bin/true"])
    assert gpu.run_tests(tmp_path, 60) == [f"racecheck: ended with 99, see {tmp_path}/racecheck.log"]
    assert "memcheck: memcheck 1" in capsys.readouterr().out


def test_what_is_sanitized_is_there(tmp_path):
    """Every name in SANITIZED is a test that tests/gpu collects on a GPU machine, which this process takes for one."""
    (tmp_path / "pretend.py").write_text("import torch\ntorch.cuda.is_available = lambda: True\n")
    command = gpu.pytest_command("-p", "pretend", "--collect-only", "-k", " or ".join(gpu.SANITIZED), "tests/gpu")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "0"}
    listed = subprocess.run(command, cwd=gpu.HERE.parent, env=environment, capture_output=True, text=True).stdout
    names = [line for line in listed.splitlines() if "::" in line]
    assert 20 < len(names) < 100 and all("[cuda" in name for name in names)
    assert all(any(part in name for name in names) for part in gpu.SANITIZED)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_refuses_without_a_gpu(capsys):
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "benchmarks.gpu: PyTorch sees no GPU here\n"
