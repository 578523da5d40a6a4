"""All that a GPU machine is asked for, in one run of a few minutes and without a network: the tests of tests/gpu, then
the benchmarks of benchmarks/cuda.py.

    python -m benchmarks.gpu [OP ...] [--no-tests] [--no-bench] [--minutes 8]      or: make gpu, make gpu-bench OP=...

Results go to benchmarks/results/<gpu>/<op>.json and .md, the tests' log to tests.log beside them. What no time was left
for is named. Failures are printed last, and make the exit status 1.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from . import cuda
from .machine import versions

HERE = Path(__file__).resolve().parent
COLUMNS = ("op", "case", "variant", "ms", "pyfast_speedup", "tflops", "of_gemm", "gb_per_s", "of_copy", "not_run")


def folder_of(gpu: str) -> Path:
    """benchmarks/results/<gpu>: nvidia-h100-80gb-hbm3."""
    return HERE / "results" / re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def run_tests(log: Path, seconds: float) -> list[str]:
    """Runs tests/gpu, on several processes where pytest-xdist is installed; returns what failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", "tests/gpu"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    with log.open("w") as file:
        try:
            status = subprocess.run(command, cwd=HERE.parent, stdout=file, stderr=file, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            status = f"no end after {seconds:.0f} s"
    lines = log.read_text().splitlines()
    print(f"tests: {lines[-1] if lines else 'no output'}", flush=True)
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return failed or ([] if status in (0, 5) else [f"tests/gpu: pytest ended with {status}, see {log}"])


def cells(row: dict) -> list[str]:
    return ["" if row.get(column) is None else str(row[column]) for column in COLUMNS]


def save(folder: Path, op: str, rows: list[dict], about: dict) -> None:
    (folder / f"{op}.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    table = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, rows)]
    text = "\n".join(f"| {' | '.join(row)} |" for row in table)
    head = (
        "Forward and backward, bf16, medians. `pyfast_speedup` is the variant's time over PyFast's: above 1, PyFast"
        f" wins.\n\n{json.dumps(about)}"
    )
    (folder / f"{op}.md").write_text(f"# {op}\n\n{head}\n\n{text}\n")


def bench(ops: list[str], folder: Path, about: dict, deadline: float, timer=cuda.do_bench) -> list[str]:
    """Measures every case of `ops` until `deadline` (of time.monotonic), saves and prints them; returns what failed."""
    about = {**about, "limits": cuda.limits(timer)}
    print(f"limits: {about['limits']}", flush=True)
    failed, left_out = [], []
    for op in ops:
        rows = []
        for case in cuda.cases([op]):
            if time.monotonic() > deadline:
                left_out.append(f"{op} {case.label}")
                continue
            try:
                rows += cuda.measure(case, about["limits"], timer)
            except Exception as error:  # of whatever class: it is reported, and time on a GPU goes to the other cases
                failed.append(f"{op} {case.label}: {cuda._reason(error)}")
        for row in rows:
            print(*filter(None, cells(row)), sep="  ", flush=True)
        if rows:
            save(folder, op, rows, about)
    if left_out:
        print(f"no time was left for: {'; '.join(left_out)}", flush=True)
    return failed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("ops", nargs="*", metavar="op", help=f"to benchmark, of {', '.join(cuda.CASES)}; all without")
    parser.add_argument("--no-tests", action="store_true", help="benchmarks alone")
    parser.add_argument("--no-bench", action="store_true", help="tests alone")
    parser.add_argument("--minutes", type=float, default=8.0, help="what it may take in all (%(default)s)")
    options = parser.parse_args(argv)
    for op in options.ops:
        if op not in cuda.CASES:
            parser.error(f"there is no benchmark {op!r}: choose from {', '.join(cuda.CASES)}")
    if not torch.cuda.is_available():
        print("benchmarks.gpu: PyTorch sees no GPU here", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * options.minutes - 20
    gpu, failed = torch.cuda.get_device_name(), []
    folder = folder_of(gpu)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"gpu": gpu, **versions()}
    print(about, flush=True)
    if not options.no_tests:
        failed += run_tests(folder / "tests.log", 60 * options.minutes * (0.9 if options.no_bench else 0.6))
    if not options.no_bench:
        with torch.device("cuda"):
            failed += bench(options.ops or list(cuda.CASES), folder, about, deadline)
    print(f"results in {folder}")
    for line in failed[:40]:
        print(line[:300])
    print(f"{len(failed)} failed" if failed else "nothing failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
