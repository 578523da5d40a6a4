"""Builds the native libraries with ninja.

`_cpu`   csrc/binding/*.cpp (torch's stable ABI) and csrc/cpu/*.cpp, the latter compiled once per instruction set
`_info`  csrc/info.cpp (pybind11): how this build was made and what this CPU has
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
ISAS = {
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -mprefer-vector-width=512",
}
COMMON = (
    "-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wno-psabi -Wno-unknown-pragmas -Wno-maybe-uninitialized -Icsrc"
)


def sources(folder: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / folder).glob("*.cpp"))


class NinjaBuild(build_ext):
    """Writes one build.ninja for all native libraries. A missing compiler leaves a pure Python package, and says so."""

    def build_extensions(self):
        if not self.extensions:
            return
        # one folder for every way to build, so that an editable install and `make build` share their objects
        folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self.ninja_file(folder))
        ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        subprocess.check_call([*command, "-C", str(ROOT), "-f", str(folder / "build.ninja")])
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / target.name, target)

    def ninja_file(self, folder: Path) -> str:
        import torch
        from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

        torch_flags = " ".join(f"-isystem {p}" for p in include_paths())
        torch_flags += " -DTORCH_TARGET_VERSION=0x020b000000000000"  # the oldest torch whose stable ABI is used: 2.11
        lines = [
            f"builddir = {folder}",
            "rule cxx",
            f"  command = {os.environ.get('CXX', 'g++')} -MMD -MF $out.d {COMMON} $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {os.environ.get('CXX', 'g++')} -shared $in $flags -o $out",
        ]
        objects: dict[str, list[str]] = {"_cpu": [], "_info": []}

        def compile_(library: str, source: str, flags: str, tag: str = ""):
            target = folder / f"{source.replace('/', '_')}{tag}.o"
            objects[library].append(str(target))
            lines.extend([f"build {target}: cxx {source}", f"  flags = {flags}"])

        for source in sources("csrc/binding"):
            compile_("_cpu", source, torch_flags)
        # AVX2 objects first: of a standard-library template that both instantiate, the linker keeps the first one
        for isa, flags in ISAS.items():
            for source in sources("csrc/cpu"):
                compile_("_cpu", source, f"{flags} -DPYFAST_ISA={isa}", f".{isa}")
        info = f"{torch_flags} -I{sysconfig.get_path('include')} -DPYFAST_TORCH_VERSION='\"{torch.__version__}\"'"
        compile_("_info", "csrc/info.cpp", info)
        for library, flags in (("_cpu", f"-L{TORCH_LIB_PATH} -ltorch_cpu -lc10 -ldl"), ("_info", "")):
            path = folder / self.get_ext_filename(library)
            lines.extend([f"build {path}: link {' '.join(objects[library])}", f"  flags = {flags}", f"default {path}"])
        return "\n".join(lines) + "\n"


def extensions() -> list[Extension]:
    if not {"build_ext", "bdist_wheel", "install", "develop", "editable_wheel", "build"} & set(sys.argv):
        return []  # metadata and sdist need neither torch nor a compiler
    try:
        import torch  # noqa: F401
    except ImportError:
        sys.exit(
            "pyfast: install torch first, then run `pip install --no-build-isolation .` so that the build finds it"
        )
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        print("pyfast: no C++ compiler (g++) found: installing without native kernels; PyTorch will serve every op")
        return []
    return [Extension("pyfast._cpu", []), Extension("pyfast._info", [])]


setup(
    packages=[*find_packages(include=["pyfast", "pyfast.*"]), "pyfast.kernels", "pyfast.benchmarks"],
    ext_modules=extensions(),
    cmdclass={"build_ext": NinjaBuild},
)
