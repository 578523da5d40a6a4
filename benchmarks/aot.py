"""Compiles every Triton kernel, with every tile of its table, for GPUs that need not be here, and tabulates what each
takes: registers, spills, shared memory, tensor-core instructions, and a static estimate of occupancy.

    python -m benchmarks.aot [--target sm_90 ...] [--kernel NAME ...] [--write]

Without --write it prints; with it, it writes benchmarks/results/aot/<target>.csv. It runs the launchers themselves, on
meta tensors of the shapes in CASES, so that what is compiled is what a launch would compile.
"""

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from pyfast.kernels import launch
from pyfast.kernels.tiles import TILES

#: name -> (target, dtype of the inputs, shared memory per program in bytes, registers per SM, threads per SM)
TARGETS = {
    "sm_75": (GPUTarget("cuda", 75, 32), torch.float16, 64 * 1024, 65536, 1024),
    "sm_80": (GPUTarget("cuda", 80, 32), torch.bfloat16, 163 * 1024, 65536, 2048),
    "sm_90": (GPUTarget("cuda", 90, 32), torch.bfloat16, 227 * 1024, 65536, 2048),
    "sm_100": (GPUTarget("cuda", 100, 32), torch.bfloat16, 227 * 1024, 65536, 2048),
    "gfx942": (GPUTarget("hip", "gfx942", 64), torch.bfloat16, 64 * 1024, 131072, 2048),
}
#: what a kernel that multiplies matrices must contain
TENSOR_CORE = {"sm_75": "HMMA", "sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
RESULTS = Path(__file__).parent / "results" / "aot"
FIELDS = [
    "kernel",
    "variant",
    "tile",
    "dtype",
    "main_path",
    "registers",
    "spilled_bytes",
    "shared_bytes",
    "tensor_core",
    "occupancy",
]


def _meta(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def _fp32(*shape):
    return _meta(*shape, dtype=torch.float32)


# ---- kernel -> (largest problem size of the main path, name of a variant -> a call of its launcher for a size and a
# dtype); the first variant is the main path
def _gated(n, dtype):
    launch.launchers()["gated"](*(_meta(4096, 2 * n, dtype=dtype)[:, :n] for _ in range(2)), "silu")


def _gated_backward(n, dtype):
    views = (_meta(4096, 2 * n, dtype=dtype)[:, :n] for _ in range(3))
    launch.launchers()["gated_backward"](*views, "silu")


def _activate(n, dtype):
    launch.launchers()["activate"](_meta(4096, n, dtype=dtype), _meta(n, dtype=dtype), "gelu")


def _activate_backward(n, dtype):
    x = _meta(4096, n, dtype=dtype)
    launch.launchers()["activate_backward"](x, x, _meta(n, dtype=dtype), "gelu", True)


def _cross_entropy(n, dtype):
    upstream, target = _meta(4096, 2, dtype=torch.float64), _meta(4096, dtype=torch.int64)
    launch.launchers()["cross_entropy"](_meta(4096, n, dtype=dtype), target, _fp32(n), upstream, -100, 0.1, 30.0)


def _norm(n, dtype):
    x, w = _meta(4096, n, dtype=dtype), _meta(n, dtype=dtype)
    launch.launchers()["norm"](x, w, w, x, 1e-5, 0.0, True)


def _norm_backward(n, dtype):
    x, w, one = _meta(4096, n, dtype=dtype), _meta(n, dtype=dtype), _fp32(4096)
    launch.launchers()["norm_backward"](x, x, x, one, one, w, w, 0.0, True, True, True)


def _rope(n, dtype):
    angles = _meta(1, 2048, n, dtype=dtype)
    launch.launchers()["rope"](_meta(4, 2048, 32, n, dtype=dtype).transpose(1, 2), angles, angles, False, False)


def _attention(dim, dtype, packed=False, everything=False, backward=False):
    """Llama-3's heads, causal; packed with a window, as long-context models train; and every option at once."""
    batch, heads, kv_heads, rows = 2, 32, 8, 4096
    if packed:
        q, out, dout = (_meta(batch * rows, heads, dim, dtype=dtype) for _ in range(3))
        k, v = (_meta(batch * rows, kv_heads, dim, dtype=dtype) for _ in range(2))
        sums = _fp32(heads, batch * rows)
    else:
        q, out, dout = (_meta(batch, rows, heads, dim, dtype=dtype).transpose(1, 2) for _ in range(3))
        k, v = (_meta(batch, rows, kv_heads, dim, dtype=dtype).transpose(1, 2) for _ in range(2))
        sums = _fp32(batch, heads, rows)
    cu_seqlens = _meta(9, dtype=torch.int32) if packed else None
    extra = [None, None, None, None, cu_seqlens, cu_seqlens]
    options = [rows, dim**-0.5, 0.0, 1024 if packed else -1, 0, 0.0]
    if everything:
        bias, seed = _meta(batch, 1, rows, rows, dtype=dtype), _meta(dtype=torch.int64)
        extra = [_fp32(heads), _meta(batch, rows, dtype=torch.bool), bias, seed, None, None]
        options = [rows, dim**-0.5, 30.0, 1024, 0, 0.1]
    if backward:
        dlse = sums if everything else None
        launch.launchers()["attention_backward"](dout, dlse, q, k, v, out, sums, sums, *extra, *options, everything)
    else:
        launch.launchers()["attention"](q, k, v, *extra, *options)


def _matmul(n, dtype, dx=False):
    """A projection of 4096 columns with its adapter in the epilogue; with dx, its gradient with dropout replayed."""
    from pyfast.kernels.lora import matmul

    x, weight, seed = _meta(8192, 4096, dtype=dtype), _meta(n, 4096, dtype=dtype), _meta(dtype=torch.int64)
    adapter = (_fp32(8192, 16), _meta(n, 16, dtype=dtype).T, 2.0)
    if dx:
        adapter = (_fp32(8192, 16), _meta(16, n, dtype=dtype), 2.0)
        matmul(x, _meta(4096, n, dtype=dtype), dtype, adapter=adapter, dropout=(seed, 0.1, (n, 1)))
    else:
        matmul(x, weight.T, dtype, adapter=adapter)


def _matmul_down(n, dtype):
    """x lora_Aᵀ with dropout."""
    from pyfast.kernels.lora import matmul

    dropout = (_meta(dtype=torch.int64), 0.1, (4096, 1))
    matmul(_meta(8192, 4096, dtype=dtype), _meta(n, 4096, dtype=dtype).T, dtype, dropout=dropout, drop_a=True)


def _dequantize(n, dtype):
    codes = _meta(4096 * n // 2, 1, dtype=torch.uint8)
    launch.launchers()["dequantize"](codes, _fp32(64 * n), [0.0] * 16, 1, 4096 * n, 1, 64, dtype)


_ATTENTION = {"causal": {}, "packed window": {"packed": True}, "everything": {"everything": True}}
_FORWARD = {name: partial(_attention, **options) for name, options in _ATTENTION.items()}
_BACKWARD = {name: partial(_attention, **options, backward=True) for name, options in _ATTENTION.items()}

CASES = {
    "gated_kernel": (14336, {"": _gated}),
    "gated_backward_kernel": (14336, {"": _gated_backward}),
    "activate_kernel": (16384, {"": _activate}),
    "activate_backward_kernel": (16384, {"": _activate_backward}),
    "cross_entropy_kernel": (128256, {"": _cross_entropy}),
    "norm_kernel": (8192, {"": _norm}),
    "norm_backward_kernel": (8192, {"": _norm_backward}),
    "rope_kernel": (128, {"": _rope}),
    "dequantize_kernel": (4096, {"": _dequantize}),
    "matmul_kernel": (
        4096,
        {"y": _matmul, "dx with dropout": partial(_matmul, dx=True), "h with dropout": _matmul_down},
    ),
    "attention_kernel": (128, _FORWARD),
    "attention_dq_kernel": (128, _BACKWARD),
    "attention_dkv_kernel": (128, _BACKWARD),
}
#: kernels that multiply matrices
MATRIX = {"matmul_kernel", "attention_kernel", "attention_dq_kernel", "attention_dkv_kernel"}


class _Driver:
    """What the compiler asks of a driver, for a GPU that is not here."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def is_active(self):
        return True


def compile_row(job: tuple[str, str, str, int]) -> dict:
    """The table's row of one (target, kernel, variant, problem size)."""
    name, kernel_name, variant, size = job
    largest, variants = CASES[kernel_name]
    target, dtype, _, registers_per_sm, threads_per_sm = TARGETS[name]
    driver.set_active(_Driver(target))
    launch.architecture = lambda device: name
    rows = []

    def compile_instead(kernel, programs, *arguments, **constants):
        if kernel.__name__ != kernel_name:
            return
        kernel.device_caches.clear()  # the target is another than the last one's
        signature = [a.dtype if isinstance(a, torch.Tensor) else a for a in arguments]
        compiled = kernel.warmup(*signature, grid=(1,), **constants, enable_fp_fusion=True)
        row = {
            "kernel": kernel_name,
            "variant": variant,
            "tile": _describe(constants),
            "dtype": str(dtype).removeprefix("torch."),
        }
        row["main_path"] = int(size <= largest and variant == next(iter(variants)))
        row |= _resources(compiled, name)
        threads = compiled.metadata.num_warps * target.warp_size
        limits = [threads_per_sm // threads, registers_per_sm // max(1, row["registers"] * threads)]
        if row["shared_bytes"]:
            limits.append(TARGETS[name][2] // row["shared_bytes"])
        row["occupancy"] = round(min(1.0, min(limits) * threads / threads_per_sm), 2)
        rows.append(row)

    launch.run = compile_instead
    variants[variant](size, dtype)
    return rows[0]


def _describe(constants: dict) -> str:
    return " ".join(f"{k}={v}" for k, v in constants.items() if type(v) is int)


def _resources(compiled, target: str) -> dict:
    """Registers per thread, spilled bytes, shared memory and tensor-core instructions of a compiled kernel."""
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]

        def field(key):
            return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])

        spilled = 4 * (field("vgpr_spill_count"))
        registers = field("vgpr_count")
    else:
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
            text = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
        registers, stack, local = map(
            int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout + usage.stderr).groups()
        )
        spilled = stack + local
    tensor_core = len(re.findall(rf"\b{TENSOR_CORE[target]}", text))
    return {"registers": registers, "spilled_bytes": spilled, "shared_bytes": shared, "tensor_core": tensor_core}


def jobs(targets, kernels) -> list[tuple[str, str, str, int]]:
    """(target, kernel, variant, size) for every row of the tile tables."""
    found = []
    for target in targets:
        for kernel in kernels:
            if target == "sm_75" and kernel in MATRIX:
                continue  # Triton has no tensor cores there: dispatch leaves these ops to PyTorch
            table, largest = TILES[kernel], 0
            for limit, _ in table.get(target, table["default"]):
                largest = limit or max(2 * largest, CASES[kernel][0])
                size, (first, *others) = CASES[kernel][0], CASES[kernel][1]
                found += [
                    (target, kernel, variant, largest) for variant in (first, *(others if largest == size else ()))
                ]
    return found


def problems(target: str, row: dict) -> list[str]:
    """Why a row must not be: a spill on the main path, too much shared memory, or no tensor cores."""
    where = f"{row['kernel']} {row['variant']} ({row['tile']}) on {target}"
    found = []
    if row["spilled_bytes"] and row["main_path"]:
        found.append(f"{where} spills {row['spilled_bytes']} bytes")
    if row["shared_bytes"] > TARGETS[target][2]:
        found.append(f"{where} needs {row['shared_bytes']} bytes of shared memory, the GPU has {TARGETS[target][2]}")
    if row["kernel"] in MATRIX and not row["tensor_core"]:
        found.append(f"{where} has no {TENSOR_CORE[target]}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--kernel", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/aot/<target>.csv")
    options = parser.parse_args()
    work = jobs(options.target, options.kernel)
    tables: dict[str, list[dict]] = {target: [] for target in options.target}
    with ProcessPoolExecutor(2) as pool:
        for (target, *_), row in zip(work, pool.map(compile_row, work), strict=True):
            tables[target].append(row)
    wrong = []
    for target, rows in tables.items():
        if options.write:
            RESULTS.mkdir(parents=True, exist_ok=True)
            file = (RESULTS / f"{target}.csv").open("w", newline="")
        else:
            print(f"# {target}")
            file = sys.stdout
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        wrong += [problem for row in rows for problem in problems(target, row)]
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
