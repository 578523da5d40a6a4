"""Times the tiles of the Triton kernels on this GPU, then the backends of every op, and writes the best of both as the
tables of its architecture.

    pyfast tune [KERNEL ... | backends] [--minutes 10] [--folder kernels]

For each shape class of a kernel's table (kernels/tiles.py) every tile of SPACE is compared with the one in use: one
that spills registers, does not fit the GPU or gives another result is passed over, the fastest is kept. The table goes
to FOLDER/tiles_<architecture>.json after each kernel, which kernels/tiles.py reads; kernels that are not named, or that
no time was left for, keep their rows. Then Triton's kernels, those in CUDA C++ and PyTorch's own are compared on the
cases of benchmarks/cuda.py, and what is right and fastest goes to FOLDER/backends_<architecture>.json, from which
dispatch chooses (benchmarks/backends.py). All 1,800 tiles should take about 8 minutes with 16 cores, which compile them
ahead, the backends BACKENDS_MINUTES: both were counted, not measured. It is meant for a GPU that nothing else uses;
training never tunes.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import torch

from pyfast import dispatch

from . import backends, cuda, gpu

BACKENDS, BACKENDS_MINUTES = "backends", 2.0
_BLOCKS = {"BLOCK": [512, 1024, 2048, 4096, 8192], "num_warps": [4, 8, 16]}
_TILE = {"num_warps": [4, 8], "num_stages": [1, 2, 3, 4]}
#: kernel -> option -> values; the tiles tried are all combinations. What the bars of benchmarks/cuda.py need first
SPACE: dict[str, dict[str, list[int]]] = {
    "rope_kernel": {"ROWS": [8, 16, 32, 64, 128], "num_warps": [2, 4, 8]},
    "gated_kernel": {"ROWS": [1], **_BLOCKS},
    "gated_backward_kernel": {"ROWS": [1], **_BLOCKS},
    "cross_entropy_kernel": {"BLOCK": [1024, 2048, 4096, 8192, 16384], "num_warps": [4, 8, 16, 32]},
    "norm_kernel": {"ROWS": [1, 2, 4, 8], "num_warps": [2, 4, 8, 16, 32]},
    "logits_gradient_kernel": _BLOCKS,
    "exponentials_kernel": {
        "BLOCK_M": [64, 128],
        "BLOCK_N": [64, 128, 256],
        "BLOCK_K": [32, 64],
        "num_warps": [4, 8],
        "num_stages": [2, 3, 4],
    },
    "attention_kernel": {"BLOCK_M": [64, 128], "BLOCK_N": [32, 64, 128], **_TILE},
    "attention_dq_kernel": {"BLOCK_M": [64, 128], "BLOCK_N": [16, 32, 64, 128], **_TILE},
    "attention_dkv_kernel": {"BLOCK_M": [16, 32, 64, 128], "BLOCK_N": [64, 128], **_TILE},
    "matmul_kernel": {
        "BLOCK_M": [64, 128],
        "BLOCK_N": [16, 64, 128, 256],  # 16 and 64: where the product has no more columns
        "BLOCK_K": [32, 64, 128],
        "GROUP": [8],
        "SPLITS": [4, 16],
        "num_warps": [4, 8],
        "num_stages": [2, 3, 4],
    },
    "norm_backward_kernel": {"ROWS": [1, 2, 4, 8], "PROGRAMS": [264, 512, 1024], "num_warps": [2, 4, 8, 16, 32]},
    "adapter_gradients_kernel": {"BLOCK_M": [64, 128, 256], "BLOCK_N": [32, 64, 128], "SPLITS": [4, 8], **_TILE},
    "activate_kernel": {"ROWS": [1, 4], **_BLOCKS},
    "activate_backward_kernel": {"ROWS": [16, 32, 64], "BLOCK": [64, 128, 256], "num_warps": [4, 8]},
    "dropout_kernel": _BLOCKS,
    "dequantize_kernel": _BLOCKS,
    "attention_dbias_kernel": {"BLOCK_M": [32, 64, 128], "BLOCK_N": [16, 32, 64], **_TILE},
}
SPACE["matmul_kernel with dropout"] = SPACE["matmul_kernel"]
#: threads in a program, elements of a tile that its kernel holds at a time, and those of a thread, which has 255
#: registers: more of any is not tried. What spills takes longest to compile.
MOST_THREADS, MOST_ELEMENTS, MOST_PER_THREAD = 1024, 64 * 1024, 128
#: the share of the time in use that a tile must save to replace it: less is noise
WORTH = 0.02


def candidates(kernel: str, size: int, warp_size: int) -> list[dict[str, int]]:
    """The tiles of a kernel worth timing for a problem of `size`."""
    space = SPACE[kernel]
    found = []
    for values in itertools.product(*space.values()):
        tile = dict(zip(space, values, strict=True))
        width = tile.get("BLOCK", size if "BLOCK_M" not in tile else 1)  # without a block, a program holds whole rows
        elements = tile.get("ROWS", 1) * width * tile.get("BLOCK_M", 1) * tile.get("BLOCK_N", 1)
        threads = tile["num_warps"] * warp_size
        if threads > MOST_THREADS or elements > min(MOST_ELEMENTS, MOST_PER_THREAD * threads):
            continue
        if kernel.startswith("matmul_kernel"):
            narrow = size <= 64  # one tile wide, and its sums over rows are split
            wanted = [size] if narrow else [n for n in space["BLOCK_N"] if n >= 64]
            if tile["BLOCK_N"] not in wanted or (tile["SPLITS"] == 16) != narrow:
                continue
        found.append(tile)
    return found


def search(
    kernel: str,
    architecture: str,
    warp_size: int,
    measure: Callable[[int, dict | None], float],
    deadline: float = math.inf,
) -> list[dict]:
    """The rows of a kernel's table: {up_to, tile, ms, before_ms}. measure(size, tile): milliseconds, infinite for a
    tile that must not be used; tile None is the one in use. After `deadline` (of time.monotonic) the best so far."""
    from pyfast.kernels.tiles import TILES

    from .launches import classes

    in_use = TILES[kernel].get(architecture, TILES[kernel]["default"])
    rows: list[dict] = []
    for (limit, tile), (_, size) in zip(in_use, classes(kernel, architecture), strict=True):
        before = best = measure(size, None)
        for candidate in candidates(kernel, size, warp_size):
            if time.monotonic() > deadline:
                break
            bound, ms = min(best, (1 - WORTH) * before), measure(size, candidate)
            if ms < bound:
                ms = max(ms, measure(size, candidate))  # right and fast twice: a race may be neither again
            if ms < bound:
                best, tile = ms, candidate
        if math.isinf(best):
            raise RuntimeError(f"no tile of {kernel} runs on {architecture} for size {size}")
        row = {"up_to": limit, "tile": tile, "ms": _rounded(best), "before_ms": _rounded(before)}
        if rows and rows[-1]["tile"] == tile:  # one class then
            rows[-1]["up_to"] = limit
        else:
            rows.append(row)
    return rows


def _rounded(ms: float) -> float | None:
    return round(ms, 4) if math.isfinite(ms) else None


class Lost(Exception):
    """A tile has taken this process's GPU with it: no other can be timed."""


class Gpu:
    """measure() of `search` on this machine's GPU, for one kernel."""

    def __init__(self, kernel: str, device: torch.device):
        from pyfast.kernels import launch

        self.kernel, self.device, self.architecture = kernel, device, launch.architecture(device)
        self.dtype = torch.float16 if self.architecture == "sm_75" else torch.bfloat16
        self.size, self.truth = None, None

    def __call__(self, size: int, tile: dict | None) -> float:
        from triton.runtime.errors import TritonError
        from triton.testing import do_bench

        from pyfast.kernels import launch
        from pyfast.kernels.tiles import TILES

        from .launches import CASES

        table, stock_run = TILES[self.kernel], launch.run
        before, launches = table.get(self.architecture), []

        def recorded(kernel, *arguments, **constants):
            compiled = stock_run(kernel, *arguments, **constants)
            if kernel.__name__ == self.kernel.split()[0]:
                launches.append((compiled, partial(stock_run, kernel, *arguments, **constants)))
            return compiled

        try:
            if tile is not None:
                table[self.architecture] = [(None, tile)]
            launch.run = recorded
            torch.manual_seed(0)
            with self.device:
                results = next(iter(CASES[self.kernel].calls.values()))(size, self.dtype)
            compiled, again = launches[0]
            results = [x.float() for x in (results if isinstance(results, tuple | list) else [results]) if x.numel()]
            if size != self.size:
                self.size, self.truth = size, results  # of the tile in use
            if getattr(compiled, "n_spills", 0) or not _agree(results, self.truth):
                return math.inf
            return do_bench(again, warmup=5, rep=20, return_mode="median")
        except (TritonError, RuntimeError) as error:  # it does not compile, or does not fit this GPU
            try:
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
            except RuntimeError:
                raise Lost(f"{self.kernel} for size {size} with {tile}: {str(error).splitlines()[0]}") from error
            return math.inf
        finally:
            launch.run = stock_run
            table.pop(self.architecture, None)
            if before is not None:
                table[self.architecture] = before


def _agree(results, truth) -> bool:
    """Whether results are the truth but for the order in which sums are taken and a rounding to bf16: within 1 % in
    norm, and 2 % in every row and column of some length, so that a few wrong ones cannot hide."""
    for result, expected in zip(results, truth, strict=True):
        t = expected.reshape(-1, expected.shape[-1]) if expected.dim() > 1 else expected.reshape(1, -1)
        d = result.reshape(t.shape) - t
        if not bool(d.norm() <= 1e-2 * t.norm()):
            return False
        for dim in (dim for dim in (0, 1) if t.shape[dim] >= 16):
            size = t.norm(dim=dim)
            if not bool((d.norm(dim=dim) <= 2e-2 * (size + size.max())).all()):
                return False
    return True


class Ahead:
    """Compiles tiles on the other cores into Triton's cache, in the order of `jobs`: (kernel, size, tile)."""

    def __init__(self, jobs: list[tuple[str, int, dict]], compile_one: Callable[..., bool], workers: int):
        self.compile_one, self.workers, self.futures = compile_one, workers, {}
        self._start(jobs)

    def _start(self, jobs):
        context = multiprocessing.get_context("spawn")  # a fork of a process that uses a GPU may not compile
        self.pool = ProcessPoolExecutor(self.workers, context, _silence)
        self.jobs = jobs
        self.futures |= {_key(*job): self.pool.submit(self.compile_one, *job) for job in jobs}

    def done(self, kernel: str, size: int, tile: dict) -> bool:
        """Waits for a tile; returns whether it has been compiled."""
        try:
            return self.futures[_key(kernel, size, tile)].result()
        except BrokenProcessPool:  # the compiler has ended a process: its kernel's other tiles are given up with it
            rest = [job for job in self.jobs if not self.futures[_key(*job)].done() or self._broken(job)]
            self._start([job for job in rest if job[0] != kernel])
            return False

    def _broken(self, job) -> bool:
        return isinstance(self.futures[_key(*job)].exception(), BrokenProcessPool)

    def stop(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


def _key(kernel: str, size: int, tile: dict) -> tuple:
    return kernel, size, *tile.items()


def _silence() -> None:
    """What the compiler prints of tiles that it refuses fills pages."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def compile_tile(target, architecture: str, dtype: torch.dtype, kernel: str, size: int, tile: dict) -> bool:
    """Whether a tile compiles for that GPU, in a process that need not see it."""
    from pyfast.kernels.tiles import TILES

    from .aot import compile_launch
    from .launches import CASES

    TILES[kernel][architecture] = [(None, tile)]
    try:
        compile_launch(target, architecture, kernel, next(iter(CASES[kernel].calls.values())), size, dtype)
    except Exception:  # the compiler raises what it likes
        return False
    return True


def write(folder: Path, architecture: str, machine: dict, tables: dict[str, list[dict]]) -> Path:
    """Writes the rows of the kernels in `tables`, a line each; other kernels in the file keep theirs."""
    path = folder / f"tiles_{architecture}.json"
    kept = json.loads(path.read_text())["tiles"] if path.exists() else {}
    tables = kept | tables
    lines = [f' "machine": {json.dumps(machine)},', ' "tiles": {']
    for i, kernel in enumerate(sorted(tables)):
        rows = ",\n".join(f"   {json.dumps(row)}" for row in tables[kernel])
        lines.append(f'  "{kernel}": [\n{rows}\n  ]{"," if i < len(tables) - 1 else ""}')
    path.write_text("\n".join(["{", *lines, " }", "}"]) + "\n")
    return path


def unavailable() -> str | None:
    """Why nothing can be tuned here, or None."""
    if dispatch.INTERPRETING:
        return "TRITON_INTERPRET=1 runs the kernels on the CPU: unset it"
    if dispatch.unavailable("triton") is not None:
        return dispatch.unavailable("triton")
    if not torch.cuda.is_available():
        return "no GPU is visible to PyTorch"
    return dispatch.refusal("triton", "swiglu", torch.empty(0, device="cuda"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="pyfast tune", description=__doc__.split("\n\n")[0])
    names = f"of {', '.join(SPACE)}, or backends; all without any"
    parser.add_argument("kernels", nargs="*", metavar="kernel", help=names)
    folder = Path(__file__).resolve().parents[1] / "kernels"
    parser.add_argument("--folder", type=Path, default=folder, help="where the table goes (%(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, help="what it may take (%(default)s)")
    options = parser.parse_args(argv)
    for kernel in options.kernels:
        if kernel not in (*SPACE, BACKENDS):
            parser.error(f"there is no kernel {kernel!r}: choose from {', '.join(SPACE)}, or {BACKENDS}")
    reason = unavailable()
    if reason is not None:
        print(f"pyfast tune: tiles are timed on a GPU, which cannot be done here: {reason}", file=sys.stderr)
        sys.exit(2)
    from triton.runtime.driver import driver

    chosen, written = options.kernels or [*SPACE, BACKENDS], []
    kernels, end = [name for name in chosen if name != BACKENDS], time.monotonic() + 60 * options.minutes
    device, about = torch.device("cuda", torch.cuda.current_device()), gpu.describe()
    if kernels:
        deadline = end - 60 * BACKENDS_MINUTES * (BACKENDS in chosen)
        left_out = tune(kernels, device, driver.active.get_current_target(), options.folder, about, deadline)
        if left_out:
            print(f"not tuned: {', '.join(left_out)}")
        if len(left_out) < len(kernels):
            written.append(options.folder / f"tiles_{about['architecture']}.json")
    if BACKENDS in chosen:
        with tempfile.TemporaryDirectory() as folder:
            for line in gpu.bench(list(cuda.CASES), Path(folder), about, end, alone=True):
                print(line)
            if list(Path(folder).glob("*.json")):  # else nothing was measured, as the lines say
                written.append(backends.write(Path(folder), options.folder))
    if not written:
        print("pyfast tune: nothing was written", file=sys.stderr)
        sys.exit(1)
    print(f"written to {' and '.join(map(str, written))}; run the tests on this GPU before you commit it")


def tune(kernels: list[str], device: torch.device, target, folder: Path, machine: dict, deadline: float) -> list[str]:
    """Tunes and writes each of the kernels for Triton's target, until `deadline`; returns those that it did not come
    to."""
    from pyfast.kernels import launch

    from .launches import classes

    architecture, waiting = launch.architecture(device), list(kernels)
    jobs = [
        (kernel, size, tile)
        for kernel in kernels
        for _, size in classes(kernel, architecture)
        for tile in candidates(kernel, size, target.warp_size)
    ]
    dtype = Gpu(kernels[0], device).dtype
    workers = max(1, (os.cpu_count() or 1) - 2)  # launching takes a core, and its measure should not wait
    ahead = Ahead(jobs, partial(compile_tile, target, architecture, dtype), workers)
    try:
        while waiting and time.monotonic() < deadline:
            kernel = waiting.pop(0)
            timer, refused = Gpu(kernel, device), []

            def measure(size, tile, kernel=kernel, timer=timer, refused=refused):
                if tile is not None and not ahead.done(kernel, size, tile):
                    refused.append(tile)
                    return math.inf
                return timer(size, tile)

            try:
                rows = search(kernel, architecture, target.warp_size, measure, deadline)
            except RuntimeError as error:  # no tile of it runs
                print(f"{kernel}: {error}", flush=True)
                continue
            except Lost as error:
                print(f"the GPU is lost to this process by {error}", flush=True)
                return [kernel, *waiting]
            saved = sum((row["before_ms"] or 0) - (row["ms"] or 0) for row in rows)
            print(f"{kernel}: {len(rows)} tiles, {saved:.4g} ms saved; {len(refused)} did not compile", flush=True)
            write(folder, architecture, machine, {kernel: rows})
    finally:
        ahead.stop()
    return waiting


if __name__ == "__main__":
    main()
