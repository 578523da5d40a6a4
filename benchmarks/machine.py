"""What a result must carry: the machine, the versions, the commit; and how busy others kept the CPU meanwhile."""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "peft", "pyfast-kernels")


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def machine() -> dict:
    from pyfast import dispatch

    isa = torch.ops.pyfast_cpu.get_isa() if dispatch.unavailable("cpu") is None else "none"
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "isa": isa, "threads": torch.get_num_threads()}


def require_kernels() -> None:
    """Ends the run where PyFast's kernels cannot be used: PyTorch would be measured in their place."""
    from pyfast import dispatch

    if reason := dispatch.unavailable("cpu"):
        raise SystemExit(f"nothing to measure: {reason}")


def elements_beyond_cache() -> int:
    """Elements of a tensor that takes half of the last-level cache in fp32: an op on two or more runs from memory."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")  # such as 480M; a container may hide them
    units = {"K": 10, "M": 20, "G": 30}
    cache = max((int(s[:-1]) << units[s[-1]] for s in (p.read_text().strip() for p in sizes)), default=0)
    return max(32 << 20, cache // 2 // 4)


def folder_name() -> str:
    """A folder name for this machine's results, such as xeon-amx-4-cores."""
    found = machine()
    name = re.sub(r"\((r|tm)\)|\b(intel|amd|cpu|processor)\b|@.*", " ", found["cpu"].lower())
    return re.sub(r"[^a-z0-9]+", "-", f"{name} {found['isa']} {found['cores']} cores").strip("-")


def data_folder() -> Path | None:
    """The real data sets: PYFAST_DATA, else ../shared/data beside the repository; None where there are none."""
    folder = Path(os.environ.get("PYFAST_DATA", Path(__file__).resolve().parents[1] / ".." / "shared" / "data"))
    return folder if folder.is_dir() else None


def resident_mb(field: str = "VmRSS") -> float:
    """Resident memory of this process (VmRSS), or its peak since `forget_peak` (VmHWM), in MB of 2^20 bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    """The peak starts anew at what is resident now, once free memory was given back: malloc's, and what PyFast keeps
    for its large results."""
    from pyfast import dispatch

    if dispatch.unavailable("cpu") is None:
        torch.ops.pyfast_cpu.empty_cache()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_mb(function: Callable) -> float:
    """The most memory that a call holds beyond what is resident before it, its results included."""
    forget_peak()
    before = resident_mb()
    function()
    return max(0.0, resident_mb("VmHWM") - before)


def versions() -> dict:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if shutil.which("git"):
        command = ["git", "rev-parse", "--short", "HEAD"]
        git = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
        if git.returncode == 0:
            found["commit"] = git.stdout.strip()
    return found


class OthersLoad:
    """The share of this machine's CPU time that other processes took inside a `with` block, between 0 and 1."""

    def __enter__(self):
        self._start = self._now()
        return self

    def __exit__(self, *_):
        wall, busy, own = (after - before for before, after in zip(self._start, self._now(), strict=True))
        self.share = max(0.0, (busy - own) / (wall * os.cpu_count()))

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Wall time; CPU time since boot of all processes, stolen time included; and CPU time of this one."""
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, time.process_time()
