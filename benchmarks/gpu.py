"""All that a GPU machine is asked for, in one run of a few minutes and without a network: builds the CUDA kernels for
its card where there is an nvcc, runs the tests of tests/gpu (benchmarks/gpu_tests.py), then the benchmarks of
benchmarks/cuda.py.

    python -m benchmarks.gpu [OP ...] [--no-tests] [--no-bench] [--minutes 8]      or: make gpu, make gpu-bench OP=...

Run only where they are named: OP=end_to_end, whole training steps (benchmarks/end_to_end_gpu.py), or OP=llama-3-8b and
the like, those of one model; and OP=loss_curve, 300 steps on real text beside stock (benchmarks/loss_curve.py).

Results go to benchmarks/results/<gpu>/<op>.json and .md, the logs of tests to <which>.log beside them. What no time was
left for is named. At the end come the fastest backend of each case, the bars with what misses them, and the failures,
which make the exit status 1; a missed bar does not.
"""

import argparse
import contextlib
import functools
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from pyfast import dispatch

from . import cuda, end_to_end_gpu, loss_curve, peers
from .machine import versions

HERE = Path(__file__).resolve().parent
#: the folder of the package that this module is of: benchmarks in a checkout, pyfast where it is installed
IMPORTED_FROM = Path(__file__).absolute().parents[len(__package__.split("."))]
COLUMNS = (
    "case",
    "variant",
    "forward_ms",
    "backward_ms",
    "ms",
    "wall_ms",
    "pyfast_speedup",
    "forward_tflops",
    "backward_tflops",
    "of_gemm",
    "forward_gb_per_s",
    "backward_gb_per_s",
    "of_copy",
    "peak_mb",
    "extra_mb",
    "not_run",
)


#: parts that run only where they are named: (folder, about, deadline) -> what failed
PARTS = {"end_to_end": end_to_end_gpu.run, "loss_curve": loss_curve.run}
PARTS |= {
    name: functools.partial(end_to_end_gpu.run, models=(name,)) for name in end_to_end_gpu.MODELS if "tiny" not in name
}


def folder_of(gpu: str) -> Path:
    """benchmarks/results/<gpu>: nvidia-h100-80gb-hbm3."""
    return HERE / "results" / re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def describe() -> dict:
    """This machine's GPU and the versions that results are of."""
    device = torch.device("cuda", torch.cuda.current_device())
    return {"gpu": torch.cuda.get_device_name(device), "architecture": dispatch.architecture(device), **versions()}


# ---- benchmarks
START_SECONDS = 120  # in which a process must have imported PyTorch and measured the limits
STEP_SECONDS = 75  # in which a variant must have been compiled and checked, or timed, or profiled


def bench_command(names: list[str], skip: list[str]) -> list[str]:
    left_out = [word for one in skip for word in ("--skip", one)]
    return [sys.executable, "-m", f"{__package__}.cuda", *names, *left_out]


def bench(ops: list[str], folder: Path, about: dict, deadline: float, alone: bool = False) -> list[str]:
    """Measures every case of `ops` until `deadline` (of time.monotonic), saves and prints them; returns what failed.
    alone: without peers.

    The cases run in a process of their own. When a variant takes the GPU with it or never ends, another process goes on
    without that variant.
    """
    waiting, limits, failed = cuda.plan(ops), [], []
    skip = [f"{op}:{peer}" for op in ops for peer in peers.PEERS[op]] if alone else []
    (folder / "bench.log").write_text("")
    cases = {f"{op}:{i}": case for op in ops for i, case in enumerate(cuda.cases(op))}
    labels = {name: (case.op, case.label) for name, case in cases.items()}
    rows: dict[str, list[dict]] = {}  # by case
    bars: dict[str, list[dict]] = {}
    lost: dict[str, dict[str, str]] = {op: {} for op in ops}  # variant -> reason

    def of(op, found):  # what was found of an op, in the order of its cases
        return [one for name in labels if labels[name][0] == op for one in found.get(name, [])]

    about = {**about, "peers": peers.versions(), "limits": limits}
    while waiting and time.monotonic() < deadline:
        before, ended = (len(waiting), len(skip)), ""
        for event, *found in _events(bench_command(waiting, skip), folder / "bench.log", deadline):
            if event == "limits":
                limits += found
                print(f"limits: {found[0]}", flush=True)
            elif event == "done":
                name, rows[name], bars[name] = found
                waiting.remove(name)
                op, label = labels[name]
                for variant, reason in lost[op].items():
                    rows[name].append({"op": op, "case": label, "variant": variant, "not_run": reason})
                if cases[name].peers:  # else PyFast's own are all, which the lines at the end compare
                    print(_line(rows[name]), flush=True)
                save(folder, op, of(op, rows), of(op, bars), about)  # at once: whatever ends this run
            elif event == "failed":
                name, reason = found
                waiting.remove(name)
                failed.append(f"{' '.join(labels[name])}: {reason}")
            elif event == "lost":
                name, variant, reason = found
                op, label = labels[name]
                if variant in ("torch", cuda.TRUTH):
                    waiting.remove(name)
                else:
                    skip.append(f"{op}:{variant}")
                    lost[op][variant] = f"{reason}, in {label}"
                if variant == cuda.TRUTH or cuda.is_ours(variant):
                    failed.append(f"{op} {label}: {variant}: {reason}")
            elif event == "ended":
                ended = found[0]
        if (len(waiting), len(skip)) == before and time.monotonic() < deadline:
            failed.append(f"benchmarks: {ended or 'nothing was measured'}, see {folder / 'bench.log'}")
            break
    measured = [row for op in ops for row in of(op, rows)]
    for op in {row["op"]: None for row in measured}:
        save(folder, op, of(op, rows), of(op, bars), about)  # with the last limits
    failed += [f"{r['op']} {r['case']}: {r['variant']}: {r['not_run']}" for r in measured if r.get("failed")]
    _summarise(measured, [verdict for op in ops for verdict in of(op, bars)])
    if waiting:
        print(f"no time was left for: {'; '.join(' '.join(labels[name]) for name in waiting)}", flush=True)
    return failed


def _events(command: list[str], log: Path, deadline: float) -> Iterator[list]:
    """What a process of benchmarks.cuda tells until it ends or `deadline`. A variant that takes too long, or with which
    the process ends, is ("lost", case, variant, reason); an end of another kind ("ended", reason)."""
    with log.open("a") as out:
        process = subprocess.Popen(
            command, cwd=IMPORTED_FROM, stdout=subprocess.PIPE, stderr=out, text=True, start_new_session=True
        )
    lines: queue.Queue[str | None] = queue.Queue()

    def read():
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    at, patience = None, START_SECONDS
    try:
        while True:
            try:
                line = lines.get(timeout=max(0.0, min(patience, deadline - time.monotonic())))
                reason = None if line else f"its process ended with {process.wait()}"
            except queue.Empty:
                reason = f"no end after {patience} s"
                if time.monotonic() >= deadline:
                    return
            if reason is not None:
                yield ["lost", *at, reason] if at else ["ended", reason]
                return
            if not line.startswith("["):  # a package has printed it as it was imported
                continue
            event, *found = json.loads(line)
            patience = STEP_SECONDS
            if event == "at":
                at = found
            else:
                at = None
                yield [event, *found]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
        process.wait()


def save(folder: Path, op: str, rows: list[dict], bars: list[dict], about: dict) -> None:
    result = {**about, "rows": rows, "bars": bars, "fastest": {case: as_called(rows, case) for case in _cases(rows)}}
    (folder / f"{op}.json").write_text(json.dumps(result, indent=1) + "\n")
    table = [COLUMNS, ["---"] * len(COLUMNS)]
    table += [["" if row.get(column) is None else str(row[column]) for column in COLUMNS] for row in rows]
    text = "\n".join(f"| {' | '.join(row)} |" for row in table)
    head = (
        "bf16, medians. `forward_ms` and `backward_ms` are the GPU's time behind a flushed L2 cache, `ms` their sum,"
        " `wall_ms` a call of both among others, the host's time included. `pyfast_speedup` is the variant's `ms` over"
        " that of PyFast's fastest (triton, cuda or torch): above 1, PyFast wins. `peak_mb` is what a call of both"
        f" holds at most beyond its inputs, `extra_mb` that without the gradients.\n\n{json.dumps(about)}"
    )
    found = "\n".join(f"- {bar['case']}: {_verdict(bar)}" for bar in bars)
    (folder / f"{op}.md").write_text(f"# {op}\n\n{head}\n\n{text}\n" + (f"\n{found}\n" if bars else ""))


def _cases(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["case"] for row in rows))


def as_called(rows: list[dict], case: str) -> dict[str, float]:
    """PyFast's variants of a case, fastest first, in the milliseconds of a call: what dispatch.TABLE is set from, and
    by the small cases dispatch.SMALL."""
    ours = [row for row in rows if row["case"] == case and row["variant"] in cuda.OURS and "ms" in row]
    return {row["variant"]: cuda.as_called(row) for row in sorted(ours, key=cuda.as_called)}


def _line(rows: list[dict]) -> str:
    """A case in one line: forward + backward of each variant, in milliseconds."""
    timed = [f"{row['variant']} {row['forward_ms']:.3g}+{row['backward_ms']:.3g}" for row in rows if "ms" in row]
    return f"{rows[0]['op']} {rows[0]['case']}: {' | '.join(timed)}"


def _verdict(bar: dict) -> str:
    head = f"{'met' if bar['met'] else 'MISSED'} {bar['bar']}: {bar['variant']}"
    if "value" not in bar:
        return f"{head} was not measured: {bar['not_measured']}"
    limits = "".join(f", {bar[of]} {of.replace('_', ' ')}" for of in ("of_gemm", "of_copy") if of in bar)
    return f"{head} {bar['value']:g} ({100 * bar['off']:+.0f} %{limits})"


def _kernels(bars: list[dict]) -> str:
    """What the variants that missed bars of a case spend their time on."""
    found = {}
    for bar in bars:
        profile = bar.get("profile")
        if isinstance(profile, str):
            found[bar["variant"]] = f"no profile: {profile}"
        elif profile:
            found[bar["variant"]] = ", ".join(
                f"{k['launches']:g} × {k['kernel'][:40]} {k['us']:g} µs" for k in profile[:2]
            )
    return "".join(f"; {variant} runs {kernels}" for variant, kernels in found.items())


def _summarise(rows: list[dict], bars: list[dict]) -> None:
    """What was not run and why; the fastest backends; the bars, missed ones last."""
    reasons: dict[tuple, list[str]] = {}
    for row in rows:
        if "not_run" in row and not row.get("failed"):
            reasons.setdefault((row["variant"], row["not_run"][:100]), []).append(row["op"])
    for (variant, reason), where in reasons.items():
        print(f"not run: {variant} ({', '.join(dict.fromkeys(where))}): {reason}")
    for op in dict.fromkeys(row["op"] for row in rows):
        of_op = [row for row in rows if row["op"] == op]
        found = ((case, as_called(of_op, case)) for case in _cases(of_op))
        told = (f"{case}: {' < '.join(f'{name} {ms:.3g}' for name, ms in ms_of.items())}" for case, ms_of in found)
        print(f"fastest of {op}, ms: {'; '.join(told)}")
    by_case: dict[tuple, list[dict]] = {}
    for bar in bars:
        by_case.setdefault((bar["op"], bar["case"]), []).append(bar)
    for (op, case), found in sorted(by_case.items(), key=lambda item: not all(bar["met"] for bar in item[1])):
        print(f"{op} {case}: {'; '.join(map(_verdict, found))}{_kernels(found)}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    names = f"of {', '.join(cuda.CASES)}, which all run without; or of {', '.join(PARTS)}"
    parser.add_argument("ops", nargs="*", metavar="op", help=f"to benchmark, {names}")
    parser.add_argument("--no-tests", action="store_true", help="benchmarks alone")
    parser.add_argument("--no-bench", action="store_true", help="tests alone")
    parser.add_argument("--minutes", type=float, default=8.0, help="what it may take in all (%(default)s)")
    parser.add_argument("--commit", help="that is measured, where this is a copy of a checkout without its history")
    options = parser.parse_args(argv)
    for op in options.ops:
        if op not in (*cuda.CASES, *PARTS):
            parser.error(f"there is no benchmark {op!r}: choose from {', '.join((*cuda.CASES, *PARTS))}")
    if not torch.cuda.is_available():
        print("benchmarks.gpu: PyTorch sees no GPU here", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * options.minutes - 20
    about, failed = describe(), []
    folder = folder_of(about["gpu"])
    folder.mkdir(parents=True, exist_ok=True)
    about |= {"commit": options.commit} if options.commit else {}
    print(about, flush=True)
    from . import gpu_tests  # a checkout has what it builds and tests; `pyfast tune` needs neither

    failed += gpu_tests.build(folder, tests=not options.no_tests)
    if not options.no_tests:
        left = deadline - time.monotonic()
        failed += gpu_tests.run_tests(folder, left if options.no_bench else left / 2, everything=options.no_bench)
    if not options.no_bench:
        ops = [op for op in options.ops or cuda.CASES if op in cuda.CASES]
        failed += bench(ops, folder, about, deadline) if ops else []
        for part in [op for op in options.ops if op in PARTS]:
            failed += PARTS[part](folder, about, deadline)
    print(f"results in {folder}")
    for line in failed[:40]:
        print(line[:200])
    print(f"{len(failed)} failed" if failed else "nothing failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
