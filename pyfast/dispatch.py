"""The only place where a backend is chosen.

`TABLE` gives, per op and device type, the backends in order of preference; the first that can serve the call is taken.
The order is set by measurements (benchmarks/NOTES.md), on GPUs of each architecture by itself (`pyfast tune`). `SMALL`
gives the calls that are so small that PyTorch serves them faster. `use_backend` overrides both, and raises where the
backend named cannot serve the call: it never falls through to another one.
"""

import contextlib
import importlib.util
import json
import os
from pathlib import Path

import torch

from pyfast import emulator

#: the Triton kernels also serve CPU tensors, in the interpreter, where this was set before pyfast was imported
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

#: backend -> (namespace of its kernels in torch.ops, device types that it serves); None: plain PyTorch, any device
#: (ROCm's device type is "cuda" too)
BACKENDS = {
    "cpu": ("pyfast_cpu", ("cpu",)),
    "triton": ("pyfast_triton", ("cuda", "cpu") if INTERPRETING else ("cuda",)),
    "cuda": ("pyfast_cuda", ("cuda",)),
    "emulator": ("pyfast_emu", ("cpu",)),  # the CUDA kernels' own source, for tests: in no row of TABLE
    "torch": (None, None),
    "reference": (None, None),
}

#: dtypes that the native kernels are written for
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: op -> device type, or architecture of a GPU -> backends, best first. A device type that is not listed gets "torch". A
#: backend that stands in one of an op's rows has kernels for it: use_backend may ask for them on every device type that
#: the backend serves, and for the emulator where "cuda" does.
#: On a GPU torch stands first until the others were run and measured on its architecture: kernels/backends_*.json.
TABLE: dict[str, dict[str, tuple[str, ...]]] = {
    "attention": {"cpu": ("cpu", "torch"), "cuda": ("torch", "triton", "cuda")},
    "attention_varlen": {"cpu": ("cpu", "torch"), "cuda": ("torch", "triton", "cuda")},
    "cross_entropy": {"cpu": ("cpu", "torch"), "cuda": ("torch", "triton", "cuda")},
    "linear_cross_entropy": {"cpu": ("cpu", "torch"), "cuda": ("torch", "triton", "cuda")},
    "swiglu": {"cpu": ("cpu", "torch"), "cuda": ("torch", "triton")},
    "geglu": {"cpu": ("cpu", "torch"), "cuda": ("torch", "triton")},
    "gelu_bias": {"cpu": ("cpu", "torch"), "cuda": ("torch", "triton")},
    "rms_norm": {"cpu": ("cpu", "torch"), "cuda": ("torch", "triton")},
    "layer_norm": {"cpu": ("cpu", "torch"), "cuda": ("torch", "triton")},
    "rope": {"cpu": ("cpu", "torch"), "cuda": ("torch", "triton")},
    "lora_linear": {"cpu": ("cpu", "torch"), "cuda": ("torch", "triton", "cuda")},
    "lora_linears": {"cpu": ("cpu", "torch"), "cuda": ("torch", "triton", "cuda")},
    "lora_mlp": {"cpu": ("cpu", "torch"), "cuda": ("torch", "triton", "cuda")},
    "dropout": {"cpu": ("cpu", "torch"), "cuda": ("torch", "triton")},
}

#: the architectures that have rows of their own
MEASURED: set[str] = set()
for _file in (Path(__file__).parent / "kernels").glob("backends_*.json"):
    MEASURED.add(_architecture := _file.stem.removeprefix("backends_"))
    for _op, _backends in json.loads(_file.read_text())["backends"].items():
        TABLE[_op][_architecture] = tuple(_backends)

#: op -> device type -> dtype -> the size of a call below which "torch" serves it: there, what surrounds a kernel
#: (checks, a node of autograd in Python, threads to wake) costs more than the kernel gains over PyTorch's operators.
#: Sizes are elements of the input (of a loss, the logits), or of MATRIX_OPS multiply-adds of the forward. An op asks
#: only for calls whose options PyTorch's operators serve with the same meaning, and never while torch.compile traces:
#: in a compiled graph nothing surrounds a kernel. Measured on 4 cores with AMX (benchmarks/NOTES.md, "Small calls").
SMALL: dict[str, dict[str, dict[torch.dtype, int]]] = {
    "swiglu": {"cpu": {torch.float32: 16_000}},
    "layer_norm": {"cpu": {torch.float32: 400_000, torch.bfloat16: 100_000}},  # without residual
    "cross_entropy": {"cpu": {torch.float32: 300_000, torch.bfloat16: 200_000}},
    "linear_cross_entropy": {"cpu": {torch.float32: 20_000_000, torch.bfloat16: 20_000_000}},
    "lora_linear": {"cpu": {torch.float32: 40_000_000}},
    "attention": {"cpu": {torch.float32: 300_000, torch.bfloat16: 1_000_000}},  # one query, no gradient
}

#: ops that multiply matrices
MATRIX_OPS = ("attention", "attention_varlen", "linear_cross_entropy", "lora_linear", "lora_linears", "lora_mlp")

_overrides: dict[str | None, str] = {}

_architectures: dict[torch.device, str] = {}


def load_library(name: str, what: str, how: str) -> str | None:
    """Loads a native library, `what`; returns why it cannot be used (`how`: what to do if it is missing), or None."""
    path = next(Path(__file__).parent.glob(f"{name}.*so"), None)
    if path is None:
        return f"{what} was not built ({how} and reinstall pyfast-kernels)"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{what} does not load: {error}"
    return None


def _load_native() -> str | None:
    """Loads the native CPU library; returns why it cannot be used, or None."""
    reason = load_library("_cpu", "the native CPU library", "install a C++ compiler")
    if reason is None and torch.ops.pyfast_cpu.get_isa() == "none":
        return "this CPU has no AVX2"
    return reason


def _load_cuda() -> str | None:
    """Loads the CUDA C++ kernels; returns why they cannot be used, or None."""
    reason = load_library("_cuda", "the CUDA library", "install nvcc, or the extra cuda-build,")
    if reason is None and not torch.version.cuda:
        return "this PyTorch has no CUDA"
    return reason


def _load_emulator() -> str | None:
    """Loads the CUDA C++ kernels for the CPU; returns why they cannot be used, or None."""
    return load_library("_emu", "the emulator of CUDA kernels", "install a C++ compiler, clone the repository")


def _load_triton(library: torch.library.Library) -> str | None:
    """Registers the Triton kernels in `library`; returns why they cannot be used, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'pyfast-kernels[triton]'; PyTorch for CUDA brings its own)"
    if not (INTERPRETING or torch.version.cuda or torch.version.hip):
        return (
            "this PyTorch has no CUDA or ROCm (TRITON_INTERPRET=1, set before pyfast is imported, runs it on the CPU)"
        )
    if INTERPRETING:
        from pyfast import triton_interpreter

        triton_interpreter.install()
    from pyfast.kernels import launch

    for name, launcher in launch.launchers().items():
        for device in BACKENDS["triton"][1]:
            library.impl(name, launcher, device.upper())
    return None


def unavailable(backend: str) -> str | None:
    """Why `backend` cannot be used on this machine, or None."""
    return _UNAVAILABLE.get(backend)


def refusal(backend: str, op: str, tensor: torch.Tensor) -> str | None:
    """Why `backend` cannot serve `op` on a tensor of this device and dtype, or None."""
    if backend not in BACKENDS:
        return f"there is no such backend (choose from {', '.join(BACKENDS)})"
    if backend in _UNAVAILABLE:
        return _UNAVAILABLE[backend]
    namespace, devices = BACKENDS[backend]
    if namespace is None:
        return None
    device = tensor.device.type
    if device not in devices:
        return f"it serves {' and '.join(devices)} tensors, not {device}"
    listed = "cuda" if backend == "emulator" else backend
    if not any(listed in backends for backends in TABLE[op].values()):
        return "it has no kernel for this op"
    if tensor.dtype not in KERNEL_DTYPES:
        return f"its kernels serve float32, bfloat16 and float16, not {str(tensor.dtype).removeprefix('torch.')}"
    nvidia = device == "cuda" and not torch.version.hip
    if nvidia and torch.cuda.get_device_capability(tensor.device) < (8, 0):
        if backend == "cuda":
            return "its kernels need a GPU of compute capability 8.0 or later"
        if tensor.dtype == torch.bfloat16:
            return "this GPU has no bfloat16 (compute capability 8.0 or later has): use float16"
        if op in MATRIX_OPS:
            return "Triton uses the tensor cores of compute capability 8.0 and later only"
    return None


def architecture(device: torch.device) -> str:
    """Of a GPU, as tables name it: "sm_90", "gfx942"."""
    if device not in _architectures:
        found = torch.cuda.get_device_properties(device)
        name = found.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{found.major}{found.minor}"
        _architectures[device] = name
    return _architectures[device]


def row(op: str, device: torch.device) -> tuple[str, ...]:
    """The backends of an op on a device, best first."""
    rows = TABLE[op]
    if MEASURED and device.type == "cuda" and architecture(device) in rows:
        return rows[architecture(device)]
    return rows.get(device.type, ())


def choose(op: str, tensor: torch.Tensor, size: int | None = None) -> str:
    """The backend for one call of `op`, decided by the device and dtype of its main tensor.

    size: the call's size in the unit of `SMALL`, where "torch" may serve it if it is small; None where it may not.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"pyfast.ops.{op} cannot run under torch.func transforms (vmap, grad, jvp): call it on the batched tensor"
            " itself, or choose the PyTorch implementation with pyfast.use_backend('torch') outside the transform"
        )
    if _overrides:
        forced = _overrides.get(op, _overrides.get(None))
        if forced is not None:
            reason = refusal(forced, op, tensor)
            if reason is not None:
                raise ValueError(f"pyfast.ops.{op}: backend {forced!r} was asked for, but {reason}")
            return forced
    if size is not None and not compiling and size < small_below(op, tensor.device.type, tensor.dtype):
        return "torch"
    for backend in row(op, tensor.device):
        if refusal(backend, op, tensor) is None:
            return backend
    return "torch"


def small_below(op: str, device: str, dtype: torch.dtype) -> int:
    """The size below which "torch" serves a call of `op`; 0 where it never does for being small."""
    return SMALL.get(op, {}).get(device, {}).get(dtype, 0)


def explain(op: str, tensor: torch.Tensor) -> tuple[str, list[tuple[str, str]]]:
    """The backend that `choose` takes for calls that are not small, and (backend, reason) for each better one that it
    passed over."""
    passed_over = []
    for backend in row(op, tensor.device):
        reason = refusal(backend, op, tensor)
        if reason is None:
            break
        passed_over.append((backend, reason))
    return choose(op, tensor), passed_over


def kernels(backend: str):
    """The namespace in torch.ops that holds a backend's kernels."""
    return getattr(torch.ops, BACKENDS[backend][0])


@contextlib.contextmanager
def use_backend(backend: str, op: str | None = None, arch: str | None = None):
    """Serves `op` (or every op) with one backend inside the `with` block, in the whole process.

    backend: "cpu", "triton", "cuda" (CUDA C++), "torch" (PyTorch's own best), "reference" (the plain truth, slow) or,
        in a checkout, "emulator" (the CUDA kernels' own source on CPU tensors, very slow: for tests).
    arch: for "cpu", the instruction set: "avx2", "avx512" or "amx"; the CPU's best without it. For "emulator", the GPU
        whose kernels run: "sm_80" or "sm_90a"; "sm_80" without it.
    A call that the backend cannot serve raises a ValueError that says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"there is no backend {backend!r}: choose from {', '.join(BACKENDS)}")
    if op is not None and op not in TABLE:
        raise ValueError(f"there is no op {op!r}: choose from {', '.join(TABLE)}")
    if backend in _UNAVAILABLE:
        raise ValueError(f"backend {backend!r} cannot be used: {_UNAVAILABLE[backend]}")
    if arch is not None and backend not in ("cpu", "emulator"):
        raise ValueError(f"backend {backend!r} has no arch to choose: arch is for 'cpu' and 'emulator'")
    before = dict(_overrides)
    architecture = contextlib.nullcontext()
    if arch is not None:
        architecture = _isa(arch) if backend == "cpu" else emulator.emulating(arch=arch)
    with architecture:
        _overrides[op] = backend
        try:
            yield
        finally:
            _overrides.clear()
            _overrides.update(before)


@contextlib.contextmanager
def _isa(name: str):
    """The native kernels run with this instruction set inside the `with` block."""
    before = torch.ops.pyfast_cpu.get_isa()
    try:
        torch.ops.pyfast_cpu.set_isa(name)
    except RuntimeError as error:
        raise ValueError(f"arch {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    try:
        yield
    finally:
        torch.ops.pyfast_cpu.set_isa(before)


_UNAVAILABLE: dict[str, str] = {}
