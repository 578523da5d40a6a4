"""The choice of backends from results, and `pyfast tune`'s part in it."""

import importlib
import json
from pathlib import Path

import pytest

from benchmarks import backends, gpu, tune
from pyfast import dispatch


def rows(op: str, **times):
    """Those of an op whose variants take these milliseconds in its cases; None: it did not run."""
    return [
        {"op": op, "case": str(case), "variant": name}
        | ({"not_run": "wrong"} if ms is None else {"ms": ms, "wall_ms": 0.0})
        for name, of_cases in times.items()
        for case, ms in enumerate(of_cases)
    ]


@pytest.mark.parametrize(
    "times, expected",
    [
        ({"triton": [1, 1], "cuda": [0.5, 0.6], "torch": [2, 2]}, ["cuda", "triton", "torch"]),
        ({"triton": [1, 9], "cuda": [3, 3], "torch": [2, 2]}, ["torch"]),
        ({"triton": [2.5, 1], "torch": [2, 2], "liger": [0.1, 0.1]}, ["triton", "torch"]),  # all cases together
        ({"triton": [1, None], "cuda": [None, None], "torch": [2, 2]}, ["torch"]),
        ({"triton": [1, None], "cuda": [1, 9], "torch": [2, None]}, ["cuda", "torch"]),  # what PyTorch ran
        ({"triton": [1, 1], "torch": [None, None]}, []),
    ],
)
def test_fastest_first(times, expected):
    assert backends.order(rows("attention", **times)) == expected


def test_the_host_counts():
    found = rows("swiglu", triton=[1], torch=[2])
    found[0]["wall_ms"] = 3.0
    assert backends.order(found) == ["torch"]


def save(folder, op, architecture="sm_90", **times):
    gpu.save(folder, op, [{"forward_ms": 0, **row} for row in rows(op, **times)], [], {"architecture": architecture})


def test_written_and_read_by_dispatch(tmp_path, monkeypatch):
    """Ops without results keep what the file says of them."""
    for op, ms in (("swiglu", 1), ("attention", 3)):
        save(tmp_path, op, triton=[ms], torch=[2])
    (tmp_path / "backends_sm_90.json").write_text('{"backends": {"rope": ["triton", "torch"], "swiglu": ["torch"]}}')
    assert backends.main([str(tmp_path), "--folder", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "backends_sm_90.json").read_text())
    assert found["backends"] == {"attention": ["torch"], "rope": ["triton", "torch"], "swiglu": ["triton", "torch"]}
    assert found["machine"] == {"architecture": "sm_90"}

    (tmp_path / "dispatch.py").write_text(Path(dispatch.__file__).read_text())
    (tmp_path / "kernels").mkdir()
    (tmp_path / "backends_sm_90.json").rename(tmp_path / "kernels" / "backends_sm_90.json")
    spec = importlib.util.spec_from_file_location("another_dispatch", tmp_path / "dispatch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert list(module.MEASURED) == ["sm_90"]
    assert module.TABLE["swiglu"]["sm_90"] == ("triton", "torch") and module.TABLE["attention"]["sm_90"] == ("torch",)
    assert "sm_90" not in module.TABLE["geglu"]


def test_tune(tmp_path, monkeypatch, capsys):
    """Named alone, the backends are timed without tiles, and without peers."""
    pytest.importorskip("triton", reason="triton is not installed")

    def bench(ops, folder, about, deadline, alone):
        assert alone and set(ops) == dispatch.TABLE.keys() - {"dropout"}
        save(folder, "swiglu", triton=[1], torch=[2])
        return ["geglu 4 × 4: triton: wrong"]

    monkeypatch.setattr(tune, "unavailable", lambda: None)
    monkeypatch.setattr(tune.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu, "describe", lambda: {"gpu": "one", "architecture": "sm_90"})
    monkeypatch.setattr(gpu, "bench", bench)
    monkeypatch.setattr(tune, "tune", None)
    tune.main(["backends", "--folder", str(tmp_path)])
    path = tmp_path / "backends_sm_90.json"
    assert json.loads(path.read_text())["backends"] == {"swiglu": ["triton", "torch"]}
    assert capsys.readouterr().out.splitlines() == [
        "geglu 4 × 4: triton: wrong",
        f"written to {path}; run the tests on this GPU before you commit it",
    ]
    monkeypatch.setattr(gpu, "bench", lambda *_, **__: ["benchmarks: nothing was measured"])
    with pytest.raises(SystemExit) as ended:
        tune.main(["backends", "--folder", str(tmp_path)])
    assert ended.value.code == 1 and capsys.readouterr().err == "pyfast tune: nothing was written\n"


def test_results_of_one_architecture(tmp_path, capsys):
    assert backends.main([str(tmp_path)]) == 2
    assert "it holds none" in capsys.readouterr().err
    save(tmp_path, "swiglu", triton=[1], torch=[2])
    save(tmp_path, "geglu", architecture="sm_80", triton=[1], torch=[2])
    assert backends.main([str(tmp_path)]) == 2
    assert "it holds those of sm_80 and sm_90" in capsys.readouterr().err
