"""The CUDA kernels built for this machine's GPU, and tests/gpu on it, some of them under compute-sanitizer: parts of
benchmarks/gpu.py, each in processes of its own, since a kernel that fails takes its process's GPU with it.
"""

import hashlib
import importlib.util
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "csrc"))
import toolchain  # noqa: E402

BUILD_SECONDS = 240
#: of the machine's processors, those that are left to the sanitizers and to what starts the tests
SPARED = 3
#: compute-sanitizer's tools. Of its findings those of racecheck need a look at the kernel: before release 2026.1 it
#: reports hazards that are none where mbarriers and warpgroups order the accesses (its release notes list them).
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


def build_command(architecture: str) -> list[str]:
    return [sys.executable, "csrc/toolchain.py", architecture]


def pytest_command(*arguments: str, processes: int = 0, timeout: int = 120) -> list[str]:
    """processes: 0 for pytest alone. Otherwise, with pytest-xdist, one that a kernel takes with it, or that hangs for
    `timeout` seconds (with pytest-timeout) since a kernel waits for what never comes, is replaced by another."""
    command = [sys.executable, "-m", "pytest", "-v", "-m", "not slow", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("pytest_timeout"):
        command += [f"--timeout={timeout}", "--timeout-method=thread"]
    if processes and importlib.util.find_spec("xdist"):
        command += ["-n", str(processes), "--maxschedchunk=2", "--max-worker-restart=500"]
    return [*command, *arguments]


def sanitizer_command(tool: str, name: str, tests: list[str]) -> list[str]:
    """Our kernels alone are looked at; that a call of CUDA failed, which PyTorch tries, is no finding."""
    options = ["--tool", name, "--error-exitcode", "99", "--kernel-name", "kns=pyfast", "--report-api-errors", "no"]
    return [tool, *options, "--target-processes", "application-only", *tests]


def sanitizer() -> str | None:
    """compute-sanitizer, if this machine has it."""
    homes = [home for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    found = (shutil.which("compute-sanitizer", path=f"{home}/bin") for home in homes)
    return next(filter(None, found), None) or shutil.which("compute-sanitizer")


def sources_digest(architecture: str) -> str:
    """Of all that `_cuda` is made of. Not the files' times, which a copy of the checkout may change."""
    digest = hashlib.sha256(f"{architecture} {torch.__version__}".encode())
    for path in sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file() and path.suffix != ".pyc"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def build(folder: Path, tests: bool) -> list[str]:
    """Builds `_cuda` for this machine's GPU; returns what failed. Logs go to `folder`.

    With `tests`, the small kernels of tests/gpu/test_instructions.py are built and run meanwhile: first of all tests,
    since nothing is right where the instructions are not what the kernels take them for.
    """
    cuda = "this PyTorch is ROCm's" if torch.version.hip else toolchain.find_cuda()
    running, failed = {}, []
    if isinstance(cuda, str):
        print(f"build: {cuda}: Triton's kernels alone", flush=True)
    else:
        architecture = toolchain.architecture_for(torch.cuda.get_device_capability())
        digest, built = sources_digest(architecture), ROOT / "build" / "gpu.sha256"
        if not (built.exists() and built.read_text() == digest and list(ROOT.glob("pyfast/_cuda.*so"))):
            built.unlink(missing_ok=True)
            running["build"] = start(folder, "build", build_command(architecture))
        if tests:
            compile_them = "import sys; sys.path.append('tests'); import instructions; instructions.compiled_for_gpus()"
            kernels = start(folder, "kernels", [sys.executable, "-c", compile_them])
            failed += finish({"kernels": kernels}, folder, BUILD_SECONDS / 2)
    if tests:
        command = pytest_command("tests/gpu/test_instructions.py", processes=1, timeout=30)
        running["instructions"] = start(folder, "instructions", command)
    failed += finish(running, folder, BUILD_SECONDS)
    if "build" in running and running["build"].returncode == 0:
        built.write_text(digest)
    return failed


def run_tests(folder: Path, seconds: float, everything: bool = True) -> list[str]:
    """Runs the ops' tests of tests/gpu, on several processes where pytest-xdist is installed, and beside them some
    under compute-sanitizer; returns what failed. Logs go to `folder`. Not `everything`: without Triton's in fp16, which
    differs from bf16 in a cast and takes a third of the time, to compile."""
    ops = ["tests/gpu", "--ignore=tests/gpu/test_instructions.py"]
    chosen = [] if everything else ["-k", "not (triton and float16)"]
    if chosen:
        print("tests: without Triton's in fp16, which make gpu-test runs too", flush=True)
    processes = max(2, (os.cpu_count() or 1) - SPARED)
    running = {"tests": start(folder, "tests", pytest_command(*ops, *chosen, processes=processes))}
    tool = sanitizer()
    if tool is None:
        print(f"{', '.join(SANITIZERS)}: not run, there is no compute-sanitizer in CUDA_HOME or on PATH", flush=True)
    else:
        tests = pytest_command("-x", *ops, "-k", " or ".join(SANITIZED), timeout=180)
        running |= {name: start(folder, name, sanitizer_command(tool, name, tests)) for name in SANITIZERS}
    return finish(running, folder, seconds)


def start(folder: Path, name: str, command: list[str]) -> subprocess.Popen:
    environment = os.environ | {"COLUMNS": "240", "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    environment |= {"PYTHONUNBUFFERED": "1"}  # what a process that is killed has said must not be lost
    if name in SANITIZERS:  # memory that torch keeps would hide what lies outside of a tensor
        environment |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment, start_new_session=True)


def finish(running: dict[str, subprocess.Popen], folder: Path, seconds: float) -> list[str]:
    """Waits for all, tells of each how long it took and how it ended, and returns what failed."""
    begin, ended = time.monotonic(), {}
    while len(ended) < len(running) and time.monotonic() - begin < seconds:
        time.sleep(0.1)
        now = time.monotonic() - begin
        ended |= {name: now for name, process in running.items() if name not in ended and process.poll() is not None}
    failed = []
    for name, process in running.items():
        if name not in ended:
            _stop(process)
        log = folder / f"{name}.log"
        lines = log.read_text(errors="replace").splitlines()
        took = f"{ended[name]:.0f} s" if name in ended else f"no end after {seconds:.0f} s"
        print(f"{name}: {took}: {_told(lines)}", flush=True)
        found = [f"{name}: {line}" for line in [*failures(lines), *findings(lines)]]
        # 5: no test was selected, which is right for the ops' tests alone
        if name not in ended:
            found.append(f"{name}: no end after {seconds:.0f} s, see {log}")
        elif process.returncode not in (0, 5 if name == "tests" else 0) and not found:
            found.append(f"{name}: ended with {process.returncode}, see {log}")
        failed += found
    return failed


def _stop(process: subprocess.Popen) -> None:
    """And what it has started. pytest tells first what it has found until then."""
    for signal_, patience in ((signal.SIGINT, 15), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, signal_)
            process.wait(patience)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            pass


def _told(lines: list[str]) -> str:
    """pytest's and compute-sanitizer's last words."""
    said = [line for line in lines if re.search(r"\d+ (passed|failed|error|skipped|deselected)|no tests ran", line)]
    said = [*said[-1:], *(line for line in lines if "SUMMARY:" in line)]
    of = next(
        (f" (of {found[1]} tests)" for line in lines if (found := re.match(r"\d+ workers? \[(\d+) items?\]", line))), ""
    )
    return "; ".join(line.strip("= ") for line in said or lines[-1:] or ["no output"]) + of


def failures(lines: list[str]) -> list[str]:
    """pytest's failures, those of one test function for one reason as one."""
    groups: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        if match := re.match(r"(FAILED|ERROR) (\S+?::)?(\w+)(\S*)(?: - (.*))?$", line):
            kind, file, function, case, reason = match.groups(default="")
            alike = re.sub(r"\d[\d.e+-]*", "#", reason)[:60]
            groups.setdefault((file + function, alike), []).append(f"{kind} {file}{function}{case} {reason}".strip())
    return [f"{len(same)} × {same[0]}" if len(same) > 1 else same[0] for same in groups.values()]


def findings(lines: list[str]) -> list[str]:
    """compute-sanitizer's findings, alike ones as one: what, and in which kernel."""
    said = [line.removeprefix("=========") for line in lines if line.startswith("=========")]
    counts: dict[str, int] = {}
    for line, following in itertools.pairwise([*said, ""]):
        if re.match(r" (Invalid|Misaligned|Error: (Race|Potential)|Warning: (Race|Potential)|Barrier|Warpgroup)", line):
            kernels = re.findall(r" at (.+?)\(", line + following)
            what = re.sub(r" at .*| by thread.*|\(.*", "", line).strip()
            what += f" in {' and '.join(dict.fromkeys(kernels))}" if kernels else ""
            counts[what] = counts.get(what, 0) + 1
    return [f"{count} × {what}" for what, count in counts.items()]
