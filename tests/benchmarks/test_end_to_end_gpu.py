"""The end-to-end benchmark for GPUs, on the CPU at tiny sizes: the emulator for CUDA C++, threads for processes."""

import contextlib
import itertools
import json
import re
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import end_to_end_gpu as benchmark
from benchmarks import gpu, gpu_tests, readme
from pyfast import dispatch

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}


def tiny(monkeypatch, together=True):
    """llama-tiny, smaller, in this test's hands."""
    model = benchmark.MODELS["llama-tiny"]
    config = model.config._replace(arguments=model.config.arguments | TINY | {"vocab_size": 50})
    monkeypatch.setitem(benchmark.MODELS, "llama-tiny", model._replace(config=config, together=together, seq=16))
    benchmark.products.cache_clear()


def options(*variants, **others):
    found = benchmark.parse(["llama-tiny", "--device", "cpu", "--rounds", "2", "--variants", *variants])
    return type(found)(**{**vars(found), **others})


def measure(*variants, **others):
    *_, rows = benchmark.measure("llama-tiny", list(variants), options(*variants, **others), benchmark.thread)
    return {(row["variant"], row["form"]): row for row in rows}


@pytest.fixture(autouse=True)
def kernels():
    reason = dispatch.unavailable("cpu") or dispatch.unavailable("emulator")
    if reason is not None:
        pytest.skip(reason)
    torch.use_deterministic_algorithms(False)  # PyTorch warns of fused AdamW
    yield
    benchmark.products.cache_clear()


def test_every_variant(monkeypatch, tmp_path, capsys):
    """Each takes its steps, or is a row with the reason; the results are written, and the bars of the model judged.

    The native kernels stand for those of a GPU, for which there is the next test."""
    tiny(monkeypatch)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    for name, variant in benchmark.VARIANTS.items():
        if variant.served:
            monkeypatch.setitem(benchmark.VARIANTS, name, variant._replace(served=("cpu",)))
    bars = [("tokens_per_s", 1e9, None), ("speed", 1e-6, "stock"), ("speed", 1.0, "liger")]
    bars = [benchmark.Bar("llama-tiny", *bar) for bar in bars]
    monkeypatch.setattr(benchmark, "judge", lambda rows, judge=benchmark.judge: judge(rows, bars))
    variants = [*benchmark.VARIANTS, benchmark.GEMMS]
    about, folder = {"gpu": "none", **benchmark.machine.versions()}, tmp_path / "gpu"
    assert benchmark.bench(["llama-tiny"], folder, about, options(*variants), benchmark.thread) == []
    result = json.loads((folder / "end_to_end_llama-tiny_bf16.json").read_text())
    rows = {(row["variant"], row["form"]): row for row in result["rows"]}
    assert rows.keys() == {(variant, form) for variant in variants for form in benchmark.FORMS}
    for (variant, form), row in rows.items():
        if variant in ("liger", "unsloth"):
            assert row["not_run"] == f"{'liger_kernel' if variant == 'liger' else variant} is not installed"
            continue
        assert row["rounds"] == 2 and row["min_ms"] <= row["ms"] <= row["max_ms"]
        assert row["profile"]["kernels"] and row["profile"]["busy_ms"] > 0
        assert row["over_stock"] == pytest.approx(rows["stock", form]["ms"] / row["ms"], abs=1e-3)
        assert variant == "gemms" or row["off"] < 1
        assert row["backends"].get("lora_mlp") == ("cpu" if variant.startswith("pyfast") else None)
    assert [bar["met"] for bar in result["bars"]] == [False, False, True, True, None, None]
    assert [bar["form"] for bar in result["bars"]] == 3 * ["document", "packed"]
    assert result["bars"][4]["why"] == "liger: liger_kernel is not installed"
    printed = capsys.readouterr().out
    assert "missed: llama-tiny: 1,000,000,000 tokens/s or more (document): pyfast " in printed
    assert "llama-tiny packed liger: not run, liger_kernel is not installed\n" in printed
    assert re.search(r"llama-tiny document pyfast: \S+ ms \(.* tokens/s, .* × stock, ", printed)
    assert re.search(r"llama-tiny document pyfast: .* ms in \d+ kernels: .*gemm", printed)  # where the step's time goes
    written = (folder / "end_to_end.md").read_text()
    assert written.count("\n| llama-tiny") == len(rows) and written.count("\n- met: ") == 2
    timed = sum("tokens_per_s" in row for row in rows.values())
    assert readme.gpu_steps(folder).count("\n| llama-tiny") == timed == 2 * (len(variants) - 3)


def test_a_captured_step(monkeypatch):
    """Every replay's gradients and loss are where the capture left them, and the optimizer takes them at each step."""
    tiny(monkeypatch)
    training = benchmark.Training("llama-tiny", "pyfast_graph", "cpu")
    loss = training.gradients("document")
    first = [parameter.grad for parameter in training.trained]
    before = [parameter.detach().clone() for parameter in training.trained]
    training.step("document")
    assert all((p != b).any() and p.grad is None for p, b in zip(training.trained, before, strict=True))
    assert training.gradients("document") is loss and loss.item() > 0
    assert all(p.grad is g for p, g in zip(training.trained, first, strict=True))
    assert training.captured_mb.keys() == {"document"}


def test_kernels_of_a_gpu(monkeypatch):
    """In the emulator and, where Triton is installed, the interpreter; one after another, as a large model is."""
    tiny(monkeypatch, together=False)
    monkeypatch.setattr(benchmark.Training, "profile", lambda *_: {})  # two steps
    rows = measure("stock", "pyfast_cuda", "pyfast_triton", rounds=1, forms=["packed"])
    assert rows["stock", "packed"]["rounds"] == rows["pyfast_triton", "packed"]["rounds"] == 1
    backends = rows["pyfast_cuda", "packed"]["backends"]
    triton = "cpu" if dispatch.unavailable("triton") else "triton"
    assert backends["lora_mlp"] == "emulator" and backends["rms_norm"] == triton
    assert set(rows["pyfast_triton", "packed"]["backends"].values()) == {triton}


def test_unsloth(monkeypatch):
    """Its calls, on an Unsloth that does what transformers and PEFT do."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    class FastLanguageModel:
        @staticmethod
        def from_pretrained(folder, max_seq_length, dtype, load_in_4bit):
            assert (max_seq_length, load_in_4bit) == (16, False)
            return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)

        @staticmethod
        def get_peft_model(model, use_gradient_checkpointing, **options):
            assert not use_gradient_checkpointing
            return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))

    tiny(monkeypatch)
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastLanguageModel=FastLanguageModel))
    rows = measure("stock", "unsloth", rounds=1)
    assert rows["unsloth", "document"]["off"] == rows["unsloth", "packed"]["off"] == 0


def test_processes(monkeypatch):
    """As on a GPU: a variant's process is a fresh one."""
    arguments = ["llama-tiny", "--device", "cpu", "--rounds", "1", "--forms", "document", "--variants", "pyfast"]
    ((row,),) = benchmark.measure("llama-tiny", ["pyfast"], benchmark.parse(arguments))
    assert row["tokens_per_s"] > 0 and row["backends"]["lora_mlp"] == "cpu"


def test_a_process_that_takes_too_long_is_ended():
    """It would go on beside what is timed after it."""
    worker = benchmark.Worker("cpu", benchmark.fresh_process)
    with pytest.raises(benchmark.NotRun, match="make did not end within 0 s"):
        worker.ask(time.monotonic(), "make", "llama-tiny", "stock")
    assert not worker.process.is_alive()
    worker.end()


def spoil(model):
    for module in model.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling = {name: 1.15 * scale for name, scale in module.scaling.items()}


def exhaust(model):
    def forward(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    model.forward = forward


def hang(model):
    time.sleep(3)


def test_what_fails_is_a_row_and_ends_no_other(monkeypatch):
    tiny(monkeypatch)
    for name, after in {"wrong": spoil, "large": exhaust, "hanging": hang}.items():
        monkeypatch.setitem(benchmark.VARIANTS, name, benchmark.Variant("", after=after))
    rows = measure("stock", "wrong", "large", "hanging", "bf16_adapters", patience=2.0)
    whys = {variant: row["not_run"] for (variant, form), row in rows.items() if "not_run" in row and form == "packed"}
    off = re.fullmatch(r"its loss or gradients are off by (.*) × what is allowed", whys.pop("wrong"))
    assert 1 < float(off[1]) < 10
    assert whys == {
        "large": "out of memory: Tried to allocate 2.00 GiB",
        "hanging": "no time was left: make did not end within 2 s",
    }
    assert rows["bf16_adapters", "packed"]["rounds"] == 2 and rows["stock", "document"]["rounds"] == 2


def test_a_process_that_ends(monkeypatch):
    def start(target, args, daemon):
        args[0].close()
        return benchmark.thread(target=time.sleep, args=(0,))

    tiny(monkeypatch)
    (rows,) = benchmark.measure("llama-tiny", ["stock"], options("stock"), start)
    assert [row["not_run"] for row in rows] == ["its process ended"] * 2


def test_no_time_left(monkeypatch):
    tiny(monkeypatch)
    rows = measure("stock", deadline=time.monotonic() - 1)
    assert rows["stock", "packed"]["not_run"].startswith("no time was left")


def test_the_smaller_model_where_stock_has_no_room(monkeypatch, tmp_path, capsys):
    measured, timed = [], {"ms": 1.0, "min_ms": 1.0, "max_ms": 1.0, "tokens_per_s": 1.0}

    def rows_of(name, variants, *_):
        measured.append(name)
        why = {"not_run": "out of memory: Tried"} if name == "llama-3-8b" else timed
        yield [{"model": name, "form": "packed", "variant": "stock", "above_mb": 1.0, **why}]

    monkeypatch.setattr(benchmark, "measure", rows_of)
    benchmark.bench(["llama-3-8b", "qwen2.5-0.5b"], tmp_path, {"versions": {}}, options("stock"))
    assert measured == ["llama-3-8b", "qwen2.5-0.5b", "llama-3.2-3b"]
    assert "stock runs out of memory; llama-3.2-3b is compared too" in capsys.readouterr().out


def test_bars():
    def row(variant, ms, above, model="llama-3-8b"):
        found = {"model": model, "form": "packed", "variant": variant, "ms": ms, "above_mb": above}
        return found | {"tokens_per_s": 4096e3 / ms}

    rows = [row("pyfast", 250.0, 20e3), row("pyfast_cuda", 300.0, 30e3), row("liger", 350.0, 1.0)]
    rows += [row("stock", 500.0, 60e3), {**row("unsloth", 1.0, 1.0), "not_run": "trl is not installed"}]
    del rows[-1]["ms"]
    judged = {bar["bar"]: bar for bar in benchmark.judge(rows)}
    assert len(judged) == 5
    assert judged["llama-3-8b: 15,000 tokens/s or more"]["values"] == {"pyfast": 16384.0, "pyfast_cuda": 13653.333}
    assert judged["llama-3-8b: 15,000 tokens/s or more"]["met"] is True
    assert judged["llama-3-8b: 1.8 × stock's speed or more"]["met"] is True
    assert judged["llama-3-8b: 1.0 × unsloth's speed or more"]["why"] == "unsloth: trl is not installed"
    memory = judged["llama-3-8b: 0.4 × stock's memory above the weights or less"]
    assert memory["met"] is True and memory["values"] == {"pyfast": 0.333, "pyfast_cuda": 0.5}


class Fp32(TorchDispatchMode):
    """The most elements that a result in fp32 has."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if torch.is_tensor(result) and result.dtype == torch.float32:
            self.elements = max(self.elements, result.numel())
        return result


def test_weights_are_made_in_bf16_on_the_device():
    """An 8B model leaves no room for them in fp32, and is not to be copied there."""
    config = benchmark.MODELS["llama-3-8b"].config
    with torch.device("meta"), Fp32() as fp32:
        model = benchmark.end_to_end.add_adapters(benchmark.end_to_end.base_model(config, "bf16"), config)
    assert fp32.elements <= 16 * 14336  # an adapter
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    assert {p.dtype for name, p in model.named_parameters() if "lora_" not in name} == {torch.bfloat16}


def test_true_sizes():
    """Parameters as published, and the products of a step: two of each weight, of the adapters three."""
    billions = {"llama-3-8b": 8.03, "llama-3.2-3b": 3.21, "qwen2.5-0.5b": 0.494}
    for name, count in billions.items():
        model = benchmark.MODELS[name]
        with torch.device("meta"):
            net = benchmark.end_to_end.base_model(model.config, "bf16")
        assert net.num_parameters() / 1e9 == pytest.approx(count, rel=2e-3)
    found = benchmark.products("qwen2.5-0.5b")
    frozen = 24 * (896 * (896 + 2 * 128) + 896 * 896 + 3 * 896 * 4864) + 896 * 151936
    assert sum(m * k * n for _, m, k, n, adapter in found if not adapter) == pytest.approx(2 * 4096 * frozen, rel=0.01)


def test_kinds_of_kernels():
    names = {
        "nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_TNT": "gemm",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>": "gemm",
        "matmul_kernel": "gemm",
        "pyfast::lora90_kernel": "gemm",
        "pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel": "attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop": "attention",
        "exponentials_kernel": "loss",
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward": "loss",
        "multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimizer",
        "norm_backward_kernel": "norm",
        "Memcpy DtoD (Device -> Device)": "copy",
        "at::native::vectorized_elementwise_kernel": "elementwise",
        "rope_kernel": "elementwise",
        "gated_kernel": "elementwise",
        "something": "other",
    }
    assert {name: benchmark.kind_of(name) for name in names} == names


def test_named_parts_of_make_gpu(monkeypatch, tmp_path, capsys):
    """They run where they are named, and no op beside them."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "describe", lambda: {"gpu": "none"})
    monkeypatch.setattr(gpu_tests, "build", lambda *_, **__: [])
    monkeypatch.setattr(gpu, "folder_of", lambda name: tmp_path / name)
    monkeypatch.setattr(gpu, "bench", lambda *_: pytest.fail("ops were measured"))
    monkeypatch.setitem(gpu.PARTS, "end_to_end", lambda *arguments: asked.append(arguments) or ["one failed"])
    assert gpu.main(["end_to_end", "--no-tests"]) == 1
    ((folder, about, deadline),) = asked
    assert folder == tmp_path / "none" and about["gpu"] == "none" and deadline > time.monotonic()
    assert capsys.readouterr().out.endswith("one failed\n1 failed\n")
    monkeypatch.setattr(benchmark, "bench", lambda models, *_: models)
    monkeypatch.setattr(benchmark, "OFFLINE", {})
    assert benchmark.run(folder, about, deadline) == ["qwen2.5-0.5b", "llama-3-8b"]
    assert gpu.PARTS["llama-3.2-3b"](folder, about, deadline) == ["llama-3.2-3b"]


def test_what_a_gpu_is_asked(monkeypatch):
    """On a torch.cuda that only writes down: a capture is warmed on a stream of its own, its replay runs nothing."""
    said = []

    class Stream:
        def __init__(self, name="own"):
            self.name = name

        def wait_stream(self, other):
            said.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self):
            said.append("replayed")

    @contextlib.contextmanager
    def within(what):
        said.append(f"in {type(what).__name__}")
        yield
        said.append(f"out of {type(what).__name__}")

    fakes = {"Stream": Stream, "current_stream": lambda: Stream("current"), "stream": within}
    fakes |= {"CUDAGraph": Graph, "graph": within, "memory_allocated": lambda: 3 * 2**20}
    fakes |= {"max_memory_allocated": lambda: 5 * 2**20, "reset_peak_memory_stats": lambda: said.append("forgotten")}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    gpu = benchmark.DEVICES["cuda"]()
    gpu.forget_peak()
    replay = gpu.capture(lambda: said.append("ran"))
    replay()
    assert said == [
        "forgotten", "own waits for current", "in Stream", "ran", "out of Stream", "current waits for own",
        "in Graph", "ran", "out of Graph", "replayed",
    ]  # fmt: skip
    assert (gpu.allocated_mb(), gpu.peak_mb(), gpu.backends(("cuda", "triton"))) == (3.0, 5.0, ("cuda", "triton"))


def test_a_variant_lost_between_rounds(monkeypatch):
    """What it has done till then counts; the others go on. `of_gemm` is the step's rate over that of a GEMM."""

    def last(model):
        calls, forward = itertools.count(), model.forward

        def counted(*args, **kwargs):
            if next(calls) == 8:  # two checks and two warm rounds of two steps, then the first round's two
                raise RuntimeError("the GPU is lost")
            return forward(*args, **kwargs)

        model.forward = counted

    tiny(monkeypatch)
    monkeypatch.setattr(benchmark.cuda, "limits", lambda *_: {"gemm_tflops": 1e-6})
    monkeypatch.setitem(benchmark.VARIANTS, "lost", benchmark.Variant("", after=last))
    rows = measure("stock", "lost", rounds=3)
    assert rows["lost", "document"]["rounds"] == 1
    assert rows["lost", "packed"]["not_run"] == "RuntimeError: the GPU is lost"
    assert rows["stock", "packed"]["rounds"] == 3 and rows["stock", "packed"]["of_gemm"] > 1


def test_liger_patches_the_model_before_peft(monkeypatch):
    asked = []
    fake = SimpleNamespace(_apply_liger_kernel_to_instance=lambda model: asked.append(type(model).__name__))
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", fake)
    tiny(monkeypatch)
    assert measure("stock", "liger", rounds=1)["liger", "packed"]["off"] == 0
    assert asked == ["LlamaForCausalLM"]


def test_other_gradients_are_no_agreement():
    weight = torch.ones(2).numpy()
    assert benchmark.difference((1.0, {"a": weight}), (1.0, {"b": weight})) == float("inf")
    assert not benchmark.difference((1.0, {"a": weight * float("nan")}), (1.0, {"a": weight})) <= 1
    assert not benchmark.difference((float("nan"), {"a": weight}), (1.0, {"a": weight})) <= 1


def test_by_hand(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "OFFLINE", {})
    monkeypatch.setattr(gpu, "folder_of", lambda name: tmp_path / name)
    monkeypatch.setattr(benchmark, "bench", lambda models, folder, *_: [f"{models} {folder.name}"])
    assert benchmark.main(["llama-tiny", "--device", "cpu"]) == 1
    assert capsys.readouterr().out == "['llama-tiny'] cpu\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main([]) == 2
    assert capsys.readouterr().err == "benchmarks.end_to_end_gpu: PyTorch sees no GPU here\n"
    with pytest.raises(SystemExit):
        benchmark.main(["llama-9"])
