"""The ops on a GPU beside their peers, forward and backward, at Llama-3-8B's shapes and those that kernels are usually
compared on. `python -m benchmarks.gpu` runs this and prints it.

Peers are rows of data: a module and a call of it. One that is not installed or fails is named with the reason.
"""

import functools
import importlib
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

import pyfast
from pyfast import ops
from pyfast.ops import LoraWeights

DTYPE = torch.bfloat16
ROUNDS = 3

_LIGER, _UNSLOTH = "liger_kernel.transformers.functional", "unsloth.kernels"
#: op -> peer -> (module, call with that module and the case's inputs)
PEERS: dict[str, dict[str, tuple[str, Callable]]] = {
    "attention": {
        "flash-attn": (
            "flash_attn",
            lambda m, q, k, v: m.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True).transpose(1, 2),
        ),
    },
    "cross_entropy": {
        "liger": (_LIGER, lambda m, x, t: m.liger_cross_entropy(x, t)),
        "quack": ("quack", lambda m, x, t: m.cross_entropy(x, t)),
        "unsloth": (f"{_UNSLOTH}.cross_entropy_loss", lambda m, x, t: m.fast_cross_entropy_loss(x[None], t[None])),
    },
    "linear_cross_entropy": {
        "liger": (_LIGER, lambda m, x, w, t: m.liger_fused_linear_cross_entropy(x, w, t)),
        "cut-cross-entropy": ("cut_cross_entropy", lambda m, x, w, t: m.linear_cross_entropy(x, w, t)),
        "quack": ("quack.linear_cross_entropy", lambda m, x, w, t: m.chunked_linear_cross_entropy(x, w, t)),
    },
    "rms_norm": {
        "liger": (_LIGER, lambda m, x, w: m.liger_rms_norm(x, w, 1e-6, in_place=False)),
        "quack": ("quack", lambda m, x, w: m.rmsnorm(x, w, eps=1e-6)),
        "unsloth": (f"{_UNSLOTH}.rms_layernorm", lambda m, x, w: m.Fast_RMS_Layernorm.apply(x, w, 1e-6, False)),
    },
    "layer_norm": {"liger": (_LIGER, lambda m, x, w, b: m.liger_layer_norm(x, w, b, 1e-6))},
    "rope": {
        "liger": (_LIGER, lambda m, q, k, cos, sin: m.liger_rope(q, k, cos, sin)),
        "unsloth": (f"{_UNSLOTH}.rope_embedding", lambda m, q, k, cos, sin: m.fast_rope_embedding(q, k, cos, sin)),
    },
    "swiglu": {"liger": (_LIGER, lambda m, gate, up: m.liger_swiglu(gate, up))},
    "geglu": {"liger": (_LIGER, lambda m, gate, up: m.liger_geglu(gate, up))},
    "gelu_bias": {},
    "lora_linear": {
        "unsloth": (f"{_UNSLOTH}.fast_lora", lambda m, x, w, a, b: m.LoRA_W.apply(x, w, None, a, b, 2.0)),
    },
    "lora_mlp": {},
}


@dataclass
class Case:
    """One shape of one op. inputs(): fresh tensors on the default device. call: PyFast's op of them. flops, bytes:
    what forward and backward together must do and move, and no more."""

    op: str
    label: str
    inputs: Callable[[], tuple]
    call: Callable
    flops: float = 0.0
    bytes: float = 0.0


def _leaf(*shape, scale=1.0):
    return (torch.randn(shape) * scale).to(DTYPE).requires_grad_()


def _weight(n, k):
    return _leaf(n, k, scale=k**-0.5).detach()


def _attention(batch, heads, kv_heads, length, width):
    def inputs():
        return tuple(
            _leaf(batch, length, h, width).detach().transpose(1, 2).requires_grad_()
            for h in (heads, kv_heads, kv_heads)
        )

    label = f"causal B{batch} H{heads}/{kv_heads} S{length} D{width}"
    flops = 7 * 2 * batch * heads * length * (length + 1) / 2 * width
    return Case("attention", label, inputs, functools.partial(ops.attention, causal=True), flops=flops)


def _cross_entropy(rows, classes):
    size = 2 * rows * classes  # in bytes
    return Case(
        "cross_entropy",
        f"{rows} × {classes}",
        lambda: (_leaf(rows, classes), torch.randint(classes, (rows,))),
        ops.cross_entropy,
        bytes=2 * size,
    )


def _linear_cross_entropy(rows, k, classes):
    return Case(
        "linear_cross_entropy",
        f"{rows} rows, {k} → {classes}, frozen head",
        lambda: (_leaf(rows, k), _weight(classes, k), torch.randint(classes, (rows,))),
        ops.linear_cross_entropy,
        flops=2 * 2 * rows * k * classes,
    )


def _norm(op, rows, width):
    vectors = 1 if op == "rms_norm" else 2
    return Case(
        op,
        f"{rows} × {width}",
        lambda: (_leaf(rows, width), *(_leaf(width) for _ in range(vectors))),
        lambda *args: getattr(ops, op)(*args, 1e-6),
        bytes=5 * 2 * rows * width,
    )


def _rope(batch, heads, kv_heads, length, width):
    def inputs():
        q, k = (_leaf(batch, length, h, width).detach().transpose(1, 2).requires_grad_() for h in (heads, kv_heads))
        angle = torch.rand(1, length, width // 2).repeat(1, 1, 2)
        return q, k, angle.cos().to(DTYPE), angle.sin().to(DTYPE)

    size = 2 * batch * (heads + kv_heads) * length * width
    return Case("rope", f"B{batch} H{heads}/{kv_heads} S{length} D{width}", inputs, ops.rope, bytes=4 * size)


def _gated(op, rows, width):
    call = ops.swiglu if op == "swiglu" else functools.partial(ops.geglu, approximate="tanh")
    inputs = lambda: (_leaf(rows, width), _leaf(rows, width))  # noqa: E731
    return Case(op, f"{rows} × {width}", inputs, call, bytes=8 * 2 * rows * width)


def _gelu_bias(rows, width):
    inputs = lambda: (_leaf(rows, width), _leaf(width))  # noqa: E731
    return Case("gelu_bias", f"{rows} × {width}", inputs, ops.gelu_bias, bytes=5 * 2 * rows * width)


def _projection(n, k, rank):
    return _weight(n, k), _leaf(rank, k, scale=k**-0.5), _leaf(n, rank, scale=rank**-0.5)


def _lora_linear(rows, k, n, rank):
    return Case(
        "lora_linear",
        f"{rows} rows, {k} → {n}, r {rank}",
        lambda: (_leaf(rows, k), *_projection(n, k, rank)),
        lambda x, w, a, b: ops.lora_linear(x, w, a, b, 2.0),
        flops=2 * 2 * rows * k * n,
    )


def _lora_mlp(rows, k, n, rank):
    return Case(
        "lora_mlp",
        f"{rows} rows, {k} → {n}, r {rank}",
        lambda: (_leaf(rows, k), *_projection(n, k, rank), *_projection(n, k, rank), *_projection(k, n, rank)),
        lambda x, *w: ops.lora_mlp(x, *(LoraWeights(*w[i : i + 3], 2.0) for i in (0, 3, 6))),
        flops=3 * 2 * 2 * rows * k * n,
    )


#: op -> (a case of a shape, the shapes); Llama-3-8B's last
CASES: dict[str, tuple[Callable, list[tuple]]] = {
    "attention": (_attention, [(4, 32, 32, 4096, 64), (2, 16, 16, 8192, 128), (2, 32, 8, 4096, 128)]),
    "cross_entropy": (_cross_entropy, [(8192, 32000), (8192, 128256)]),
    "linear_cross_entropy": (_linear_cross_entropy, [(8192, 2048, 32000), (8192, 4096, 128256)]),
    "rms_norm": (functools.partial(_norm, "rms_norm"), [(32768, 1024), (8192, 8192), (8192, 4096)]),
    "layer_norm": (functools.partial(_norm, "layer_norm"), [(32768, 1024), (8192, 4096)]),
    "rope": (_rope, [(8, 32, 32, 2048, 64), (2, 32, 8, 4096, 128)]),
    "swiglu": (functools.partial(_gated, "swiglu"), [(8192, 4096), (8192, 14336)]),
    "geglu": (functools.partial(_gated, "geglu"), [(8192, 14336)]),
    "gelu_bias": (_gelu_bias, [(8192, 4096), (8192, 16384)]),
    "lora_linear": (_lora_linear, [(8192, 4096, 1024, 16), (8192, 4096, 4096, 16), (8192, 4096, 14336, 16)]),
    "lora_mlp": (_lora_mlp, [(8192, 4096, 14336, 16)]),
}


def cases(names: Iterable[str]) -> Iterator[Case]:
    for name in names:
        make, shapes = CASES[name]
        yield from (make(*shape) for shape in shapes)


def variants(case: Case) -> dict[str, Callable]:
    """name -> function of the inputs: PyFast's kernels, PyTorch's own best, and the peers. A peer is imported when it
    is first called."""

    def with_backend(backend):
        def call(*inputs):
            with pyfast.use_backend(backend):
                return case.call(*inputs)

        return call

    def peer(module, call):
        return lambda *inputs: call(importlib.import_module(module), *inputs)

    peers = {name: peer(*row) for name, row in PEERS[case.op].items()}
    return {"pyfast": with_backend("triton"), "torch": with_backend("torch"), **peers}


def run(function: Callable, inputs: tuple) -> list[torch.Tensor]:
    """Results and gradients, for an incoming gradient of ones."""
    outputs = function(*inputs)
    outputs = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
    wanted = [x for x in inputs if x.requires_grad]
    return outputs + list(torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs]))


def difference(results, truth) -> float:
    """The largest relative difference, in norm, of a result or gradient."""
    pairs = [(r.detach().float(), t.detach().float()) for r, t in zip(results, truth, strict=True)]
    return max(float((r - t).norm() / t.norm().clamp_min(1e-30)) for r, t in pairs)


def limits(timer: Callable, size: int = 8192, elements: int = 1 << 28) -> dict[str, float]:
    """What this GPU reaches: TFLOP/s of a bf16 product and GB/s of a copy, bytes read and written."""
    a, b = torch.randn(size, size).to(DTYPE), torch.randn(size, size).to(DTYPE)
    x = torch.empty(elements, dtype=DTYPE)
    y = torch.empty_like(x)
    return {
        "gemm_tflops": round(2 * size**3 / timer(lambda: a @ b) / 1e9, 1),
        "copy_gb_per_s": round(2 * x.nbytes / timer(lambda: y.copy_(x)) / 1e6, 1),
    }


def do_bench(function: Callable) -> float:
    """Median milliseconds, with the L2 cache flushed before each call."""
    from triton.testing import do_bench

    return do_bench(function, warmup=10, rep=50, return_mode="median")


def measure(case: Case, reached: dict[str, float], timer: Callable = do_bench, rounds: int = ROUNDS) -> list[dict]:
    """A row per variant. Each is first held against "torch", with fresh inputs since some peers overwrite theirs; then
    they take turns."""

    def fresh():
        torch.manual_seed(0)
        return case.inputs()

    functions, rows = variants(case), []
    truth = run(functions["torch"], fresh())
    off = difference(run(functions["pyfast"], fresh()), truth)
    if not off <= 3e-2:
        raise AssertionError(f"{case.op} {case.label}: PyFast is off by {off:.1e} from PyTorch")
    for name in PEERS[case.op]:
        # Another project's code is run here, and compiled: what it may raise on a GPU or a shape that it does not serve
        # is of no one class. The row says what it was, and the table goes on without it.
        try:
            off = difference(run(functions[name], fresh()), truth)
            wrong = None if off <= 3e-2 else f"off by {off:.1e}"
        except Exception as error:
            wrong = _reason(error)
        if wrong is not None:
            rows.append({"op": case.op, "case": case.label, "variant": name, "not_run": wrong})
            del functions[name]
    del truth
    taken: dict[str, list[float]] = {name: [] for name in functions}
    inputs = fresh()
    for _ in range(rounds):
        for name, function in functions.items():
            taken[name].append(timer(lambda function=function: run(function, inputs)))
    ours = statistics.median(taken["pyfast"])
    measured = []
    for name, times in taken.items():
        ms = statistics.median(times)
        row = {"op": case.op, "case": case.label, "variant": name, "ms": round(ms, 4)}
        row |= {"min_ms": round(min(times), 4), "max_ms": round(max(times), 4), "pyfast_speedup": round(ms / ours, 3)}
        if case.flops:
            row["tflops"] = round(case.flops / ms / 1e9, 1)
            row["of_gemm"] = round(row["tflops"] / reached["gemm_tflops"], 3)
        if case.bytes:
            row["gb_per_s"] = round(case.bytes / ms / 1e6, 1)
            row["of_copy"] = round(row["gb_per_s"] / reached["copy_gb_per_s"], 3)
        measured.append(row)
    return measured + rows


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]
