"""Builds the native libraries with ninja, by the rules of csrc/toolchain.py: `_cpu`, `_info`, `_cuda` where nvcc is
found, and, in a checkout, `_emu`, the CUDA kernels under the emulator, for tests.
"""

import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import toolchain  # noqa: E402


class NinjaBuild(build_ext):
    """Writes one build.ninja for all native libraries. A missing compiler leaves a pure Python package, and says so."""

    def build_extensions(self):
        libraries = {e.name.split(".")[1]: self.get_ext_filename(e.name.split(".")[1]) for e in self.extensions}
        toolchain.build(ROOT, libraries)
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            toolchain.install(ROOT / toolchain.FOLDER / target.name, target)


def extensions() -> list[Extension]:
    if not {"build_ext", "bdist_wheel", "install", "develop", "editable_wheel", "build"} & set(sys.argv):
        return []  # metadata and sdist need neither torch nor a compiler
    try:
        import torch
    except ImportError:
        sys.exit("pyfast: install torch first, then run `pip install --no-build-isolation .`: the build needs it")
    if shutil.which(toolchain.CXX) is None:
        print("pyfast: no C++ compiler (g++) found: installing without native kernels; PyTorch will serve every op")
        return []
    libraries = ["_cpu", "_info"]
    if "editable_wheel" in sys.argv and torch.version.cuda is None:
        return as_extensions(libraries)  # nothing here can run CUDA kernels; `make build` compiles them for the tests
    if "bdist_wheel" not in sys.argv:
        libraries.append("_emu")
    cuda = toolchain.find_cuda()
    if isinstance(cuda, toolchain.Cuda):
        libraries.append("_cuda")
    else:
        print(f"pyfast: {cuda}; installing without CUDA C++ kernels")
    return as_extensions(libraries)


def as_extensions(libraries: list[str]) -> list[Extension]:
    return [Extension(f"pyfast.{library}", []) for library in libraries]


setup(
    packages=[*find_packages(include=["pyfast", "pyfast.*"]), "pyfast.kernels", "pyfast.benchmarks"],
    ext_modules=extensions(),
    cmdclass={"build_ext": NinjaBuild},
)
