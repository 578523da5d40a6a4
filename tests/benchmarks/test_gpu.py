"""The benchmarks for GPUs, with tensors on the CPU and a timer that is none: cases, peers, what is written."""

import itertools
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import cuda, gpu
from pyfast import dispatch

#: op -> a shape small enough for the interpreter
SMALL = {
    "attention": (1, 4, 2, 20, 16),
    "cross_entropy": (20, 100),
    "linear_cross_entropy": (20, 32, 100),
    "rms_norm": (20, 64),
    "layer_norm": (20, 64),
    "rope": (1, 4, 2, 20, 16),
    "swiglu": (20, 64),
    "geglu": (20, 64),
    "gelu_bias": (20, 64),
    "lora_linear": (20, 64, 48, 4),
    "lora_mlp": (20, 64, 48, 4),
}
LIMITS = {"gemm_tflops": 1.0, "copy_gb_per_s": 10.0}


def timer(function):
    function()
    return 0.5


@pytest.fixture(autouse=True)
def interpreted():
    reason = dispatch.unavailable("triton") or (None if dispatch.INTERPRETING else "TRITON_INTERPRET was not set")
    if reason is not None:
        pytest.skip(reason)


def test_every_op_has_cases_and_peers():
    assert SMALL.keys() == cuda.CASES.keys() == cuda.PEERS.keys()
    assert cuda.CASES.keys() == dispatch.TABLE.keys() - {"attention_varlen", "lora_linears", "dropout"}


@pytest.mark.parametrize("op", cuda.CASES)
def test_smallest_case(op):
    """PyFast and PyTorch agree and have their rates; a peer that is not installed is named with the reason."""
    rows = cuda.measure(cuda.CASES[op][0](*SMALL[op]), LIMITS, timer, rounds=1)
    assert {row["variant"] for row in rows} == {"pyfast", "torch", *cuda.PEERS[op]}
    for row in rows:
        assert ("ms" in row and ("of_gemm" in row or "of_copy" in row)) != ("not_run" in row)
    assert all("ms" in row for row in rows if row["variant"] in ("pyfast", "torch"))


def test_wrong_results_are_not_timed(monkeypatch):
    case = cuda.CASES["swiglu"][0](*SMALL["swiglu"])
    monkeypatch.setitem(cuda.PEERS, "swiglu", {"peer": ("torch", lambda m, gate, up: gate * up)})
    (row,) = (row for row in cuda.measure(case, LIMITS, timer, 1) if row["variant"] == "peer")
    assert row["not_run"].startswith("off by")
    factors = itertools.count(1)
    monkeypatch.setattr(case, "call", lambda gate, up: gate * up * next(factors))
    with pytest.raises(AssertionError, match="PyFast is off by"):
        cuda.measure(case, LIMITS, timer, 1)


def test_results_are_written_and_failures_returned(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cuda, "limits", lambda timer: LIMITS)
    monkeypatch.setattr(cuda, "CASES", {op: (cuda.CASES[op][0], [SMALL[op]]) for op in ("swiglu", "rms_norm")})
    monkeypatch.setattr(cuda.ops, "rms_norm", lambda *_: 1 / 0)
    failed = gpu.bench(["swiglu", "rms_norm"], tmp_path, {"gpu": "none"}, time.monotonic() + 60, timer)
    assert len(failed) == 1
    assert failed[0].startswith("rms_norm 20 × 64: ZeroDivisionError")
    result = json.loads((tmp_path / "swiglu.json").read_text())
    assert result["gpu"] == "none"
    assert {"pyfast", "torch"} <= {row["variant"] for row in result["rows"]}
    assert (tmp_path / "swiglu.md").read_text().count("\n|") == len(result["rows"]) + 2
    assert not (tmp_path / "rms_norm.json").exists()
    gpu.bench(["swiglu"], tmp_path, {}, time.monotonic() - 1, timer)
    assert "no time was left for: swiglu 20 × 64" in capsys.readouterr().out


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
