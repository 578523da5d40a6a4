"""Every kernel compiles for every GPU, with no GPU here: no spills, shared memory that fits, tensor cores in use.

In a process of its own, because this one interprets the kernels instead of compiling them.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.language", reason="triton is not installed")
ROOT = Path(__file__).parents[3]
#: compiled by `make test`; the others by `make test-all`
QUICK = ["sm_90"]


def compile_all(target: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.aot", "--target", target]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(t, marks=() if t in QUICK else pytest.mark.slow)
        for t in ("sm_75", "sm_80", "sm_100", "gfx942", *QUICK)
    ],
)
def test_compiles(target):
    result = compile_all(target)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_90", "sm_100", "gfx942"])
def test_committed_table_is_of_these_tiles(target):
    """benchmarks/results/aot has a row for every tile; `python -m benchmarks.aot --write` renews it."""
    from benchmarks.launches import CASES, MATRIX
    from pyfast.kernels.tiles import TILES

    with (ROOT / "benchmarks" / "results" / "aot" / f"{target}.csv").open() as file:
        rows = list(csv.DictReader(file))
    for kernel, table in TILES.items():
        if target == "sm_75" and kernel in MATRIX:
            continue
        main = next(iter(CASES[kernel].calls))
        written = [row["tile"] for row in rows if (row["kernel"], row["variant"]) == (kernel, main)]
        written = [dict(pair.split("=") for pair in tile.split()) for tile in written]
        tiles = [tile for _, tile in table.get(target, table["default"])]
        assert len(written) == len(tiles), kernel
        for tile, row in zip(tiles, written, strict=True):
            assert {k: str(v) for k, v in tile.items() if k in row}.items() <= row.items(), kernel


def test_every_kernel_has_a_case():
    from benchmarks.launches import CASES
    from pyfast.kernels.tiles import TILES

    assert CASES.keys() == TILES.keys()
