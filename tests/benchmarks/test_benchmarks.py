"""The benchmarks run, check what they measure, and print what README and CI read."""

import importlib
import json

import pytest
import torch

from benchmarks import end_to_end
from benchmarks.__main__ import NAMES, markdown
from benchmarks.harness import Case, measure

LIMITS = {"copy_gb_per_s": 10.0, "gemm_bf16_tflops": 1.0, "gemm_fp32_tflops": 0.5}


def test_end_to_end_json(monkeypatch, capsys):
    monkeypatch.setattr(end_to_end, "BUSY", 2.0)  # a test machine is never quiet
    end_to_end.main(["--config", "llama-tiny", "--batch", "2", "--seq", "32", "--steps", "1", "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for field in ("stock_tokens_per_s", "pyfast_tokens_per_s", "ratio", "stock_peak_mb", "pyfast_peak_mb"):
        assert result[field] > 0
    assert {"memory_ratio", "machine", "versions", "discarded_rounds"} <= set(result)
    assert result["versions"]["torch"] == torch.__version__
    assert result["ratio"] == pytest.approx(result["pyfast_tokens_per_s"] / result["stock_tokens_per_s"], rel=0.01)


def test_end_to_end_refuses_wrong_results(monkeypatch):
    monkeypatch.setattr(end_to_end, "LOSS_TOLERANCE", {"fp32": -1.0})
    with pytest.raises(SystemExit, match="nothing is timed"):
        end_to_end.main(["--config", "llama-tiny", "--dtype", "fp32", "--batch", "1", "--seq", "8", "--json"])


@pytest.mark.parametrize("name", NAMES)
def test_smallest_case_of_each_op(name):
    """The first case of every op in the file: results agree, and every row has its rates."""
    first = {}
    for case in importlib.import_module(f"benchmarks.bench_{name}").cases():
        first.setdefault(case.op, case)
    rows = measure(first.values(), LIMITS)
    assert {row["op"] for row in rows} == set(first)
    for row in rows:
        assert row["min_ms"] <= row["ms"] <= row["max_ms"]
        assert "of_gemm" in row or "of_copy" in row
    assert markdown({"rows": rows, "roofline": LIMITS, "machine": {}, "versions": {}}).count("\n|") == len(rows) + 2


def test_harness_refuses_wrong_results():
    case = Case(
        "op", "fp32", lambda: (torch.ones(3, requires_grad=True),), {"pyfast": lambda x: x * 1.1, "torch": lambda x: x}
    )
    with pytest.raises(AssertionError, match="is off by"):
        case.check()
