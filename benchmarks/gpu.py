"""All that a GPU machine is asked for, in one run of a few minutes and without a network: the tests of tests/gpu, some
of them under compute-sanitizer where CUDA_HOME or PATH has it, then the benchmarks of benchmarks/cuda.py.

    python -m benchmarks.gpu [OP ...] [--no-tests] [--no-bench] [--minutes 8]      or: make gpu, make gpu-bench OP=...

Results go to benchmarks/results/<gpu>/<op>.json and .md, the logs of tests to <which>.log beside them. What no time was
left for is named. Failures are printed last, and make the exit status 1.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
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


#: compute-sanitizer's tools
SANITIZERS = ("memcheck", "racecheck", "synccheck")
#: what runs under them, by parts of the tests' names: every CUDA kernel, with all options or at the borders of tiles
SANITIZED = (
    "cuda-float16-everything",
    "cuda-float32-everything",
    "cuda-float16-causal-long",
    "cuda-float16-ragged-causal",
    "test_error_rule[cuda-float16-all]",
    "test_error_rule[cuda-float32-all]",
    "test_several_tiles_of_attention90[cuda-float16",
    "test_long_rows_of_cross_entropy[cuda-float16-all",
    "test_several_tiles_of_linear_cross_entropy[cuda-float16-136-all]",
    "test_hopper",
    "test_linear[cuda-float16-rank_70]",
    "test_linear_shapes[cuda-float32-33",
    "test_linear_dropout_shapes[cuda-float16-133",
    "test_mlp[cuda-float16",
    "test_panels_of_several_passes_of_lora[cuda-float16-0.4]",
    "test_large_products[cuda-float16",
    "test_large_mlp[cuda-float16",
    "test_dequantized_blocks_begin_anywhere_of_quantized[cuda-float16",
    "test_few_rows_of_quantized[cuda-float16-9",
)


def pytest_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *arguments]


def sanitizer() -> str | None:
    """compute-sanitizer, if this machine has it."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("compute-sanitizer", path=f"{home}/bin" if home else None) or shutil.which("compute-sanitizer")


def run_tests(folder: Path, seconds: float) -> list[str]:
    """Runs tests/gpu, the logs in `folder`; returns what failed.

    First the instructions, in a process of their own, since a kernel that fails takes its process's GPU with it; then
    the ops, on several processes where pytest-xdist is installed, and beside them some under compute-sanitizer.
    """
    deadline = time.monotonic() + seconds
    failed = _finish(
        {"instructions": _start(folder, "instructions", pytest_command("tests/gpu/test_instructions.py"))},
        folder,
        min(120, seconds / 3),
    )
    parallel = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    ops = ["tests/gpu", "--ignore=tests/gpu/test_instructions.py"]
    running = {"tests": _start(folder, "tests", pytest_command(*ops, *parallel))}
    tool = sanitizer()
    if tool is None:
        print(f"{', '.join(SANITIZERS)}: not run, there is no compute-sanitizer in CUDA_HOME or on PATH", flush=True)
    else:
        for name in SANITIZERS:
            options = ["--tool", name, "--error-exitcode", "99", "--kernel-regex", "kns=pyfast"]
            tests = pytest_command("-x", *ops, "-k", " or ".join(SANITIZED))
            running[name] = _start(folder, name, [tool, *options, *tests])
    return failed + _finish(running, folder, deadline - time.monotonic())


def _start(folder: Path, name: str, command: list[str]) -> subprocess.Popen:
    # memory that torch keeps would hide what lies outside of a tensor
    environment = os.environ | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if name in SANITIZERS else {})
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            command, cwd=HERE.parent, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def _finish(running: dict[str, subprocess.Popen], folder: Path, seconds: float) -> list[str]:
    """Waits for all, and returns what failed."""
    deadline, failed = time.monotonic() + seconds, []
    for name, process in running.items():
        try:
            status = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            process.wait()
            status = f"no end after {seconds:.0f} s"
        log = folder / f"{name}.log"
        lines = log.read_text(errors="replace").splitlines()
        print(f"{name}: {lines[-1] if lines else 'no output'}", flush=True)
        found = [f"{name}: {line}" for line in lines if line.startswith(("FAILED", "ERROR"))]
        # 5: no test was selected, which is right for the ops' tests alone
        ended_well = status == 0 or (status == 5 and name == "tests")
        failed += found or ([] if ended_well else [f"{name}: ended with {status}, see {log}"])
    return failed


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
        failed += run_tests(folder, 60 * options.minutes * (0.9 if options.no_bench else 0.6))
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
