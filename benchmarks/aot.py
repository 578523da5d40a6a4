"""Compiles every Triton kernel, with every tile of its table, for GPUs that need not be here, and tabulates what each
takes: registers, spills, shared memory, tensor-core instructions, and a static estimate of occupancy.

    python -m benchmarks.aot [--target sm_90 ...] [--kernel NAME ...] [--write]

Without --write it prints; with it, it writes benchmarks/results/aot/<target>.csv, and estimate.csv: the FLOPs and bytes
of each kernel's main path, and the time that the rates seen on one H100 allow it at best. It runs the launchers
themselves, on meta tensors (benchmarks/launches.py), so that what is compiled is what a launch would compile.
"""

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton
from torch.utils._pytree import tree_map_only
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import MockTensor

from pyfast.kernels import launch

from .launches import CASES, MATRIX, classes

#: name -> (target, dtype of the inputs, shared memory per program in bytes, registers per SM, threads per SM)
TARGETS = {
    "sm_75": (GPUTarget("cuda", 75, 32), torch.float16, 64 * 1024, 65536, 1024),
    "sm_80": (GPUTarget("cuda", 80, 32), torch.bfloat16, 163 * 1024, 65536, 2048),
    "sm_90": (GPUTarget("cuda", 90, 32), torch.bfloat16, 227 * 1024, 65536, 2048),
    "sm_100": (GPUTarget("cuda", 100, 32), torch.bfloat16, 227 * 1024, 65536, 2048),
    "gfx942": (GPUTarget("hip", "gfx942", 64), torch.bfloat16, 64 * 1024, 131072, 2048),
}
#: the shared memory that a tile may take where it is less than the target's: sm_86 and sm_89 run sm_80's tiles
MOST_SHARED = {"sm_80": 99 * 1024}
#: what a kernel that multiplies matrices must contain
TENSOR_CORE = {"sm_75": "HMMA", "sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
#: what one H100 was seen to reach: FLOP/s of a bf16 product, bytes/s of a copy
CEILINGS = {"flops": 798e12, "bytes": 3.0e12}
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


def compile_launch(target: GPUTarget, architecture: str, kernel_name: str, call, size: int, dtype):
    """The first launch of a kernel that a call of CASES would make on that GPU: (compiled kernel, its constants). It
    lies in Triton's cache then, where the launch itself would look for it."""
    driver.set_active(_Driver(target))
    launch.architecture = lambda device: architecture
    found = []

    def compile_instead(kernel, programs, *arguments, **constants):
        if kernel.__name__ != kernel_name.split()[0] or found:
            return
        kernel.device_caches.clear()  # the target is another than the last one's
        signature = tree_map_only(torch.Tensor, lambda t: MockTensor(t.dtype), arguments)
        found.append((kernel.warmup(*signature, grid=(1,), **constants, enable_fp_fusion=True), constants))

    launch.run = compile_instead
    with torch.device("meta"):
        call(size, dtype)
    return found[0]


def compile_row(job: tuple[str, str, str, int]) -> dict:
    """The table's row of one (target, kernel, variant, problem size)."""
    name, kernel_name, variant, size = job
    largest, variants, _ = CASES[kernel_name]
    target, dtype, _, registers_per_sm, threads_per_sm = TARGETS[name]
    compiled, constants = compile_launch(target, name, kernel_name, variants[variant], size, dtype)
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
    return row


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
            main, (first, *others) = CASES[kernel].size, CASES[kernel].calls
            for _, size in classes(kernel, target):
                variants = (first, *others) if size == main else (first,)
                found += [(target, kernel, variant, size) for variant in variants]
    return found


def estimates(kernels) -> list[dict]:
    """Per kernel and size of its table: the work of the main path, and the time that CEILINGS allow it at best."""
    found = []
    for kernel in kernels:
        case = CASES[kernel]
        for _, size in classes(kernel, "sm_90"):
            flops, moved = case.work(size)
            times = {"compute": flops / CEILINGS["flops"], "memory": moved / CEILINGS["bytes"]}
            bound = max(times, key=times.get)
            row = {"kernel": kernel, "variant": next(iter(case.calls)), "size": size}
            row |= {"gflop": round(flops / 1e9, 2), "mbyte": round(moved / 1e6, 2), "bound": bound}
            found.append(row | {"h100_us": round(times[bound] * 1e6, 1)})
    return found


def problems(target: str, row: dict) -> list[str]:
    """Why a row must not be: a spill on the main path, too much shared memory, or no tensor cores."""
    where = f"{row['kernel']} {row['variant']} ({row['tile']}) on {target}"
    found = []
    if row["spilled_bytes"] and row["main_path"]:
        found.append(f"{where} spills {row['spilled_bytes']} bytes")
    most = MOST_SHARED.get(target, TARGETS[target][2])
    if row["shared_bytes"] > most:
        found.append(f"{where} needs {row['shared_bytes']} bytes of shared memory, it may take {most}")
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
    for name, rows in {**tables, "estimate": estimates(options.kernel)}.items():
        if options.write:
            RESULTS.mkdir(parents=True, exist_ok=True)
            file = (RESULTS / f"{name}.csv").open("w", newline="")
        else:
            print(f"# {name}")
            file = sys.stdout
        writer = csv.DictWriter(file, rows[0] if rows else FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for target, rows in tables.items():
        wrong += [problem for row in rows for problem in problems(target, row)]
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
