"""Times the tiles of the Triton kernels on this GPU and writes the best of them as the table of its architecture.

    pyfast tune [KERNEL ...] [--folder kernels]

For each shape class of a kernel's table (kernels/tiles.py) every tile of SPACE is compared with the one in use: one
that spills registers, does not fit the GPU or gives another result is passed over, the fastest is kept. The table goes
to FOLDER/tiles_<architecture>.json, which kernels/tiles.py reads; kernels that are not named keep their rows. It is
meant for a GPU that nothing else uses; training never tunes.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from pyfast import dispatch

from .machine import versions

_BLOCKS = {"BLOCK": [512, 1024, 2048, 4096, 8192], "num_warps": [4, 8, 16]}
_TILE = {"num_warps": [4, 8], "num_stages": [1, 2, 3, 4]}
#: kernel -> option -> values; the tiles tried are all combinations
SPACE: dict[str, dict[str, list[int]]] = {
    "gated_kernel": {"ROWS": [1], **_BLOCKS},
    "gated_backward_kernel": {"ROWS": [1], **_BLOCKS},
    "activate_kernel": {"ROWS": [1, 4], **_BLOCKS},
    "activate_backward_kernel": {"ROWS": [16, 32, 64], "BLOCK": [64, 128, 256], "num_warps": [4, 8]},
    "cross_entropy_kernel": {"BLOCK": [1024, 2048, 4096, 8192, 16384], "num_warps": [4, 8, 16, 32]},
    "exponentials_kernel": {
        "BLOCK_M": [64, 128],
        "BLOCK_N": [64, 128, 256],
        "BLOCK_K": [32, 64],
        "num_warps": [4, 8],
        "num_stages": [2, 3, 4],
    },
    "logits_gradient_kernel": _BLOCKS,
    "norm_kernel": {"ROWS": [1, 2, 4, 8], "num_warps": [2, 4, 8, 16, 32]},
    "norm_backward_kernel": {"ROWS": [1, 2, 4, 8], "PROGRAMS": [264, 512, 1024], "num_warps": [2, 4, 8, 16, 32]},
    "rope_kernel": {"ROWS": [8, 16, 32, 64, 128], "num_warps": [2, 4, 8]},
    "attention_kernel": {"BLOCK_M": [64, 128], "BLOCK_N": [32, 64, 128], **_TILE},
    "attention_dq_kernel": {"BLOCK_M": [64, 128], "BLOCK_N": [16, 32, 64, 128], **_TILE},
    "attention_dkv_kernel": {"BLOCK_M": [16, 32, 64, 128], "BLOCK_N": [64, 128], **_TILE},
    "attention_dbias_kernel": {"BLOCK_M": [32, 64, 128], "BLOCK_N": [16, 32, 64], **_TILE},
    "dropout_kernel": _BLOCKS,
    "dequantize_kernel": _BLOCKS,
    "adapter_gradients_kernel": {"BLOCK_M": [64, 128, 256], "BLOCK_N": [32, 64, 128], "SPLITS": [4, 8], **_TILE},
    "matmul_kernel": {
        "BLOCK_M": [64, 128],
        "BLOCK_N": [16, 64, 128, 256],  # 16 and 64: where the product has no more columns
        "BLOCK_K": [32, 64, 128],
        "GROUP": [8],
        "SPLITS": [4, 16],
        "num_warps": [4, 8],
        "num_stages": [2, 3, 4],
    },
}
SPACE["matmul_kernel with dropout"] = SPACE["matmul_kernel"]
#: threads in a program, and elements of a tile that its kernel holds at a time: more of either is not tried
MOST_THREADS, MOST_ELEMENTS = 1024, 64 * 1024
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
        if tile["num_warps"] * warp_size > MOST_THREADS or elements > MOST_ELEMENTS:
            continue
        if kernel.startswith("matmul_kernel"):
            narrow = size <= 64  # one tile wide, and its sums over rows are split
            wanted = [size] if narrow else [n for n in space["BLOCK_N"] if n >= 64]
            if tile["BLOCK_N"] not in wanted or (tile["SPLITS"] == 16) != narrow:
                continue
        found.append(tile)
    return found


def search(kernel: str, architecture: str, warp_size: int, measure: Callable[[int, dict | None], float]) -> list[dict]:
    """The rows of a kernel's table: {up_to, tile, ms, before_ms}. measure(size, tile): milliseconds, infinite for a
    tile that must not be used; tile None is the one in use."""
    from pyfast.kernels.tiles import TILES

    from .launches import classes

    in_use = TILES[kernel].get(architecture, TILES[kernel]["default"])
    rows: list[dict] = []
    for (limit, tile), (_, size) in zip(in_use, classes(kernel, architecture), strict=True):
        before = best = measure(size, None)
        for candidate in candidates(kernel, size, warp_size):
            ms = measure(size, candidate)
            if ms < min(best, (1 - WORTH) * before):
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
            return do_bench(again, warmup=10, rep=40, return_mode="median")
        except TritonError:  # it does not fit this GPU
            return math.inf
        finally:
            launch.run = stock_run
            table.pop(self.architecture, None)
            if before is not None:
                table[self.architecture] = before


def _agree(results, truth) -> bool:
    """Whether results are the truth but for the order in which sums are taken and a rounding to bf16."""
    return all(bool((r - t).norm() <= 1e-2 * t.norm()) for r, t in zip(results, truth, strict=True))


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
    parser.add_argument("kernels", nargs="*", metavar="kernel", help=f"of {', '.join(SPACE)}; all without any")
    folder = Path(__file__).resolve().parents[1] / "kernels"
    parser.add_argument("--folder", type=Path, default=folder, help="where the table goes (%(default)s)")
    options = parser.parse_args(argv)
    for kernel in options.kernels:
        if kernel not in SPACE:
            parser.error(f"there is no kernel {kernel!r}: choose from {', '.join(SPACE)}")
    reason = unavailable()
    if reason is not None:
        print(f"pyfast tune: tiles are timed on a GPU, which cannot be done here: {reason}", file=sys.stderr)
        sys.exit(2)
    from pyfast.kernels import launch

    device = torch.device("cuda", torch.cuda.current_device())
    architecture, found = launch.architecture(device), torch.cuda.get_device_properties(device)
    machine = {"gpu": found.name, **versions()}
    for kernel in options.kernels or SPACE:
        rows = search(kernel, architecture, found.warp_size, Gpu(kernel, device))
        for row in rows:
            print(kernel, *(f"{key}={value}" for key, value in row.items()), flush=True)
        path = write(options.folder, architecture, machine, {kernel: rows})
    print(f"written to {path}; run the tests on this GPU before you commit it")


if __name__ == "__main__":
    main()
