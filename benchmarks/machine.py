"""What a result must carry: the machine, the versions, the commit; and how busy others kept the CPU meanwhile."""

import os
import platform
import subprocess
import time
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


def versions() -> dict:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
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
