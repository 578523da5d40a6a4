"""The benchmarks for GPUs, with tensors on the CPU and clocks that are none: every case, peer and bar, the process that
measures, and the one that watches over it."""

import importlib
import itertools
import json
import sys
import time
import types
from unittest import mock

import pytest
import torch

from benchmarks import cuda, gpu, peers
from pyfast import dispatch

#: op -> a shape small enough for the interpreter and the emulator
SMALL = {
    "attention": (1, 4, 2, 20, 16),
    "attention_varlen": (3, 9, 2, 16),
    "cross_entropy": (20, 100),
    "linear_cross_entropy": (20, 32, 100, 0.5),
    "rms_norm": (20, 64),
    "layer_norm": (20, 64),
    "rope": (1, 4, 2, 20, 16),
    "swiglu": (20, 64),
    "geglu": (20, 64),
    "gelu_bias": (20, 64),
    "lora_linear": (20, 64, (48,), 4),
    "lora_linears": (20, 64, (48, 32, 32), 4),
    "lora_mlp": (20, 64, 48, 4),
}
LIMITS = {"gemm_tflops": 1.0, "copy_gb_per_s": 10.0}
#: what PyTorch serves on a CPU, without a compiler
PEERS = {
    "attention": {"sdpa flash"},
    "linear_cross_entropy": {"two GEMMs", "compile"},
    "lora_linear": {"frozen GEMMs", "peft", "peft, bf16 adapters"},
    "lora_linears": {"frozen GEMMs", "peft", "peft, bf16 adapters"},
    "lora_mlp": {"frozen GEMMs", "peft", "peft, bf16 adapters"},
}
for op in ("cross_entropy", "rms_norm", "layer_norm", "rope", "swiglu", "geglu", "gelu_bias"):
    PEERS[op] = {"compile"}


class Cpu(cuda.Gpu):
    """A GPU whose every part of a call takes half a millisecond."""

    device = "cpu"

    def __init__(self, lost=False):
        self.is_lost = lost

    def times(self, *parts):
        for part in parts:
            part()
        return [0.5] * len(parts)

    def wall(self, function):
        function()
        return 1.5

    def peak(self, function):
        function()
        return 3_000_000

    def profile(self, function):
        return cuda.top_kernels(function, self.finish, torch.autograd.DeviceType.CPU)

    def finish(self):
        pass

    def lost(self):
        return self.is_lost

    def clear(self):
        pass


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """The CUDA kernels on the emulator; nothing is compiled."""
    monkeypatch.setattr(cuda, "KERNELS", {"triton": "triton", "cuda": "emulator"})
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def case_of(op: str) -> cuda.Case:
    make, shapes, _ = cuda.CASES[op]
    case = make(*SMALL[op])
    case.bars = tuple({str(bar): bar for bars in shapes.values() for bar in bars}.values())
    return case


def test_every_op_has_cases_and_peers():
    assert SMALL.keys() == cuda.CASES.keys() == peers.PEERS.keys() == dispatch.TABLE.keys() - {"dropout"}
    names = cuda.plan(cuda.CASES)
    assert len(set(names)) == len(names)
    found = {name: cuda.cases(name.split(":")[0])[int(name.split(":")[1])] for name in names}
    assert len({(case.op, case.label) for case in found.values()}) == len(names)
    kinds = [2 * (not case.bars) + (not case.peers) for case in found.values()]
    assert kinds == sorted(kinds) and set(kinds) == {0, 2, 3}  # bars first, without peers last
    assert {case.op for case in found.values() if not case.peers} == set(cuda.CASES)


@pytest.mark.parametrize("op", cuda.CASES)
def test_smallest_case(op, tmp_path):
    """All that can run here gives the same and has its rates; whatever else has a reason. Every bar finds its rows."""
    case = case_of(op)
    rows = cuda.measure(case, LIMITS, Cpu(), rounds=2)
    timed = {row["variant"] for row in rows if "ms" in row}
    ours = {"torch"}
    if dispatch.unavailable("triton") is None and dispatch.INTERPRETING:
        ours.add("triton")
    if dispatch.unavailable("emulator") is None and "cuda" in dispatch.TABLE[op]["cuda"]:
        ours.add("cuda")
    assert {row["variant"] for row in rows} == set(cuda.variants(case))
    assert timed >= ours | PEERS.get(op, set())
    for row in rows:
        assert ("ms" in row) != ("not_run" in row) and not row.get("failed")
        if "ms" in row:
            assert row["ms"] == row["forward_ms"] + row["backward_ms"] == 1.0
            assert ("of_gemm" in row or "of_copy" in row) and row["pyfast_speedup"] == 1.0
            assert 2.9 < row["extra_mb"] <= row["peak_mb"] == 3.0
            assert ("forward_of_gemm" in row or "forward_of_copy" in row) != case.together
    found = cuda.verdicts(case, rows)
    assert len(found) == len(case.bars)
    for verdict in found:
        assert "value" in verdict or (verdict["variant"] == "cuda" and "cuda" not in ours)
        assert not verdict["met"] or "_ms / " in verdict["bar"] or verdict["bar"].startswith(("ms", "extra_mb"))
    cuda.profiles(case, found, Cpu(), lambda variant: None)
    for verdict in found:
        if "value" in verdict and not verdict["met"]:
            assert verdict["profile"][0]["us"] > 0 and verdict["profile"][0]["launches"] > 0
    gpu.save(tmp_path, op, rows, found, {})
    assert (tmp_path / f"{op}.md").read_text().count("\n| ") == len(rows) + 2
    assert set(json.loads((tmp_path / f"{op}.json").read_text())["fastest"][case.label]) == ours


def test_small_cases_are_timed_without_peers():
    case = cuda.cases("rms_norm")[-1]
    assert set(cuda.variants(case)) == {"triton", "torch"}


def test_choices_are_made_for_their_own_calls_alone(monkeypatch):
    module, case, seen = importlib.import_module("pyfast.ops.linear_cross_entropy"), case_of("linear_cross_entropy"), []
    monkeypatch.setattr(cuda, "KERNELS", {"cuda": "torch"})
    monkeypatch.setattr(case, "call", lambda *inputs: seen.append(module.GPU_LOGITS_BYTES))
    before, found = module.GPU_LOGITS_BYTES, cuda.variants(case)
    for name in ("cuda, 512 rows", "cuda"):
        found[name].call(module)
    assert seen == [512 * 275_000, before] and "triton, 512 rows" not in found


# ---- the check
def rounded(truth, noise):
    return (truth + noise * truth.abs().max() * torch.randn_like(truth)).bfloat16()


def test_excess(monkeypatch):
    """Rounding passes; a wrong row, column, element, shape or NaN does not, also where parts are compared."""
    torch.manual_seed(0)
    truth = torch.randn(100, 64)
    torchs, right = rounded(truth, 1e-3), rounded(truth, 1e-3)
    for chunk in (1 << 26, 640):
        monkeypatch.setattr(cuda, "_CHUNK", chunk)
        assert cuda.excess(right, truth, torchs) <= 1
        for wrong in (lambda x: x[7].mul_(1.05), lambda x: x[:, 7].mul_(1.05), lambda x: x[7, 7].add_(0.5)):
            broken = right.clone()
            wrong(broken)
            assert cuda.excess(broken, truth, torchs) > 1
        broken[3, 3] = float("nan")
        assert cuda.excess(broken, truth, torchs) == float("inf")
        assert cuda.excess(right[:50], truth, torchs) == float("inf")
    loss = torch.tensor(3.0)
    assert cuda.excess(loss * (1 + 1e-6), loss, loss) <= 1 < cuda.excess(loss * 1.001, loss, loss)


#: op -> an error in its result or its gradients: the softmax missing from the gradient, late rows, an adapter, ...
ERRORS = {
    "attention": lambda case: lambda q, k, v: case.call(q, k, v) * torch.where(torch.arange(20) < 18, 1, 1.1)[:, None],
    "cross_entropy": lambda case: lambda x, t: -x.gather(1, t[:, None]).mean() + x.detach().logsumexp(1).mean(),
    "linear_cross_entropy": lambda case: lambda x, w, t: case.call(x, w, torch.where(t == -100, 0, t)),
    "rms_norm": lambda case: lambda x, w: case.call(x, w) * (1 + torch.arange(64) % 32 // 31 * 0.05),
    "rope": lambda case: lambda q, k, cos, sin: case.call(q, k.detach() + 0 * k, cos, sin),
    "lora_linear": lambda case: lambda x, w, a, b: case.call(x, w, a, 1.02 * b),
}


@pytest.mark.parametrize("op", ERRORS)
def test_wrong_kernels_are_not_timed(op, monkeypatch):
    """An error of ours fails the run, a peer's own only its row."""
    case = case_of(op)
    wrong = ERRORS[op](case)
    monkeypatch.setitem(peers.PEERS, op, {"peer": peers.Peer("torch", lambda m, *inputs: 2 * case.call(*inputs)[0])})
    ours = cuda.variants(case)

    def with_error(case):
        return {**ours, "triton": peers.Peer("torch", lambda m, *inputs: wrong(*inputs)), "torch": ours["torch"]}

    monkeypatch.setattr(cuda, "KERNELS", {"triton": "torch"})
    monkeypatch.setattr(cuda, "variants", with_error)
    rows = {row["variant"]: row for row in cuda.measure(case, LIMITS, Cpu(), rounds=1)}
    assert "error rule" in rows["triton"]["not_run"] and rows["triton"]["failed"] and "ms" not in rows["triton"]
    assert "not_run" in rows["peer"] and not rows["peer"]["failed"]
    assert "ms" in rows["torch"]


def test_races_are_not_timed(monkeypatch):
    """An error too small for the error rule, which comes and goes."""
    case, runs = case_of("swiglu"), itertools.count()
    flicker = cuda.Peer("torch", lambda m, gate, up: case.call(gate, up) * (1 + next(runs) % 2 * 2**-8))
    found = cuda.variants(case)
    monkeypatch.setattr(cuda, "KERNELS", {"triton": "torch"})
    monkeypatch.setattr(cuda, "variants", lambda case: {"triton": flicker, "torch": found["torch"]})
    row = cuda.measure(case, LIMITS, Cpu(), rounds=1)[0]
    assert row["not_run"] == "gives other bits in a second run: a race" and row["failed"]


def test_the_truth_has_the_same_incoming_gradient():
    case = case_of("swiglu")
    inputs = case.inputs()
    steps = [
        cuda.Step(cuda.variants(case)["torch"], x)
        for x in (inputs, tuple(t.detach().float().requires_grad_() for t in inputs))
    ]
    for step in steps:
        step.both()
    assert torch.equal(steps[0].cotangents[0].float(), steps[1].cotangents[0])


def test_a_variant_that_raises_is_named(monkeypatch):
    case = case_of("swiglu")
    broken = {"peer": peers.Peer("torch", lambda m, gate, up: 1 / 0), "away": peers.Peer("no_such_module", None)}
    monkeypatch.setitem(peers.PEERS, "swiglu", broken)
    rows = {row["variant"]: row for row in cuda.measure(case, LIMITS, Cpu(), rounds=1, skip=["triton"])}
    assert rows["peer"]["not_run"] == "ZeroDivisionError: division by zero"
    assert rows["away"]["not_run"] == "no_such_module is not installed"
    assert rows.keys() == {"torch", "peer", "away"}
    with pytest.raises(ZeroDivisionError):  # and where the GPU is lost, there is no going on
        cuda.measure(case, LIMITS, Cpu(lost=True), rounds=1, skip=["triton"])


# ---- the bars
def rows_of(**milliseconds):
    return [
        {"variant": name, "ms": 2 * ms, "wall_ms": 2 * ms, "forward_ms": ms, "forward_of_copy": 1 / ms, "of_gemm": 0.5}
        for name, ms in milliseconds.items()
    ]


@pytest.mark.parametrize(
    ("bar", "milliseconds", "variant", "value", "met"),
    [
        (cuda.Bar("forward_of_copy", at_least=0.8), {"torch": 2.0, "triton": 1.25}, "triton", 0.8, True),
        (cuda.Bar("forward_of_copy", at_least=0.81), {"torch": 2.0, "triton": 1.25}, "triton", 0.8, False),
        (cuda.Bar("forward_of_copy", at_least=0.8, by="cuda"), {"torch": 1.0, "cuda": 2.0}, "cuda", 0.5, False),
        (cuda.Bar("ms", at_most=1.1, beside="others"), {"torch": 2.1, "one": 2.0, "two": 5}, "torch", 1.05, True),
        (cuda.Bar("ms", at_most=1.0, beside="others"), {"torch": 2.1, "one": 2.0}, "torch", 1.05, False),
    ],
)
def test_bars(bar, milliseconds, variant, value, met, monkeypatch):
    monkeypatch.setitem(cuda.BESIDE, "others", ("two", "one"))
    case = cuda.Case("op", "case", tuple, None, bars=(bar,))
    (verdict,) = cuda.verdicts(case, rows_of(**milliseconds))
    assert (verdict["variant"], verdict["value"], verdict["met"]) == (variant, value, met)
    bound = bar.at_least or bar.at_most
    assert verdict["off"] == pytest.approx(value / bound - 1, abs=1e-3)
    line = gpu._verdict(verdict)
    assert line.startswith("met " if met else "MISSED ") and f"{bound:g}" in line


def test_bars_without_figures_are_missed():
    bars = (cuda.Bar("ms", at_most=1, by="cuda"), cuda.Bar("ms", at_most=1, beside="frozen GEMMs"))
    case = cuda.Case("op", "case", tuple, None, bars=bars)
    found = cuda.verdicts(case, [*rows_of(torch=1.0), {"variant": "cuda", "not_run": "no nvcc"}])
    assert [(v["met"], v["not_measured"]) for v in found] == [(False, "no nvcc"), (False, "nothing to compare with")]
    assert cuda.verdicts(case, [])[1]["not_measured"] == "it has no such row"
    assert "was not measured: no nvcc" in gpu._verdict(found[0])


def test_a_profile_that_fails_is_a_reason(monkeypatch):
    case = case_of("rms_norm")
    verdict = {"op": "rms_norm", "case": "c", "bar": "b", "variant": "torch", "met": False, "value": 1.0, "off": -0.1}
    monkeypatch.setattr(Cpu, "profile", lambda *_: 1 / 0)
    cuda.profiles(case, [verdict], Cpu(), lambda variant: None)
    assert gpu._kernels([verdict]) == "; torch runs no profile: ZeroDivisionError: division by zero"


# ---- what is read off a GPU
class Event:
    clock = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.clock += 1.0
        self.at = Event.clock

    def elapsed_time(self, end):
        return end.at - self.at


def test_gpu(monkeypatch):
    for name, value in {
        "Event": Event,
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 250,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(cuda.Gpu, "device", "cpu")
    monkeypatch.setattr(cuda.Gpu, "FLUSHED", 16)
    found, calls = cuda.Gpu(), []
    first, second = found.times(lambda: calls.append(1), lambda: calls.append(2))
    assert (first, second) == (1.0, 1.0) and calls == [1, 2] * 8  # a first, two to count by, then 10 ms / 2 ms
    assert found.wall(lambda: time.sleep(0.002)) >= 2
    assert found.peak(lambda: calls.append(3)) == 150 and calls[-1] == 3
    assert cuda.limits(found, size=8, elements=64).keys() == LIMITS.keys()
    assert found.profile(lambda: torch.ones(9).exp()) == []  # of kernels on a GPU
    assert not found.lost()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: torch.ones(2) @ torch.ones(3))
    assert found.lost()
    found.clear()


# ---- peers
def test_unsloth_is_opened_without_its_init(monkeypatch, tmp_path):
    for package, files in {
        "unsloth": {
            "__init__.py": "1 / 0",
            "kernels/__init__.py": "1 / 0",
            "kernels/fast_lora.py": "from .one import x",
        },
        "unsloth_zoo": {"__init__.py": "1 / 0", "device_type.py": "DEVICE_TYPE = 'cuda'"},
    }.items():
        for name, text in (files | {"kernels/one.py": "from unsloth_zoo import DEVICE_TYPE as x"}).items():
            path = tmp_path / package / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with mock.patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.startswith("unsloth")]:
            del sys.modules[name]
        peers._open_unsloth.cache_clear()
        assert peers.load("unsloth.kernels.fast_lora").x == "cuda"
    peers._open_unsloth.cache_clear()


def test_versions_of_peers():
    found = peers.versions()
    assert "peft" in found and all(isinstance(version, str) for version in found.values())


def test_torch_without_linear_cross_entropy(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    case = case_of("linear_cross_entropy")
    peer = peers.PEERS["linear_cross_entropy"]["torch linear_cross_entropy"]
    with pytest.raises(NotImplementedError, match="has no F"):
        cuda.Step(peer, case.inputs()).forward()


def test_calls_of_packages_that_are_missing_here():
    """What cannot run here is at least called as its signature, in the release that peers.py names, has it."""

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, **options):
        assert (
            cu_q.dtype == torch.int32
            and max_q == max_k == 9
            and options in ({"window_size": (-1, 0)}, {"causal": True})
        )
        return q

    def flash(q, k, v, causal):
        assert q.shape == (1, 20, 4, 16) and k.shape == (1, 20, 2, 16) and causal
        return q

    def apply_rotary_emb(x, cos, sin):
        assert x.shape[1] == cos.shape[0] and 2 * cos.shape[1] == x.shape[3] and cos.shape == sin.shape
        return x * cos.repeat(1, 2)[:, None]

    stand_in = types.SimpleNamespace(
        varlen_attn=varlen, flash_attn_varlen_func=varlen, flash_attn_func=flash, apply_rotary_emb=apply_rotary_emb
    )
    for op, name in (
        ("attention_varlen", "torch varlen"),
        ("attention_varlen", "flash-attn"),
        ("attention", "flash-attn"),
    ):
        peer, inputs = peers.PEERS[op][name], case_of(op).inputs()
        prepared = peer.prepare(stand_in, *inputs) if peer.prepare else inputs
        assert peer.call(stand_in, *prepared).shape == inputs[0].shape
    q, k, cos, sin = case_of("rope").inputs()
    turned = peers.PEERS["rope"]["quack"].call(stand_in, q, k, cos, sin)
    assert [x.shape for x in turned] == [q.shape, k.shape] and torch.equal(turned[0], q * cos[:, None])


# ---- the process, and the one that watches over it
def test_events_of_a_process(monkeypatch):
    broken = (lambda: cuda.Case("rms_norm", "broken", lambda: (1 / 0,), None), {(): ()}, [])
    monkeypatch.setattr(
        cuda, "CASES", {"swiglu": (cuda.CASES["swiglu"][0], {SMALL["swiglu"]: ()}, []), "rms_norm": broken}
    )
    monkeypatch.setattr(cuda, "limits", lambda gpu: LIMITS)
    told = []
    cuda.work(["swiglu:0", "rms_norm:0"], ["swiglu:triton", "rms_norm:torch"], Cpu(), lambda *event: told.append(event))
    json.dumps(told)
    assert told[0] == told[-1] == ("limits", LIMITS)
    assert ("at", "swiglu:0", "torch") in told and ("at", "swiglu:0", "triton") not in told
    (done,) = (event for event in told if event[0] == "done")
    assert {row["variant"] for row in done[2]} == {"torch", *peers.PEERS["swiglu"]} and done[3] == []
    assert ("failed", "rms_norm:0", "ZeroDivisionError: division by zero") in told
    told.clear()
    cuda.work(["rms_norm:0", "swiglu:0"], [], Cpu(lost=True), lambda *event: told.append(event))
    assert told[-1] == ("lost", "rms_norm:0", "the truth", "ZeroDivisionError: division by zero")


PROCESS = """
import sys, torch
sys.path.insert(0, {folder!r})
from benchmarks import cuda
import test_gpu_bench as here
torch.compile = lambda function, **_: function
cuda.KERNELS = {{}}
cuda.CASES = {{"swiglu": (cuda.CASES["swiglu"][0], here.MISSED, [])}}
cuda.limits = lambda gpu: here.LIMITS
print("a package greets")
cuda.main(sys.argv[1:], here.Cpu())
"""
MISSED = {SMALL["swiglu"]: (cuda.Bar("forward_of_copy", at_least=9),)}


def test_a_whole_run(monkeypatch, tmp_path, capfd):
    """The true process, on the CPU: what it measures is saved and printed."""
    script = PROCESS.format(folder=str(gpu.HERE.parent / "tests" / "benchmarks"))
    monkeypatch.setattr(cuda, "CASES", {"swiglu": (cuda.CASES["swiglu"][0], MISSED, [])})
    monkeypatch.setattr(gpu, "bench_command", lambda names, skip: [sys.executable, "-c", script, *names])
    assert gpu.bench(["swiglu"], tmp_path, {"gpu": "none"}, time.monotonic() + 100) == []
    result = json.loads((tmp_path / "swiglu.json").read_text())
    assert result["gpu"] == "none" and result["limits"] == [LIMITS, LIMITS] and "peft" in result["peers"]
    assert result["fastest"] == {"20 × 64": {"torch": 1.5}}
    assert result["bars"][0]["profile"][0]["us"] > 0
    printed = capfd.readouterr().out
    assert "swiglu 20 × 64: torch 0.5+0.5 | compile 0.5+0.5" in printed
    assert "not run: liger (swiglu): " in printed or "liger 0.5+0.5" in printed
    assert "fastest of swiglu, ms: 20 × 64: torch 1.5" in printed
    assert "swiglu 20 × 64: MISSED forward_of_copy ≥ 9: torch 0.002 (-100 %); torch runs 1 × aten::" in printed


#: a process that ends or hangs at the first variant that it is not told to skip
FAKE = """
import json, sys, time
names = [word for word in sys.argv[1:] if ":" in word and not word.startswith("-")]
skipped = [b for a, b in zip(sys.argv, sys.argv[1:]) if a == "--skip"]
def tell(*event): print(json.dumps(event), flush=True)
tell("limits", {"gemm_tflops": 1.0, "copy_gb_per_s": 1.0})
name = sys.argv[1]
tell("at", name, "the truth")
if "swiglu:triton" not in skipped:
    tell("at", name, "triton")
    time.sleep(99)
if "swiglu:liger" not in skipped:
    tell("at", name, "liger")
    sys.exit(3)
if name == "swiglu:0":
    tell("at", name, "torch")
    row = {"op": "swiglu", "case": "20 × 64", "variant": "torch"}
    tell("done", name, [row | {"ms": 1.0, "wall_ms": 1.0, "forward_ms": 0.5, "backward_ms": 0.5}], [])
    name = sys.argv[2]
tell("at", name, "the truth")
tell("lost", name, "torch", "out of order")
"""


def test_lost_variants_are_left_out(monkeypatch, tmp_path, capsys):
    """One that hangs and one that kills its process are named, the rest is measured; PyTorch's own end ends a case."""
    make = cuda.CASES["swiglu"][0]
    monkeypatch.setattr(cuda, "CASES", {"swiglu": (make, {SMALL["swiglu"]: (), (8, 8): ()}, [])})
    monkeypatch.setattr(gpu, "STEP_SECONDS", 1)
    real = gpu.bench_command
    monkeypatch.setattr(gpu, "bench_command", lambda names, skip: [sys.executable, "-c", FAKE, *real(names, skip)[3:]])
    failed = gpu.bench(["swiglu"], tmp_path, {}, time.monotonic() + 60)
    assert failed == ["swiglu 20 × 64: triton: no end after 1 s", "swiglu 8 × 8: torch: out of order"]
    rows = {row["variant"]: row for row in json.loads((tmp_path / "swiglu.json").read_text())["rows"]}
    assert rows["liger"]["not_run"] == "its process ended with 3, in 20 × 64" and "ms" in rows["torch"]
    assert "not run: liger (swiglu): its process ended with 3, in 20 × 64" in capsys.readouterr().out


def test_time_and_processes_that_never_start(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "bench_command", lambda names, skip: ["/bin/false"])
    (failed,) = gpu.bench(["geglu"], tmp_path, {}, time.monotonic() + 60)
    assert failed.startswith("benchmarks: its process ended with 1, see ")
    monkeypatch.setattr(gpu, "bench_command", lambda names, skip: ["/bin/sleep", "99"])
    assert gpu.bench(["geglu"], tmp_path, {}, time.monotonic() + 0.5) == []
    assert "no time was left for: geglu 8192 × 14336" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "START_SECONDS", 0.2)
    (failed,) = gpu.bench(["geglu"], tmp_path, {}, time.monotonic() + 60)
    assert failed.startswith("benchmarks: no end after 0.2 s")
