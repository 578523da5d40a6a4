"""The ops on a GPU beside their peers (benchmarks/peers.py), forward and backward apart, at Llama-3-8B's shapes and
those that kernels are usually compared on; and the bars that they are held to. `python -m benchmarks.gpu` runs this, in
a process of its own since a kernel that fails takes its process's GPU with it:

    python -m benchmarks.cuda OP:INDEX ... [--skip OP:VARIANT ...]        writes a line of JSON for whatever happens

Every variant is checked before it is timed. Then they take turns, and of each the median is taken over its turns.
"""

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch

import pyfast
from pyfast import dispatch, ops
from pyfast.ops import LoraWeights

from .peers import PEERS, SCALING, Peer, load, projections

DTYPE = torch.bfloat16
ROUNDS = 3
#: PyFast's variants: name -> backend
KERNELS = {"triton": "triton", "cuda": "cuda"}
OURS = (*KERNELS, "torch")
TRUTH = "the truth"  # what all are held against
#: op -> variant -> (backend, module, constant, value): guesses for hardware to decide, timed where peers are. A row of
#: 128,256 classes takes 275 kB of the logits' memory.
CHOICES = {
    "linear_cross_entropy": {
        f"{backend}, {rows} rows": (backend, "pyfast.ops.linear_cross_entropy", "GPU_LOGITS_BYTES", 275_000 * rows)
        for backend in ("triton", "cuda")
        for rows in (512, 640, 1024)
    }
}
#: how far a peer may be off in norm. Some skip small gradients or sum in bf16; a wrong call is off by more.
PEER_TOLERANCE = 5e-2
#: the unit roundoff of a result in fp32 is that of its truth too, whose own sums are off by more
FP32_ROUNDOFF = 1e-5
#: two medians of one kernel differ by so much
NOISE = 0.02


#: what bars compare with: the best of these variants
BESIDE = {
    # "torch" being the one that F.scaled_dot_product_attention takes
    "PyTorch's best": ("torch", "sdpa flash", "sdpa cudnn", "sdpa efficient", "flex"),
    "frozen GEMMs": ("frozen GEMMs",),
}


class Bar(NamedTuple):
    """What a quantity of a case's rows must reach. by: the variant whose it is; "pyfast" is the fastest of OURS.
    beside: of BESIDE, the variants the least of whose it is divided by."""

    quantity: str
    at_least: float | None = None
    at_most: float | None = None
    by: str = "pyfast"
    beside: str | None = None

    def __str__(self):
        sign, bound = ("≥", self.at_least) if self.at_most is None else ("≤", self.at_most)
        return f"{self.quantity}{f' / {self.beside}' if self.beside else ''} {sign} {bound:g}"

    def met(self, value: float) -> bool:
        return value <= self.at_most if self.at_least is None else value >= self.at_least


@dataclass
class Case:
    """One shape of one op. inputs(): fresh tensors on the default device. call: PyFast's op of them. flops, bytes: what
    forward and backward must do and move, and no more. together: forward does part of backward's work, so that only
    their sum has a rate. peers: whether others are timed too."""

    op: str
    label: str
    inputs: Callable[[], tuple]
    call: Callable
    flops: tuple[float, float] = (0.0, 0.0)
    bytes: tuple[float, float] = (0.0, 0.0)
    together: bool = False
    peers: bool = True
    bars: tuple[Bar, ...] = ()


def _leaf(*shape, scale=1.0):
    return (torch.randn(shape) * scale).to(DTYPE).requires_grad_()


def _weight(n, k):
    return _leaf(n, k, scale=k**-0.5).detach()


def _heads(batch, heads, length, width):
    """As a projection gives them: a transposed view."""
    return _leaf(batch, length, heads, width).detach().transpose(1, 2).requires_grad_()


def _attention(batch, heads, kv_heads, length, width):
    product = 2 * batch * heads * length * (length + 1) / 2 * width
    return Case(
        "attention",
        f"causal B{batch} H{heads}/{kv_heads} S{length} D{width}",
        lambda: tuple(_heads(batch, h, length, width) for h in (heads, kv_heads, kv_heads)),
        partial(ops.attention, causal=True),
        flops=(2 * product, 5 * product),
    )


def _attention_varlen(count, longest, heads, width):
    """Sequences of longest / count, 2 longest / count and so on, packed."""
    lengths = [longest * (i + 1) // count for i in range(count)]
    product = sum(2 * heads * n * (n + 1) / 2 * width for n in lengths)

    def inputs():
        cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return *(_leaf(sum(lengths), heads, width) for _ in range(3)), cu_seqlens

    def call(q, k, v, cu_seqlens):
        return ops.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True)

    label = f"causal, {count} sequences of up to {longest} H{heads} D{width}"
    return Case("attention_varlen", label, inputs, call, flops=(2 * product, 5 * product))


def _cross_entropy(rows, classes):
    """Logits so unequal that the softmax is a good part of the gradient: between equal ones a wrong one would hide."""
    size = 2 * rows * classes  # in bytes
    return Case(
        "cross_entropy",
        f"{rows} × {classes}",
        lambda: (_leaf(rows, classes, scale=3.0), torch.randint(classes, (rows,))),
        ops.cross_entropy,
        bytes=(size, 2 * size),
    )


def _linear_cross_entropy(rows, k, classes, ignored=0.0):
    counted = rows - int(ignored * rows)

    def inputs():
        target = torch.randint(classes, (rows,))
        target[torch.randperm(rows)[counted:]] = -100
        return _leaf(rows, k, scale=3.0), _weight(classes, k), target

    product = 2 * counted * k * classes
    label = f"{rows} rows, {k} → {classes}, frozen head"
    if ignored:
        label += f", {ignored:.0%} ignored"
    flops = (product, product)
    return Case("linear_cross_entropy", label, inputs, ops.linear_cross_entropy, flops, together=True)


def _norm(op, rows, width):
    vectors = 1 if op == "rms_norm" else 2
    size = 2 * rows * width
    return Case(
        op,
        f"{rows} × {width}",
        lambda: (_leaf(rows, width), *(_leaf(width) for _ in range(vectors))),
        lambda *args: getattr(ops, op)(*args, 1e-6),
        bytes=(2 * size, 3 * size),
    )


def _rope(batch, heads, kv_heads, length, width):
    def inputs():
        angle = torch.rand(1, length, width // 2).repeat(1, 1, 2) * 6
        q, k = (_heads(batch, h, length, width) for h in (heads, kv_heads))
        return q, k, angle.cos().to(DTYPE), angle.sin().to(DTYPE)

    size = 2 * batch * (heads + kv_heads) * length * width
    label = f"B{batch} H{heads}/{kv_heads} S{length} D{width}"
    return Case("rope", label, inputs, ops.rope, bytes=(2 * size, 2 * size))


def _gated(op, rows, width):
    call = ops.swiglu if op == "swiglu" else partial(ops.geglu, approximate="tanh")
    size = 2 * rows * width
    inputs = lambda: (_leaf(rows, width), _leaf(rows, width))  # noqa: E731
    return Case(op, f"{rows} × {width}", inputs, call, bytes=(3 * size, 5 * size))


def _gelu_bias(rows, width):
    size = 2 * rows * width
    inputs = lambda: (_leaf(rows, width), _leaf(width))  # noqa: E731
    return Case("gelu_bias", f"{rows} × {width}", inputs, ops.gelu_bias, bytes=(2 * size, 3 * size))


def _projection(n, k, rank):
    return _weight(n, k), _leaf(rank, k, scale=k**-0.5), _leaf(n, rank, scale=rank**-0.5)


def _lora(op, rows, k, widths, rank):
    """One projection or more of x, or an MLP: all that are given have one input, and an MLP's last goes back to k."""
    shapes = [(n, k) for n in widths] if op != "lora_mlp" else [(widths, k), (widths, k), (k, widths)]

    def call(x, *weights):
        made = [LoraWeights(*p, SCALING) for p in projections(weights)]
        if op == "lora_linear":
            return ops.lora_linear(x, *made[0][:4])
        return ops.lora_mlp(x, *made) if op == "lora_mlp" else ops.lora_linears(x, made)

    product = sum(2 * rows * n * m for n, m in shapes)
    names = widths if op == "lora_mlp" else " + ".join(map(str, widths))
    return Case(
        op,
        f"{rows} rows, {k} → {names}, r {rank}",
        lambda: (_leaf(rows, k), *(t for n, m in shapes for t in _projection(n, m, rank))),
        call,
        flops=(product, product),
    )


_NEVER_BELOW = tuple(Bar(f"{part}_ms", at_most=1 + NOISE, beside="PyTorch's best") for part in ("forward", "backward"))
_OF_COPY = Bar("forward_of_copy", at_least=0.88), Bar("backward_of_copy", at_least=0.75)
_TB_PER_S = Bar("forward_gb_per_s", at_least=2900), Bar("backward_gb_per_s", at_least=2900)


def _lora_bar(ratio):
    return (Bar("ms", at_most=ratio, beside="frozen GEMMs"),)


#: op -> (a case of a shape, the shapes with the bars of each, and shapes timed without peers, whose compilation costs
#: seconds a shape: others of training, and those so small that PyTorch may win, for dispatch.SMALL)
CASES: dict[str, tuple[Callable, dict[tuple, tuple[Bar, ...]], list[tuple]]] = {
    # FlashAttention-3's figures are of 16k tokens and 2,048 columns
    "attention": (
        _attention,
        {
            (1, 16, 16, 16384, 128): (*_NEVER_BELOW, Bar("forward_tflops", at_least=600, by="cuda")),
            (1, 32, 32, 16384, 64): (*_NEVER_BELOW, Bar("forward_tflops", at_least=473)),
            (2, 32, 8, 4096, 128): (),
        },
        [(1, 8, 8, 512, 64)],
    ),
    "cross_entropy": (
        _cross_entropy,
        dict.fromkeys(((32768, 32000), (16384, 65536), (8192, 128256), (4096, 262144)), _TB_PER_S),
        [(2048, 32000), (256, 32000)],
    ),
    "linear_cross_entropy": (
        _linear_cross_entropy,
        {
            (8192, 4096, 128256): (Bar("ms", at_most=24), Bar("extra_mb", at_most=200)),
            (8192, 4096, 128256, 0.5): (Bar("ms", at_most=12.5), Bar("extra_mb", at_most=200)),
        },
        [(8192, 2048, 32000), (256, 1024, 32000)],
    ),
    "lora_linear": (
        partial(_lora, "lora_linear"),
        {
            (8192, 4096, (14336,), 16): _lora_bar(1.06),
            (8192, 4096, (4096,), 16): _lora_bar(1.10),
        },
        [(8192, 4096, (1024,), 16), (2048, 1024, (1024,), 16), (256, 1024, (1024,), 16)],
    ),
    "rms_norm": (
        partial(_norm, "rms_norm"),
        {(16384, 4096): _OF_COPY, (16384, 8192): _OF_COPY},
        [(65536, 1024), (4096, 1024), (256, 1024)],
    ),
    "rope": (
        _rope,
        {(4, 32, 8, 4096, 128): _OF_COPY},
        [(8, 32, 32, 2048, 64), (2, 8, 8, 1024, 64), (1, 8, 8, 256, 64)],
    ),
    "swiglu": (partial(_gated, "swiglu"), {(8192, 14336): _OF_COPY}, [(16384, 4096), (2048, 4096), (256, 4096)]),
    "layer_norm": (
        partial(_norm, "layer_norm"),
        {(16384, 4096): _OF_COPY},
        [(65536, 1024), (4096, 1024), (256, 1024)],
    ),
    "lora_mlp": (partial(_lora, "lora_mlp"), {(8192, 4096, 14336, 16): ()}, [(256, 1024, 2816, 16)]),
    "lora_linears": (
        partial(_lora, "lora_linears"),
        {(8192, 4096, (4096, 1024, 1024), 16): ()},
        [(256, 1024, (1024, 256, 256), 16)],
    ),
    "attention_varlen": (_attention_varlen, {(8, 4096, 16, 128): ()}, [(4, 128, 8, 64)]),
    "geglu": (partial(_gated, "geglu"), {(8192, 14336): ()}, [(2048, 4096), (256, 4096)]),
    "gelu_bias": (_gelu_bias, {(8192, 16384): ()}, [(2048, 4096), (256, 4096)]),
}


def cases(op: str) -> list[Case]:
    """All cases of an op, those without peers last."""
    make, shapes, alone = CASES[op]
    found = [make(*shape) for shape in (*shapes, *alone)]
    for case, bars in zip(found, shapes.values(), strict=False):
        case.bars = bars
    for case in found[len(shapes) :]:
        case.peers = False
    return found


def plan(names: Iterable[str]) -> list[str]:
    """OP:INDEX of every case: those with bars first, those without peers last."""
    every = [(f"{name}:{i}", case) for name in names for i, case in enumerate(cases(name))]
    return [name for name, case in sorted(every, key=lambda one: (not one[1].bars, not one[1].peers))]


def variants(case: Case) -> dict[str, Peer]:
    """PyFast's backends that have kernels for the op, PyTorch's composite, and the peers."""

    def ours(backend):
        def call(m, *inputs):
            with pyfast.use_backend(backend):
                return case.call(*inputs)

        return Peer("pyfast", call)

    def chosen(name, module, constant, value):
        def call(m, *inputs):
            with mock.patch.object(m, constant, value):
                return ours(KERNELS[name]).call(m, *inputs)

        return Peer(module, call)

    listed = {backend for row in dispatch.TABLE[case.op].values() for backend in row}
    found = {name: ours(backend) for name, backend in KERNELS.items() if name in listed}
    found["torch"] = ours("torch")
    if case.peers:
        choices = CHOICES.get(case.op, {}).items()
        found |= PEERS[case.op] | {name: chosen(*choice) for name, choice in choices if choice[0] in KERNELS}
    return found


def is_ours(name: str) -> bool:
    """Whether a variant is PyFast's: held to the error rule, and a failure where it raises."""
    return name.split(",")[0] in OURS


# ---- results and what they are checked by
class Step:
    """A variant with its inputs: forward() then backward(), for a random incoming gradient."""

    def __init__(self, peer: Peer, inputs: tuple):
        module = load(peer.module)
        self.inputs = inputs if peer.prepare is None else peer.prepare(module, *inputs)
        self.wanted = [x for x in self.inputs if torch.is_tensor(x) and x.requires_grad]
        self.run = partial(peer.call, module, *self.inputs)
        self.outputs = self.gradients = self.cotangents = None

    def forward(self) -> None:
        self.outputs = self.run()

    def backward(self) -> None:
        outputs, self.outputs = self.outputs, None
        outputs = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
        if self.cotangents is None:
            torch.manual_seed(1)
            drawn = (
                torch.randn(y.shape, device=y.device).to(DTYPE) if y.dim() else torch.ones_like(y) for y in outputs
            )
            self.cotangents = [d.to(y.dtype) for d, y in zip(drawn, outputs, strict=True)]  # the same in fp32
        self.gradients = list(torch.autograd.grad(outputs, self.wanted, self.cotangents))

    def both(self) -> None:
        self.forward()
        self.backward()

    def results(self) -> list[torch.Tensor]:
        """Results and gradients."""
        self.forward()
        outputs = self.outputs if isinstance(self.outputs, tuple | list) else [self.outputs]
        outputs = [y.detach() for y in outputs]
        self.backward()
        return outputs + self.gradients


def exact(case: Case, inputs: tuple) -> list[torch.Tensor]:
    """What PyTorch computes of these inputs in fp32."""
    torch.set_float32_matmul_precision("highest")  # whatever a peer's import has set
    wide = tuple(x.detach().float().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs)
    return Step(variants(case)["torch"], wide).results()


_CHUNK = 1 << 26  # elements that are compared at a time


def excess(result: torch.Tensor, truth: torch.Tensor, torchs: torch.Tensor) -> float:
    """The error over what the error rule (pyfast/close.py) allows it, the worst of element, row and column: above 1 is
    wrong. The truth here is fp32, and read in parts."""
    u = torch.finfo(result.dtype).eps / 2 if result.dtype.itemsize == 2 else FP32_ROUNDOFF
    k, ref, t = (x.detach().reshape(-1, x.shape[-1] if x.dim() > 1 else x.numel()) for x in (result, truth, torchs))
    if k.shape != ref.shape:
        return float("inf")
    most, rows, columns = [], [], []
    for i in range(0, len(k), max(1, _CHUNK // k.shape[1])):
        part = slice(i, i + max(1, _CHUNK // k.shape[1]))
        r = ref[part].float()
        three = (k[part].float() - r, t[part].float() - r, r)
        most.append(torch.stack([x.abs().max() for x in three]))
        rows.append(torch.stack([x.norm(dim=1) for x in three]))
        columns.append(torch.stack([x.square().sum(0) for x in three]))

    def ratio(error, own, size):
        return error / (2 * own.max() + 2 * u * size + u * size.max()).clamp_min(1e-30)

    error, own, size = torch.stack(most).amax(0)
    found = [error / (2 * own + u * size).clamp_min(1e-30)]
    if k.shape[1] >= 16:
        found.append(ratio(*torch.cat(rows, 1)).max())
    if k.shape[0] >= 16:
        found.append(ratio(*torch.stack(columns).sum(0).sqrt()).max())
    worst = torch.stack(found)
    return float("inf") if worst.isnan().any() else float(worst.max())


def difference(result: torch.Tensor, truth: torch.Tensor) -> float:
    """The relative difference in norm."""
    if result.shape != truth.shape:
        return float("inf")
    return float((result.detach().float() - truth).norm() / truth.norm().clamp_min(1e-30))


def wrong(name: str, results, truth, torchs) -> str | None:
    """Why these results of a variant are wrong, or None."""
    if len(results) != len(truth):
        return f"gives {len(results)} results and gradients, expected {len(truth)}"
    for i, (k, ref, t) in enumerate(zip(results, truth, torchs, strict=True)):
        if is_ours(name):
            off = excess(k, ref, t)
            if not off <= 1:
                return f"result {i} of {len(truth)} is off by {off:.1f} times what the error rule allows"
        else:
            off = difference(k, ref)
            if not off <= PEER_TOLERANCE:
                return f"result {i} of {len(truth)} is off by {off:.1e} in norm"
    return None


# ---- timing
class Gpu:
    """What is read off a GPU: time, memory, kernels."""

    device = "cuda"
    FLUSHED = 1 << 30  # bytes; writing them clears the L2 cache, and takes so long that the host is ahead of the GPU
    TURN = 10.0  # milliseconds
    REPEATS = (3, 15)  # of a turn, at least and at most

    def times(self, *parts: Callable) -> list[float]:
        """Median milliseconds of each part of a call: parts are called in turn, each behind a flushed cache."""
        flushed = torch.empty(self.FLUSHED, dtype=torch.int8, device=self.device)

        def once():
            events = []
            for part in parts:
                events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
                flushed.zero_()
                events[-1][0].record()
                part()
                events[-1][1].record()
            return events

        def read(events):
            torch.cuda.synchronize()
            return [[start.elapsed_time(end) for start, end in one] for one in events]

        once()
        expected = sum(read([once(), once()])[1])
        repeats = min(max(int(self.TURN / max(expected, 1e-3)), self.REPEATS[0]), self.REPEATS[1])
        return [statistics.median(part) for part in zip(*read([once() for _ in range(repeats)]), strict=True)]

    def wall(self, function: Callable) -> float:
        """Milliseconds of a call among calls of it: the host's time where that is more than the GPU's."""
        function()
        self.finish()
        repeats, start = 10, time.perf_counter()
        for _ in range(repeats):
            function()
        self.finish()
        return (time.perf_counter() - start) / repeats * 1e3

    def peak(self, function: Callable) -> int:
        """Bytes that a call holds at most, beyond what is allocated before it."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before

    def profile(self, function: Callable) -> list[dict]:
        return top_kernels(function, self.finish, torch.autograd.DeviceType.CUDA)

    def finish(self) -> None:
        torch.cuda.synchronize()

    def lost(self) -> bool:
        """Whether a kernel has taken this process's GPU with it."""
        try:
            self.finish()
            torch.ones(2, device=self.device).sum().item()
        except RuntimeError:
            return True
        return False

    def clear(self) -> None:
        torch.cuda.empty_cache()


def top_kernels(function: Callable, finish: Callable, device_type, count: int = 8, calls: int = 3) -> list[dict]:
    """The kernels of a call that take longest: name, launches per call, microseconds per call."""
    function()
    finish()
    with torch.profiler.profile() as profiler:
        for _ in range(calls):
            function()
        finish()
    time_of = "self_cpu_time_total" if device_type == torch.autograd.DeviceType.CPU else "self_device_time_total"
    events = [event for event in profiler.key_averages() if event.device_type == device_type]
    events.sort(key=lambda event: -getattr(event, time_of))
    return [
        {"kernel": e.key[:100], "launches": round(e.count / calls, 2), "us": round(getattr(e, time_of) / calls, 1)}
        for e in events[:count]
    ]


def limits(gpu: Gpu, size: int = 8192, elements: int = 1 << 29) -> dict[str, float]:
    """What this GPU reaches: TFLOP/s of a bf16 product and GB/s of a copy, bytes read and written."""
    a, b = (torch.randn(size, size, device=gpu.device).to(DTYPE) for _ in range(2))
    x = torch.randn(elements // 2, device=gpu.device).view(DTYPE)
    y = torch.empty_like(x)
    (product,), (copy,) = gpu.times(lambda: a @ b), gpu.times(lambda: y.copy_(x))
    return {
        "gemm_tflops": round(2 * size**3 / product / 1e9, 1),
        "copy_gb_per_s": round(2 * x.nbytes / copy / 1e6, 1),
    }


# ---- measuring a case
def measure(
    case: Case,
    reached: dict[str, float],
    gpu: Gpu,
    rounds: int = ROUNDS,
    skip: Iterable[str] = (),
    at: Callable[[str], None] = lambda variant: None,
) -> list[dict]:
    """A row per variant. Each is first held against PyTorch in fp32, PyFast's kernels to the same bits in a second run
    too; then they take turns, with fresh inputs at each since some peers overwrite theirs. at(variant) is called before
    each of these."""

    def fresh():
        torch.manual_seed(0)
        with torch.device(gpu.device):
            return case.inputs()

    peers = {name: peer for name, peer in variants(case).items() if name not in skip}
    rows = {name: {"op": case.op, "case": case.label, "variant": name} for name in peers}

    def attempt(name: str, what: Callable):
        """What a variant gives, or None, with the reason in its row: what another project's code, compiled here, may
        raise on a GPU or a shape that it does not serve is of no one class."""
        at(name)
        try:
            return what()
        except Exception as error:
            if gpu.lost():
                raise
            rows[name] |= {"not_run": _reason(error), "failed": is_ours(name)}
            peers.pop(name)
            return None

    at(TRUTH)
    truth = exact(case, fresh())
    torchs = Step(peers["torch"], fresh()).results()
    for name, peer in list(peers.items()):
        backend = KERNELS.get(name.split(",")[0])
        if backend and (reason := dispatch.refusal(backend, case.op, truth[0].to(DTYPE))):
            rows[name]["not_run"] = reason
            peers.pop(name)
        elif name != "torch" and peer.checked:
            results = attempt(name, lambda peer=peer: Step(peer, fresh()).results())
            if results is None:
                continue
            reason = wrong(name, results, truth, torchs)
            if reason is None and backend:
                again = attempt(name, lambda peer=peer: Step(peer, fresh()).results())
                if again is not None and not all(map(torch.equal, results, again)):
                    reason = "gives other bits in a second run: a race"
            results = again = None
            if reason is not None:
                rows[name] |= {"not_run": reason, "failed": is_ours(name)}
                peers.pop(name)
    del truth, torchs
    taken: dict[str, list[list[float]]] = {name: [] for name in peers}
    for turn in range(rounds):
        for name, peer in list(peers.items()):
            times = attempt(name, partial(_turn, peer, fresh(), gpu, rows[name] if turn == 0 else None))
            if times is not None:
                taken[name].append(times)
    for name in peers:
        rows[name] |= _rates(case, taken[name], reached)
    ours = min((row["ms"] for row in rows.values() if row["variant"] in OURS and "ms" in row), default=None)
    for row in rows.values():
        if "ms" in row:
            row["pyfast_speedup"] = round(row["ms"] / ours, 3)
    return list(rows.values())


def _turn(peer: Peer, inputs: tuple, gpu: Gpu, row: dict | None) -> list[float]:
    """Milliseconds of forward and backward; the memory and the wall time go to the row, if one is given."""
    step = Step(peer, inputs)
    step.both()  # what is made once is not counted
    if row is not None:
        step.gradients = None
        peak = gpu.peak(step.both)
        gradients = sum(g.nbytes for g in step.gradients)
        row |= {"peak_mb": round(peak / 1e6, 1), "extra_mb": round((peak - gradients) / 1e6, 1)}
        row["wall_ms"] = round(gpu.wall(step.both), 4)
    return gpu.times(step.forward, step.backward)


def _rates(case: Case, taken: list[list[float]], reached: dict[str, float]) -> dict:
    """Medians of forward, backward and both, and their rates."""
    found = {}
    totals = [sum(times) for times in taken]
    columns = {"forward_": [t[0] for t in taken], "backward_": [t[1] for t in taken], "": totals}
    for part, times in columns.items():
        found[f"{part}ms"] = round(statistics.median(times), 4)
    found |= {"min_ms": round(min(totals), 4), "max_ms": round(max(totals), 4)}
    parts = {"": (sum(case.flops), sum(case.bytes))}
    if not case.together:
        parts |= {"forward_": (case.flops[0], case.bytes[0]), "backward_": (case.flops[1], case.bytes[1])}
    for part, (flops, moved) in parts.items():
        ms = found[f"{part}ms"]
        if flops:
            found[f"{part}tflops"] = round(flops / ms / 1e9, 1)
            found[f"{part}of_gemm"] = round(flops / ms / 1e9 / reached["gemm_tflops"], 3)
        if moved:
            found[f"{part}gb_per_s"] = round(moved / ms / 1e6, 1)
            found[f"{part}of_copy"] = round(moved / ms / 1e6 / reached["copy_gb_per_s"], 3)
    return found


def fastest(rows: Iterable[dict]) -> dict | None:
    """The row of PyFast's variant that takes least, launched from the host as a step launches it."""
    return min((row for row in rows if row["variant"] in OURS and "ms" in row), key=as_called, default=None)


def as_called(row: dict) -> float:
    """Milliseconds of a call among others: the GPU's, or the host's where those are more."""
    return max(row["ms"], row["wall_ms"])


def verdicts(case: Case, rows: list[dict]) -> list[dict]:
    """For each bar of a case whether it is met, with what, and by how much it is missed."""
    by_name, best, found = {row["variant"]: row for row in rows}, fastest(rows), []
    for bar in case.bars:
        row = best if bar.by == "pyfast" else by_name.get(bar.by)
        verdict = {"op": case.op, "case": case.label, "bar": str(bar), "met": False}
        found.append(verdict)
        named = BESIDE[bar.beside] if bar.beside else ()
        beside = [by_name[name][bar.quantity] for name in named if bar.quantity in by_name.get(name, {})]
        if row is None or bar.quantity not in row or (named and not beside):
            reason = "nothing to compare with" if row and bar.quantity in row else (row or {}).get("not_run")
            verdict |= {"variant": bar.by, "not_measured": reason or "it has no such row"}
            continue
        value = row[bar.quantity] / min(beside) if beside else row[bar.quantity]
        bound = bar.at_most if bar.at_least is None else bar.at_least
        verdict |= {
            "variant": row["variant"],
            "value": round(value, 3),
            "met": bar.met(value),
            "off": round(value / bound - 1, 3),
        }
        if not bar.quantity.endswith(("of_gemm", "of_copy", "_mb")):  # it stands beside the limit, then
            part = next((part for part in ("forward_", "backward_") if bar.quantity.startswith(part)), "")
            verdict |= {of: row[part + of] for of in ("of_gemm", "of_copy") if part + of in row}
    return found


def profiles(case: Case, found: list[dict], gpu: Gpu, at: Callable[[str], None]) -> None:
    """Adds to each missed bar the kernels that its variant ran; where that fails, the reason."""
    kernels: dict[str, object] = {}
    for verdict in found:
        name = verdict["variant"]
        if verdict["met"] or "value" not in verdict:
            continue
        if name not in kernels:
            at(name)
            torch.manual_seed(0)
            try:
                with torch.device(gpu.device):
                    inputs = case.inputs()
                kernels[name] = gpu.profile(Step(variants(case)[name], inputs).both)
            except Exception as error:  # a profile explains a result and is not worth one
                kernels[name] = _reason(error)
        verdict["profile"] = kernels[name]


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]


# ---- the process
def work(names: list[str], skip: list[str], gpu: Gpu, emit: Callable[..., None]) -> None:
    """Measures the cases (OP:INDEX) without the variants of skip (OP:VARIANT), and says what it does and finds:
    ("limits", …) before and after all, ("at", case, variant) before whatever may not end, and for each case ("done",
    case, rows, verdicts), ("failed", case, reason), or, after which it ends, ("lost", case, variant, reason)."""
    emit("limits", reached := limits(gpu))
    for name in names:
        op, _, index = name.partition(":")
        case, now = cases(op)[int(index)], TRUTH
        left_out = [one.partition(":")[2] for one in skip if one.startswith(f"{op}:")]

        def at(variant: str, name=name) -> None:
            nonlocal now
            now = variant
            emit("at", name, variant)

        torch.compiler.reset()  # the compiled peers of the case before are not its business
        try:
            rows = measure(case, reached, gpu, skip=left_out, at=at)
            found = verdicts(case, rows)
            profiles(case, found, gpu, at)
            emit("done", name, rows, found)
        except Exception as error:  # of whatever class: it is reported, and time on a GPU goes to the other cases
            if gpu.lost():
                return emit("lost", name, now, _reason(error))
            emit("failed", name, _reason(error))
        gc.collect()
        gpu.clear()
    emit("limits", limits(gpu))


def main(argv: list[str] | None = None, gpu: Gpu | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__.split("\n\n")[0])
    parser.add_argument("cases", nargs="+", metavar="OP:INDEX")
    parser.add_argument("--skip", action="append", default=[], metavar="OP:VARIANT", help="leaves out a variant")
    options = parser.parse_args(argv)
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)  # what peers print is no event

        def emit(*event):
            print(json.dumps(event), file=out, flush=True)

        work(options.cases, options.skip, gpu or Gpu(), emit)


if __name__ == "__main__":
    main()
