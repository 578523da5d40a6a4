"""Builds the native libraries with ninja: `_cpu`, csrc/binding/*.cpp (torch's stable ABI) and csrc/cpu/*.cpp,
the latter once per instruction set; and `_info`, csrc/info.cpp (pybind11), which tells how this build was made.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from shlex import quote

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
ISAS = {
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -mprefer-vector-width=512",
}
COMMON = "-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wno-psabi -Wno-maybe-uninitialized -Wno-uninitialized -Icsrc"
CXX = os.environ.get("CXX", "g++")
# one folder for every way to build, so that an editable install and `make build` share their objects
FOLDER = Path("build") / f"native-{sys.implementation.cache_tag}"


def sources(folder: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / folder).glob("*.cpp"))


class NinjaBuild(build_ext):
    """Writes one build.ninja for all native libraries. A missing compiler leaves a pure Python package, and says so."""

    def build_extensions(self):
        (ROOT / FOLDER).mkdir(parents=True, exist_ok=True)
        (ROOT / FOLDER / "build.ninja").write_text(self.ninja_file())
        ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        subprocess.check_call([*command, "-C", str(ROOT), "-f", str(FOLDER / "build.ninja")])
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / FOLDER / target.name, target)

    def ninja_file(self) -> str:
        import torch
        from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

        # TORCH_TARGET_VERSION: the oldest torch whose stable ABI is used, 2.11
        torch_flags = (
            " ".join(f"-isystem {quote(p)}" for p in include_paths()) + " -DTORCH_TARGET_VERSION=0x020b000000000000"
        )
        lines = [
            f"builddir = {FOLDER}",
            "rule cxx",
            f"  command = {CXX} -MMD -MF $out.d {COMMON} $flags -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc",
            f"rule link\n  command = {CXX} -shared $in $flags -o $out",
        ]
        objects: dict[str, list[str]] = {"_cpu": [], "_info": []}

        def compile_(library: str, source: str, flags: str, tag: str = ""):
            target = FOLDER / f"{source.replace('/', '_')}{tag}.o"
            objects[library].append(str(target))
            lines.extend([f"build {target}: cxx {source}", f"  flags = {flags}"])

        for source in sources("csrc/binding"):
            compile_("_cpu", source, torch_flags)
        # AVX2 objects first: of a standard-library template that both instantiate, the linker keeps the first one
        for isa, flags in ISAS.items():
            for source in sources("csrc/cpu"):
                compile_("_cpu", source, f"{flags} -DPYFAST_ISA={isa}", f".{isa}")
        python = quote(sysconfig.get_path("include"))
        version = f"-DPYFAST_TORCH_VERSION='\"{torch.__version__}\"'"
        compile_("_info", "csrc/info.cpp", f"{torch_flags} -I{python} {version}")
        for library, flags in (("_cpu", f"-L{quote(TORCH_LIB_PATH)} -ltorch_cpu -lc10 -ldl"), ("_info", "")):
            path = FOLDER / self.get_ext_filename(library)
            lines.extend([f"build {path}: link {' '.join(objects[library])}", f"  flags = {flags}", f"default {path}"])
        return "\n".join(lines) + "\n"


def extensions() -> list[Extension]:
    if not {"build_ext", "bdist_wheel", "install", "develop", "editable_wheel", "build"} & set(sys.argv):
        return []  # metadata and sdist need neither torch nor a compiler
    try:
        import torch  # noqa: F401
    except ImportError:
        sys.exit("pyfast: install torch first, then run `pip install --no-build-isolation .`: the build needs it")
    if shutil.which(CXX) is None:
        print("pyfast: no C++ compiler (g++) found: installing without native kernels; PyTorch will serve every op")
        return []
    return [Extension("pyfast._cpu", []), Extension("pyfast._info", [])]


setup(
    packages=[*find_packages(include=["pyfast", "pyfast.*"]), "pyfast.kernels", "pyfast.benchmarks"],
    ext_modules=extensions(),
    cmdclass={"build_ext": NinjaBuild},
)
