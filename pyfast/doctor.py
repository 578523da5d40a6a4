"""What this machine has, which backend each op uses here and why, and how to get what is missing."""

import importlib.util
import platform
import shutil
from importlib import metadata

import torch
from rich.console import Console
from rich.table import Table

from pyfast import dispatch

PACKAGES = {  # package -> what it is for
    "torch": "everything",
    "transformers": "pyfast.patch, fine-tuning",
    "peft": "LoRA",
    "accelerate": "fine-tuning",
    "datasets": "fine-tuning",
    "scikit-learn": "metrics",
    "matplotlib": "loss.png, roc.png",
    "triton": "Triton kernels",
}


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine() -> list[tuple[str, str]]:
    """(what, what was found) for Python, CPU, GPU and tools."""
    rows = [("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    cpu = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    if importlib.util.find_spec("pyfast._info"):
        from pyfast import _info

        cpu += f" ({', '.join(name for name, there in _info.cpu_features().items() if there)})"
        build = _info.build()
        reason = dispatch.unavailable("cpu")
        use = f"not used: {reason}" if reason else f"using {torch.ops.pyfast_cpu.get_isa()}"
        rows.append(("native kernels", f"built by {build['compiler']} against torch {build['torch']}; {use}"))
    else:
        rows.append(("native kernels", "not built: install a C++ compiler (g++), then reinstall pyfast-kernels"))
    rows.append(("CPU", cpu))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(i)
            memory = f"{found.total_memory / 2**30:.0f} GiB, sm_{found.major}{found.minor}"
            rows.append((f"GPU {i}", f"{found.name}, {memory}"))
    else:
        build = "this torch is built without CUDA" if torch.version.cuda is None else "no GPU is visible to torch"
        rows.append(("GPU", f"none: {build}"))
    reason = dispatch.unavailable("cuda")
    try:
        held = f"built for {torch.ops.pyfast_cuda.architectures()}" + (f"; not used: {reason}" if reason else "")
    except NotImplementedError:  # torch's error for an operator without a kernel: the library is not there
        held = f"none: {reason}"
    rows.append(("CUDA kernels", held))
    nvcc = shutil.which("nvcc")
    rows.append(("nvcc", nvcc or "not on PATH (only needed to build the CUDA kernels)"))
    return rows


def backends() -> list[tuple[str, str, str, str]]:
    """(op, device, backend, why) for each device of this machine."""
    rows = []
    for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        tensor = torch.empty(1, device=device)
        for op in sorted(dispatch.TABLE):
            backend, passed_over = dispatch.explain(op, tensor)
            first = next(iter(dispatch.row(op, tensor.device)), "torch")
            why = "; ".join(f"not {name}: {reason}" for name, reason in passed_over)
            why = [why] if why else ["first in the table"] if backend == first else []
            rows.append((op, device, backend, "; ".join(why + small_calls(op, device) * (backend != "torch"))))
    return rows


def small_calls(op: str, device: str) -> list[str]:
    """Which calls PyTorch serves for being small."""
    limits = dispatch.SMALL.get(op, {}).get(device, {})
    of = "multiply-adds" if op in dispatch.MATRIX_OPS else "elements"
    found = ", ".join(f"{size:,} in {str(dtype).removeprefix('torch.')}" for dtype, size in limits.items())
    return [f"torch for calls below {found} {of}"] if found else []


def report() -> None:
    """Print the tables."""
    console = Console()
    table = Table("", "found", title="This machine")
    for row in machine():
        table.add_row(*row)
    for package, purpose in PACKAGES.items():
        found = version(package)
        extra = "" if package == "triton" else ": pip install pyfast-kernels[train]"
        table.add_row(package, found or f"not installed (for {purpose}){extra or ': pip install triton'}")
    console.print(table)
    table = Table("op", "device", "backend", "why", title="Backend of each op")
    for row in backends():
        table.add_row(*row)
    console.print(table)
