"""A whole LoRA training step on a GPU at true model sizes: stock, its peers and PyFast, held against the bars.

    python -m benchmarks.end_to_end_gpu [CONFIG ...] [--variants V ...] [--minutes 8]
    or: make gpu-bench OP=end_to_end

Random weights are made on the GPU in bf16; LoRA r=16 on every linear layer but the head; AdamW; 4,096 tokens in one
row, which comes in two forms (FORMS). Every variant lives in a process of its own, because memory, and what a library
replaces in transformers, are a process's; where all models fit they take turns, a round each, and a large model has the
GPU to itself. Before a variant is timed, its loss and its gradients of the first and last layer must agree with those
of the first variant that ran. A variant that differs, fails, runs out of memory or out of time is a row that says so.

Beside each step stand the GEMM rate that its own process reached, and `gemms`: the step's matrix products alone. A step
of each variant is profiled, so that a missed bar is explained (`profile` in the JSON).
"""

import argparse
import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

import pyfast
from pyfast import dispatch

from . import cuda, end_to_end, machine
from .end_to_end import ALPHA, LLAMA_90M, LLAMA_TARGETS, LLAMA_TINY, QWEN2_05B, RANK, Config

HERE = Path(__file__).resolve().parent
DTYPE = "bf16"
ROUNDS = 5
#: how far a variant's gradients may be off, in norm; 0.06 was seen between stock and PyFast, or bf16 and fp32, in the
#: worst tensor of 32 layers (0.04 in the first and last), 0.14 where every LoRA product was scaled by 1.1. At random
#: weights the loss is close to log(vocabulary) whatever the layers do: it tells a wrong head or wrong labels, no more
GRADIENT_TOLERANCE, LOSS_TOLERANCE = 0.1, 2e-3

LLAMA_3 = {"vocab_size": 128256, "num_key_value_heads": 8, "tie_word_embeddings": False}
LLAMA_3_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_32_3B = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}


class Model(NamedTuple):
    """What is trained, and how: `variants` in this order, together where all fit a GPU; a round is one untimed step and
    `steps` timed ones, of a row of `seq` tokens."""

    config: Config
    variants: tuple[str, ...]
    together: bool
    steps: int = 1
    seq: int = 4096


OURS = ("pyfast", "pyfast_cuda", "pyfast_triton", "pyfast_graph")
PEERS = ("liger", "compile", "unsloth", "bf16_adapters", "autocast")
#: what bars and explanations need first, what takes long last
LARGE = ("checkpointed", "stock", "pyfast_cuda", "pyfast", "liger", "pyfast_triton", "gemms", "unsloth", "compile")
SMALL = ("stock", *OURS, *PEERS, "gemms")
MODELS = {
    "llama-3-8b": Model(Config("LlamaConfig", LLAMA_3 | LLAMA_3_8B, LLAMA_TARGETS), (*LARGE, "bf16_adapters"), False),
    "qwen2.5-0.5b": Model(Config("Qwen2Config", QWEN2_05B, LLAMA_TARGETS), SMALL, True, steps=10),
    "llama-3.2-3b": Model(
        Config("LlamaConfig", LLAMA_3 | LLAMA_32_3B | {"tie_word_embeddings": True}, LLAMA_TARGETS), LARGE, False, 2
    ),
    # to try the benchmark itself
    "llama-tiny": Model(Config("LlamaConfig", LLAMA_90M | LLAMA_TINY, LLAMA_TARGETS), SMALL, True, seq=64),
}
#: a model that is measured where stock ran out of memory on another
INSTEAD = {"llama-3-8b": "llama-3.2-3b"}
DEFAULT = ("qwen2.5-0.5b", "llama-3-8b")

#: how the row is filled. All variants compute the same loss in each, Unsloth excepted, which looks at no position.
#: "document" is what is kindest to stock: SDPA's causal flash attention, no mask. Of "packed", stock gets what
#: DataCollatorWithFlattening gives, positions that restart, of which transformers makes a mask (1, 1, 4096, 4096);
#: PyFast gets the boundaries too, as `pyfast finetune --packing` has them. A bar must be met in both.
FORMS = {"document": (1.0,), "packed": (1 / 4, 3 / 16, 5 / 32, 1 / 8, 1 / 8, 3 / 32, 1 / 16)}


class Bar(NamedTuple):
    """tokens_per_s and speed (over `against`) are to be at least `limit`, memory above the weights at most."""

    model: str
    measure: str
    limit: float
    against: str | None = None

    def __str__(self):
        if self.measure == "tokens_per_s":
            return f"{self.model}: {self.limit:,.0f} tokens/s or more"
        if self.measure == "speed":
            return f"{self.model}: {self.limit} × {self.against}'s speed or more"
        return f"{self.model}: {self.limit} × {self.against}'s memory above the weights or less"

    def value(self, ours: dict, rows: dict[str, dict]) -> float | None:
        """What `ours`, a row, reaches; rows: by variant. None where it cannot be told."""
        theirs = rows.get(self.against, {}) if self.against else ours
        if "ms" not in ours or "ms" not in theirs:
            return None
        if self.measure == "tokens_per_s":
            return ours["tokens_per_s"]
        if self.measure == "speed":
            return theirs["ms"] / ours["ms"]
        return ours["above_mb"] / theirs["above_mb"] if theirs["above_mb"] else None

    def met(self, value: float) -> bool:
        return value <= self.limit if self.measure == "memory" else value >= self.limit


BARS = (
    Bar("llama-3-8b", "tokens_per_s", 15_000),
    Bar("llama-3-8b", "speed", 1.8, "stock"),
    Bar("llama-3-8b", "speed", 1.0, "liger"),
    Bar("llama-3-8b", "speed", 1.0, "unsloth"),
    Bar("llama-3-8b", "memory", 0.4, "stock"),
    Bar("llama-3.2-3b", "speed", 1.8, "stock"),
    Bar("llama-3.2-3b", "speed", 1.0, "liger"),
    Bar("llama-3.2-3b", "memory", 0.4, "stock"),
    Bar("qwen2.5-0.5b", "speed", 2.0, "stock"),
)


# ---- variants


def serving(*backends: str | None):
    """A `with` block in which each op is served by the first of these backends that has kernels for it; by dispatch's
    own choice where none has, or where there is none."""
    block = contextlib.ExitStack()
    for op, row in dispatch.TABLE.items():
        listed = {name for names in row.values() for name in names}
        listed |= {"emulator"} if "cuda" in listed else set()
        found = next((name for name in backends if name in listed), None)
        if found is not None:
            block.enter_context(pyfast.use_backend(found, op=op))
    return block


def liger(model) -> None:
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model)


def compiled(model) -> None:
    """Layers and loss, each compiled once: the whole of 32 layers takes minutes."""
    base = model.get_base_model()
    for layer in base.model.layers:
        layer.compile()
    base.loss_function = torch.compile(base.loss_function)


class Variant(NamedTuple):
    """How a model is trained. served: the backends of a patched model, in order. before, after: what is done to the
    model before PEFT wraps it, and after. graph: forward and backward are captured in a CUDA graph, and replayed."""

    help: str
    served: tuple[str, ...] | None = None
    before: Callable | None = None
    after: Callable | None = None
    fp32_adapters: bool = True
    autocast: bool = False
    graph: bool = False
    unsloth: bool = False


VARIANTS = {
    "stock": Variant("Hugging Face and PEFT as they are: SDPA attention, fp32 adapters"),
    "checkpointed": Variant(
        "stock with gradient checkpointing",
        after=lambda model: model.gradient_checkpointing_enable({"use_reentrant": False}),
    ),
    "bf16_adapters": Variant("stock with autocast_adapter_dtype=False", fp32_adapters=False),
    "autocast": Variant("stock under bf16 autocast, as Trainer(bf16=True) has it", autocast=True),
    "compile": Variant("stock, each layer and the loss under torch.compile", after=compiled),
    "liger": Variant("stock with Liger-Kernel", before=liger),
    "unsloth": Variant("Unsloth's FastLanguageModel, without its checkpointing", unsloth=True),
    "pyfast": Variant("pyfast.patch, the backends that dispatch chooses", served=()),
    "pyfast_cuda": Variant("the same, CUDA C++ where it has kernels and Triton elsewhere", served=("cuda", "triton")),
    "pyfast_triton": Variant("the same by Triton", served=("triton",)),
    "pyfast_graph": Variant("pyfast_cuda, replayed as a CUDA graph", served=("cuda", "triton"), graph=True),
}
GEMMS = "gemms"


# ---- what is read off a device


class Gpu(cuda.Gpu):
    limited_by = (8192, 1 << 29)  # the GEMM's side and the copy's elements that set the limits
    kernels_of = (torch.profiler.ProfilerActivity.CUDA, "self_device_time_total")

    def backends(self, served: tuple[str, ...]) -> tuple[str, ...]:
        return served

    def allocated_mb(self) -> float:
        return torch.cuda.memory_allocated() / 2**20

    def forget_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak_mb(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**20

    def capture(self, function: Callable) -> Callable:
        """The function's work on the GPU as a CUDA graph: a call replays it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(
            stream
        ):  # what libraries make on their first call on a stream is made before the capture
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay


class Cpu(Gpu):
    """In place of a GPU, to try the benchmark itself."""

    device = "cpu"
    limited_by = (64, 1 << 10)
    kernels_of = (torch.profiler.ProfilerActivity.CPU, "self_cpu_time_total")

    def backends(self, served):
        return tuple(on for on in ("emulator" if on == "cuda" else on for on in served) if not dispatch.unavailable(on))

    def times(self, *parts):
        return [max(self.wall(part), 1e-6) for part in parts]

    def finish(self):
        pass

    clear = forget_peak = finish

    def allocated_mb(self):
        return machine.resident_mb()

    def peak_mb(self):
        return machine.resident_mb("VmHWM")

    def capture(self, function):
        """What the function left stays, as after a capture; there is nothing that a replay could run."""
        function()
        return self.finish


DEVICES = {"cuda": Gpu, "cpu": Cpu}


# ---- a variant's process


def batch(model: Model, form: str, boundaries: bool) -> dict:
    """One row of random tokens. boundaries: of packed documents are given too."""
    import transformers

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.arguments["vocab_size"], (model.seq,), generator=generator, device="cpu")
    documents = ids.split([round(share * model.seq) for share in FORMS[form]])
    if len(documents) == 1:
        return {"input_ids": ids[None], "labels": ids[None]}
    flatten = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=boundaries)
    rows = [{"input_ids": part.tolist(), "labels": part.tolist()} for part in documents]
    return dict(flatten(rows))


class Training:
    """The steps of one variant, asked for by `serve`."""

    def __init__(self, name: str, variant: str, device: str):
        self.model, self.kind, self.on, self.device = MODELS[name], VARIANTS[variant], DEVICES[device](), device
        self.served = self.on.backends(self.kind.served or ())
        self.net = unsloth(self.model, device) if self.kind.unsloth else self.stock()
        self.report = []
        if self.kind.served is not None:
            with serving(*self.served):
                self.report = pyfast.patch(self.net, strict=True).swapped
        if self.kind.after is not None:
            self.kind.after(self.net)
        self.trained = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)
        self.inputs = {form: self.batch(form) for form in FORMS}
        self.replays: dict[str, Callable] = {}
        self.captured_mb: dict[str, float] = {}
        self.on.finish()
        self.loaded_mb = self.on.allocated_mb()

    def stock(self):
        with torch.device(self.device):
            net = end_to_end.base_model(self.model.config, DTYPE)
            if self.kind.before is not None:
                self.kind.before(net)
            return end_to_end.add_adapters(net, self.model.config, self.kind.fp32_adapters)

    def made(self) -> dict:
        return {"loaded_mb": self.loaded_mb, "backends": {op: backend for _, op, backend in self.report}}

    def batch(self, form: str) -> dict:
        found = batch(self.model, form, boundaries=self.kind.served is not None)
        return {key: x.to(self.device) if torch.is_tensor(x) else x for key, x in found.items()}

    def backward(self, form: str) -> torch.Tensor:
        with serving(*self.served), torch.autocast(self.device, torch.bfloat16, enabled=self.kind.autocast):
            loss = self.net(**self.inputs[form]).loss
        loss.backward()
        return loss.detach()

    def capture(self, form: str) -> Callable:
        """`backward`, replayed. Its loss and gradients live in the graph's memory, which each replay writes anew; its
        peak is that of the capture, since a replay asks for no memory."""
        loss = None

        def work():
            nonlocal loss
            self.optimizer.zero_grad()
            loss = self.backward(form)

        self.on.forget_peak()
        replay = self.on.capture(work)
        self.captured_mb[form] = self.on.peak_mb()
        gradients = [parameter.grad for parameter in self.trained]

        def call() -> torch.Tensor:
            replay()
            for parameter, gradient in zip(self.trained, gradients, strict=True):
                parameter.grad = gradient
            return loss

        return call

    def gradients(self, form: str) -> torch.Tensor:
        """Forward and backward; the loss."""
        if not self.kind.graph:
            return self.backward(form)
        if form not in self.replays:
            self.replays[form] = self.capture(form)
        return self.replays[form]()

    def step(self, form: str) -> None:
        self.gradients(form)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def check(self, form: str) -> tuple[float, dict[str, torch.Tensor]]:
        """The loss, and the gradients of the first and last layer's adapters, of a step from the first weights."""
        loss = self.gradients(form)
        last = self.net.config.num_hidden_layers - 1
        ends = tuple(f".layers.{i}." for i in {0, last})
        found = {
            name: parameter.grad.float().cpu().numpy()
            for name, parameter in self.net.named_parameters()
            if parameter.grad is not None and any(end in name for end in ends)
        }
        self.optimizer.zero_grad()
        return loss.item(), found

    def round(self, form: str, steps: int) -> dict:
        """Seconds of a step, and what it held at its peak. Memory is given back, so that the next process has it."""
        self.step(form)
        self.on.finish()
        self.on.forget_peak()
        start = time.perf_counter()
        for _ in range(steps):
            self.step(form)
        self.on.finish()
        seconds = (time.perf_counter() - start) / steps
        peak = max(self.on.peak_mb(), self.captured_mb.get(form, 0.0))
        self.on.clear()
        return {"seconds": seconds, "peak_mb": peak}

    def profile(self, form: str) -> dict:
        self.step(form)
        self.on.finish()
        start = time.perf_counter()
        with torch.profiler.profile(activities=[self.on.kernels_of[0]]) as profiler:
            self.step(form)
            self.on.finish()
        wall = time.perf_counter() - start
        return summary(kernels(profiler, self.on.kernels_of[1]), 1e3 * wall)

    def limits(self) -> dict[str, float]:
        return cuda.limits(self.on, *self.on.limited_by)


class Gemms:
    """The matrix products of a PyFast step, in place of a model."""

    def __init__(self, name: str, variant: str, device: str):
        self.on, self.device, self.captured_mb = DEVICES[device](), device, {}
        with torch.device(device):
            self.products = end_to_end.Gemms([products(name)], end_to_end.torch_dtype(DTYPE))

    def made(self) -> dict:
        return {"loaded_mb": self.on.allocated_mb(), "backends": {}}

    def step(self, form: str) -> None:
        for *product, _ in self.products.steps[0]:
            self.products.multiply(*product)

    round, profile, limits = Training.round, Training.profile, Training.limits


@functools.cache
def products(name: str) -> list:
    """What end_to_end.needed counts, on a model without values."""
    model = MODELS[name]
    with torch.device("meta"):
        net = end_to_end.add_adapters(end_to_end.base_model(model.config, DTYPE), model.config)
        # with a mask of its own, transformers looks at no value
        mask = torch.ones(1, 1, model.seq, model.seq, dtype=torch.bool)
    row = batch(model, "document", boundaries=False)
    given = {"input_ids": row["input_ids"].to("meta"), "attention_mask": mask, "labels": row["labels"]}
    return end_to_end.needed(net, given)


def flops(name: str, form: str) -> float:
    """Of a step's projections and attention, forward and backward, frozen weights without a gradient of their own."""
    model = MODELS[name]
    arguments = model.config.arguments
    width = arguments["hidden_size"] * arguments["num_hidden_layers"]  # of all heads of all layers
    pairs = sum((n := round(share * model.seq)) * (n + 1) / 2 for share in FORMS[form])
    return sum(2.0 * m * k * n for _, m, k, n, _ in products(name)) + 7 * 2 * pairs * width


def unsloth(model: Model, device: str):
    """Unsloth loads from a folder only, with a tokenizer: the random weights go through one."""
    import tokenizers
    import transformers

    module = importlib.import_module("unsloth")  # first, since what follows takes a while at 8B
    with tempfile.TemporaryDirectory() as folder:
        with torch.device(device):
            net = end_to_end.base_model(model.config, DTYPE)
        net.save_pretrained(folder)
        del net
        words = tokenizers.models.WordLevel({"<unk>": 0, "<pad>": 1, "<s>": 2, "</s>": 3}, unk_token="<unk>")
        names = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), **names)
        tokenizer.save_pretrained(folder)
        options = {"max_seq_length": model.seq, "dtype": end_to_end.torch_dtype(DTYPE), "load_in_4bit": False}
        net, _ = module.FastLanguageModel.from_pretrained(folder, **options)
    options = {"r": RANK, "lora_alpha": ALPHA, "target_modules": model.config.targets}
    net = module.FastLanguageModel.get_peft_model(net, use_gradient_checkpointing=False, **options)
    end_to_end.draw_adapters(net)
    return net.train()


#: (kind, what its kernels' names hold), the first that fits
KINDS = (
    ("attention", r"flash|fmha|attention|attn|sdpa"),
    ("loss", r"cross_?entropy|nll_loss|soft_?max|logsumexp|exponentials|logits|losses|head_"),
    ("optimizer", r"adam|multi_tensor"),
    ("gemm", r"gemm|cutlass|nvjet|xmma|cublas|splitk|lora|adapter|linear|matmul|\bmm\b"),
    ("norm", r"norm"),
    ("copy", r"memcpy|memset|copy|\bcat|index|gather"),
    ("elementwise", r"elementwise|vectorized|triton_|silu|swiglu|gated|activat|rope|rotary|reduce"),
)


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")


def kernels(profiler, field: str) -> list[tuple[str, float, int]]:
    """(name, milliseconds, calls) of what ran on the device; field: where an event has its microseconds."""
    # ranges that a user, or the optimizer, gave a name to hold kernels that stand for themselves
    events = [event for event in profiler.key_averages() if not event.is_user_annotation]
    return [(event.key, getattr(event, field) / 1e3, event.count) for event in events if getattr(event, field) > 0]


def summary(found: list[tuple[str, float, int]], wall_ms: float, top: int = 12) -> dict:
    """busy_ms: what kernels take together; a step that takes longer (wall_ms) waits for the host."""
    kinds: dict[str, float] = defaultdict(float)
    for name, ms, _ in found:
        kinds[kind_of(name)] += ms
    busy = sum(kinds.values())
    shares = (
        {kind: round(ms / busy, 3) for kind, ms in sorted(kinds.items(), key=lambda pair: -pair[1])} if busy else {}
    )
    largest = sorted(found, key=lambda kernel: -kernel[1])[:top]
    rows = [{"kernel": name[:120], "kind": kind_of(name), "ms": round(ms, 3), "calls": n} for name, ms, n in largest]
    calls = sum(count for *_, count in found)
    return {"wall_ms": round(wall_ms, 2), "busy_ms": round(busy, 2), "calls": calls, "kinds": shares, "kernels": rows}


class Failure(NamedTuple):
    reason: str


def reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {str(error).split('. ')[1] if '. ' in str(error) else error}"[:160]
    return cuda._reason(error)


def serve(pipe, device: str) -> None:
    """A variant's process: imports what most need at once, and does what it is asked for until it is asked nothing."""
    for name in ("transformers", "peft", "pyfast"):
        importlib.import_module(name)
    training = None
    while order := end_to_end.receive(pipe):
        what, *arguments = order
        # Other projects' code is run here, and compiled: whatever it raises is that variant's row, and the end of its
        # process, whose GPU may be left in any state.
        try:
            if what == "make":
                training = (Gemms if arguments[1] == GEMMS else Training)(*arguments, device)
                what, arguments = "made", []
            answer = getattr(training, what)(*arguments)
        except Exception as error:
            pipe.send(Failure(reason(error)))
            return
        pipe.send(answer)


# ---- measuring


class NotRun(Exception):
    """Why a variant has no figure."""


class Worker:
    """A process that serves one variant, started before it is needed: importing takes as long as measuring.

    start: multiprocessing's Process of a fresh interpreter, since a process that has seen a GPU cannot be forked.
    """

    def __init__(self, device: str, start: Callable):
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = start(target=serve, args=(theirs, device), daemon=True)
        self.process.start()
        if isinstance(self.process, multiprocessing.process.BaseProcess):
            theirs.close()

    def ask(self, deadline: float, *order):
        left = deadline - time.monotonic()
        try:
            self.pipe.send(order)
            if not self.pipe.poll(max(0.0, left)):
                self.kill()  # the others are not to be timed beside it
                raise NotRun(f"no time was left: {order[0]} did not end within {max(0.0, left):.0f} s")
            answer = self.pipe.recv()
        except (EOFError, OSError):
            raise NotRun("its process ended") from None
        if isinstance(answer, Failure):
            raise NotRun(answer.reason)
        return answer

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(5)
        self.kill()
        self.pipe.close()

    def kill(self) -> None:
        if self.process.is_alive() and hasattr(self.process, "kill"):
            self.process.kill()
            self.process.join()


def fresh_process(**arguments):
    return multiprocessing.get_context("spawn").Process(**arguments)


def thread(**arguments):
    """In place of a process, for tests."""
    importlib.import_module("peft")  # and transformers: two threads must not import them at once
    return threading.Thread(**arguments)


def difference(found: tuple, reference: tuple) -> float:
    """The largest of a step's errors beside those of the reference, as a share of what is allowed."""
    (loss, gradients), (truth, expected) = found, reference
    shares = [abs(loss - truth) / abs(truth) / LOSS_TOLERANCE]
    if gradients.keys() != expected.keys():
        return float("inf")
    for name, gradient in gradients.items():
        error = torch.from_numpy(gradient - expected[name]).norm() / torch.from_numpy(expected[name]).norm()
        shares.append(float(error) / GRADIENT_TOLERANCE)
    return max(shares, key=lambda share: float("inf") if share != share else share)


class Turns:
    """One model's variants on the GPU, and what became of them: rows[variant, form]."""

    def __init__(self, name: str, forms: list[str], device: str, deadline: float, patience: float):
        self.name, self.forms, self.device, self.deadline, self.patience = name, forms, device, deadline, patience
        self.rows: dict[tuple[str, str], dict] = {}
        self.reference: dict[str, tuple] = {}

    def ask(self, worker: Worker, *order):
        return worker.ask(min(self.deadline, time.monotonic() + self.patience), *order)

    def not_run(self, variant: str, forms: list[str], why) -> None:
        for form in forms:
            self.rows[variant, form] = {"not_run": str(why)}

    def prepare(self, variant: str, worker: Worker) -> list[str]:
        """Makes the variant, checks and warms it; the forms in which it can be timed."""
        made = self.ask(worker, "make", self.name, variant)
        ready = []
        for form in self.forms:
            off = None
            if variant != GEMMS:
                checked = self.ask(worker, "check", form)
                off = difference(checked, self.reference.setdefault(form, checked))
                if not off <= 1:
                    self.not_run(variant, [form], f"its loss or gradients are off by {off:.1f} × what is allowed")
                    continue
            self.ask(worker, "round", form, 1)  # warm
            self.rows[variant, form] = {**made, "off": off and round(off, 3), "seconds": [], "peak_mb": 0.0}
            ready.append(form)
        return ready

    def run(self, workers: dict[str, Worker], rounds: int) -> None:
        """Measures these variants, which take turns."""
        ready = {}
        for variant, worker in workers.items():
            with self.noting(variant, self.forms):
                ready[variant] = self.prepare(variant, worker)
        for _ in range(rounds):
            for form in self.forms:
                for variant in [v for v in ready if form in ready[v]]:
                    with self.noting(variant, ready[variant], lost=ready):
                        found = self.ask(workers[variant], "round", form, MODELS[self.name].steps)
                        row = self.rows[variant, form]
                        row["seconds"].append(found["seconds"])
                        row["peak_mb"] = max(row["peak_mb"], found["peak_mb"])
        for variant in list(ready):
            with self.noting(variant, [], lost=ready):  # what was timed stays, with or without these
                limits = self.ask(workers[variant], "limits") if ready[variant] else {}
                for form in ready[variant]:
                    self.rows[variant, form] |= {"limits": limits}
                    self.rows[variant, form]["profile"] = self.ask(workers[variant], "profile", form)

    @contextlib.contextmanager
    def noting(self, variant: str, forms: list[str], lost: dict | None = None):
        """A variant that cannot go on is named; its rounds that ended count where there are any."""
        try:
            yield
        except NotRun as why:
            missing = [form for form in forms if not self.rows.get((variant, form), {}).get("seconds")]
            missing = [form for form in missing if "not_run" not in self.rows.get((variant, form), {})]
            self.not_run(variant, missing, why)
            if lost is not None:
                lost.pop(variant, None)

    def finished(self) -> list[dict]:
        """The rows as they are saved."""
        model, found = MODELS[self.name], []
        for (variant, form), row in self.rows.items():
            head = {"model": self.name, "form": form, "variant": variant}
            if "not_run" in row:
                found.append({**head, **row})
                continue
            row = dict(row)
            seconds = row.pop("seconds")
            middle, limits = statistics.median(seconds), row.get("limits", {})
            tflops = flops(self.name, form) / middle / 1e12
            head |= {"ms": round(1e3 * middle, 3), "min_ms": round(1e3 * min(seconds), 3)}
            head |= {"max_ms": round(1e3 * max(seconds), 3), "rounds": len(seconds)}
            head |= {"tokens_per_s": round(model.seq / middle, 1)} if variant != GEMMS else {}
            head |= {"above_mb": round(row["peak_mb"] - row["loaded_mb"], 1), "tflops": round(tflops, 1)}
            if limits.get("gemm_tflops"):
                head["of_gemm"] = round(tflops / limits["gemm_tflops"], 3)
            row |= {"peak_mb": round(row["peak_mb"], 1), "loaded_mb": round(row["loaded_mb"], 1)}
            found.append({**head, **row})
        for row in found:
            stock = next((r for r in found if r["variant"] == "stock" and r["form"] == row["form"]), {})
            if "ms" in row and "ms" in stock:
                row["over_stock"] = round(stock["ms"] / row["ms"], 3)
                if row["variant"] != GEMMS:
                    row["memory_of_stock"] = (
                        round(row["above_mb"] / stock["above_mb"], 3) if stock["above_mb"] else None
                    )
        return found


def measure(name: str, variants: list[str], options: argparse.Namespace, start=fresh_process) -> Iterator[list[dict]]:
    """The rows of one model, all that there are each time that there are more."""
    turns = Turns(name, options.forms, options.device, options.deadline, options.patience)
    workers = {variant: Worker(options.device, start) for variant in variants}
    products(name)  # while they import
    try:
        groups = [variants] if MODELS[name].together else [[variant] for variant in variants]
        for group in groups:
            turns.run({variant: workers[variant] for variant in group}, options.rounds)
            for variant in group:
                workers[variant].end()
            yield turns.finished()
    finally:
        for worker in workers.values():
            worker.end()


def judge(rows: list[dict], bars=BARS) -> list[dict]:
    """Each bar of a model that was measured, in each form: what every PyFast variant reaches. `pyfast`, which is what a
    user gets, decides."""
    judged = []
    for bar in bars:
        for form in dict.fromkeys(row["form"] for row in rows if row["model"] == bar.model):
            here = {row["variant"]: row for row in rows if row["model"] == bar.model and row["form"] == form}
            values = {name: bar.value(here[name], here) for name in OURS if name in here}
            values = {name: round(value, 3) for name, value in values.items() if value is not None}
            met = bar.met(values["pyfast"]) if "pyfast" in values else None
            found = {"bar": str(bar), "form": form, "met": met, "values": values}
            missing = [name for name in ("pyfast", bar.against) if name and "ms" not in here.get(name, {})]
            if missing:
                found["why"] = f"{missing[0]}: {here.get(missing[0], {}).get('not_run', 'not asked for')}"
            judged.append(found)
    return judged


# ---- results

COLUMNS = ("model", "form", "variant", "tokens_per_s", "ms", "over_stock", "above_mb", "memory_of_stock", "tflops")
COLUMNS += ("of_gemm", "not_run")


def cells(row: dict) -> list[str]:
    return ["" if row.get(column) is None else str(row[column]) for column in COLUMNS]


def told(row: dict) -> str:
    head = f"{row['model']} {row['form']} {row['variant']}:"
    if "ms" not in row:
        return f"{head} not run, {row['not_run']}"
    time_taken = f"{row['ms']:.4g} ms ({row['min_ms']:.4g} to {row['max_ms']:.4g})"
    labels = {"tokens_per_s": "tokens/s", "over_stock": "× stock", "above_mb": "MB above the weights"}
    labels |= {"memory_of_stock": "of stock's", "tflops": "TFLOP/s", "of_gemm": "of GEMM"}
    return ", ".join(
        [f"{head} {time_taken}", *(f"{row[key]:,} {text}" for key, text in labels.items() if row.get(key))]
    )


def verdict(judged: dict) -> str:
    word = {True: "met", False: "missed", None: "not decided"}[judged["met"]]
    values = ", ".join(f"{name} {value:,}" for name, value in judged["values"].items())
    return f"{word}: {judged['bar']} ({judged['form']}): {values or judged['why']}"


def explain(rows: list[dict], judged: list[dict]) -> list[str]:
    """For each missed bar's model and form, where PyFast's step spends its time."""
    lines = []
    for model, form in dict.fromkeys((j["bar"].split(":")[0], j["form"]) for j in judged if j["met"] is False):
        for row in rows:
            found = row.get("profile")
            if found and (row["model"], row["form"]) == (model, form) and row["variant"] in (*OURS, "stock"):
                shares = ", ".join(f"{kind} {share:.0%}" for kind, share in found["kinds"].items())
                busy = f"{found['busy_ms']} of {found['wall_ms']} ms in {found['calls']} kernels"
                lines.append(f"{model} {form} {row['variant']}: {busy}: {shares}")
    return lines


def save(folder: Path, name: str, about: dict, rows: list[dict], judged: list[dict]) -> None:
    """end_to_end_<model>_bf16.json, and end_to_end.md with all models in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    result = {**about, "dtype": DTYPE, "bars": judged, "rows": rows}
    (folder / f"end_to_end_{name}_{DTYPE}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    lines = [
        "# end_to_end",
        "",
        "A training step of LoRA r=16 in bf16, 4,096 tokens in one row: one document, or seven packed ones."
        " `over_stock` is stock's time over the variant's, `above_mb` the peak above the weights, `memory_of_stock`"
        " that over stock's, `of_gemm` the step's products and attention over the GEMM rate of the same process, and"
        " `gemms` these products alone, without attention.",
    ]
    for path in sorted(folder.glob(f"end_to_end_*_{DTYPE}.json")):
        found = json.loads(path.read_text())
        about = {key: value for key, value in found.items() if key not in ("rows", "bars")}
        table = [COLUMNS, ["---"] * 3 + ["--:"] * (len(COLUMNS) - 3), *map(cells, found["rows"])]
        lines += ["", json.dumps(about), "", *(f"| {' | '.join(row)} |" for row in table), ""]
        lines += [f"- {verdict(bar)}" for bar in found["bars"]]
    (folder / "end_to_end.md").write_text("\n".join(lines) + "\n")


def bench(names: list[str], folder: Path, about: dict, options: argparse.Namespace, start=fresh_process) -> list[str]:
    """Measures, saves and prints these models; returns what of PyFast did not run."""
    every, judged, names = [], [], list(names)
    while names:
        name = names.pop(0)
        rows: list[dict] = []
        for found in measure(name, options.variants or list(MODELS[name].variants), options, start):
            for row in found[len(rows) :]:
                print(told(row), flush=True)
            rows = found
            save(folder, name, about, rows, judge(rows))
        every += rows
        judged += judge(rows)
        short = any(row["variant"] == "stock" and "out of memory" in row.get("not_run", "") for row in rows)
        if short and INSTEAD.get(name, name) not in (*names, name):
            print(f"{name}: stock runs out of memory; {INSTEAD[name]} is compared too", flush=True)
            names.append(INSTEAD[name])
    for line in [*explain(every, judged), *map(verdict, judged)]:
        print(line, flush=True)
    ours = [row for row in every if row["variant"] in OURS and "not_run" in row]
    return [f"{row['model']} {row['form']} {row['variant']}: {row['not_run']}" for row in ours]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end_gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "models", nargs="*", metavar="model", help=f"of {', '.join(MODELS)}; without: {', '.join(DEFAULT)}"
    )
    known = "; ".join(f"{name}: {variant.help}" for name, variant in VARIANTS.items())
    choices = [*VARIANTS, GEMMS]
    parser.add_argument("--variants", nargs="+", choices=choices, help=f"default: the model's own. {known}")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="%(default)s")
    parser.add_argument("--minutes", type=float, default=8.0, help="what it may take in all (%(default)s)")
    parser.add_argument(
        "--patience", type=float, default=120.0, help="seconds that one thing asked of a variant may take"
    )
    parser.add_argument("--device", choices=DEVICES, default="cuda", help="cpu: to try the benchmark itself")
    options = parser.parse_args(argv)
    for name in options.models:
        if name not in MODELS:
            parser.error(f"there is no model {name!r}: choose from {', '.join(MODELS)}")
    options.models = options.models or list(DEFAULT)
    options.deadline = time.monotonic() + 60 * options.minutes - 20
    return options


#: read by libraries as they are imported, in every process: nothing is looked for on the hub
OFFLINE = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}


def run(folder: Path, about: dict, deadline: float, models: tuple[str, ...] = DEFAULT) -> list[str]:
    """What `benchmarks.gpu` asks for: these models until `deadline` (of time.monotonic); returns what failed."""
    options = parse(list(models))
    options.deadline = deadline
    os.environ.update(OFFLINE)
    return bench(options.models, folder, about, options)


def main(argv: list[str] | None = None) -> int:
    from . import gpu

    options = parse(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.end_to_end_gpu: PyTorch sees no GPU here", file=sys.stderr)
        return 2
    os.environ.update(OFFLINE)
    about = gpu.describe() if options.device == "cuda" else {"gpu": "cpu", **machine.versions()}
    failed = bench(options.models, gpu.folder_of(about["gpu"]), about, options)
    for line in failed:
        print(line)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
