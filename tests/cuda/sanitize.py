"""Runs tests/cuda with the emulator, and the CUDA kernels in it, under AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/cuda/sanitize.py [pytest's arguments]        or: make sanitize

Builds `_emu` in build/sanitized and tests a copy of the package that holds it. A finding ends the tests with a report.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "csrc"))
import toolchain  # noqa: E402

FOLDER = Path("build") / "sanitized"
FLAGS = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"


def main(arguments: list[str]) -> int:
    name = next((ROOT / "pyfast").glob("_emu.*so")).name
    (ROOT / FOLDER).mkdir(parents=True, exist_ok=True)
    (ROOT / FOLDER / "build.ninja").write_text(toolchain.ninja_file(ROOT, {"_emu": name}, FOLDER, FLAGS))
    subprocess.run([sys.executable, "-m", "ninja", "-C", ROOT, "-f", FOLDER / "build.ninja"], check=True)
    # Python itself is built without the sanitizers: their runtimes have to be there before it
    runtimes = [
        subprocess.run([toolchain.CXX, f"-print-file-name={lib}"], capture_output=True, text=True, check=True).stdout
        for lib in ("libasan.so", "libstdc++.so")
    ]
    environment = os.environ | {"LD_PRELOAD": ":".join(map(str.strip, runtimes)), "ASAN_OPTIONS": "detect_leaks=0"}
    with tempfile.TemporaryDirectory() as folder:
        ignored = shutil.ignore_patterns("__pycache__", "_emu.*", "_cuda.*")
        for part in ("pyfast", "tests", "kernels", "benchmarks", "csrc"):
            shutil.copytree(ROOT / part, Path(folder) / part, ignore=ignored, symlinks=True)
        shutil.copy(ROOT / "pyproject.toml", folder)
        shutil.copy(ROOT / FOLDER / name, Path(folder) / "pyfast")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/cuda"]
        command += ["--deselect", "tests/cuda/test_emulator.py::test_compiles_for_gpus", *arguments]  # nvcc crashes
        return subprocess.run(command, cwd=folder, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["-m", "not slow"]))
