"""What the native libraries are made of and how they are compiled, for setup.py; `python csrc/toolchain.py sm_90a`, by
itself, builds `_cuda` in place for one architecture, in a third of the time.

`_cpu`: csrc/binding/*.cpp (torch's stable ABI) and csrc/cpu/*.cpp, the latter once per instruction set. `_cuda`:
csrc/cuda/*.cu by nvcc, with csrc/binding/cuda/*.cpp and the static CUDA runtime; it loads beside a torch without CUDA.
`_emu`: the same sources by the C++ compiler, under csrc/emulator. `_info`: csrc/info.cpp (pybind11), which tells how
this build was made.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from shlex import quote
from typing import NamedTuple

ISAS = {
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -mprefer-vector-width=512",
}
COMMON = "-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wno-psabi -Wno-maybe-uninitialized -Wno-uninitialized -Icsrc"
CXX = os.environ.get("CXX", "g++")
# one folder for every way to build, so that an editable install and `make build` share their objects
FOLDER = Path("build") / f"native-{sys.implementation.cache_tag}"

#: what `_cuda` holds: machine code for these, and PTX of the last, which newer GPUs compile when it is loaded
ARCHITECTURES = ("sm_80", "sm_90a", "compute_90")
OLDEST = (12, 8)


class Cuda(NamedTuple):
    nvcc: Path
    runtime: Path  # libcudart_static.a
    version: str


def architecture_flags(architectures=ARCHITECTURES) -> str:
    """For nvcc."""
    pairs = [(f"compute_{a.split('_')[1]}", a) for a in architectures]
    return " ".join(f"-gencode arch={virtual},code={real}" for virtual, real in pairs)


def architecture_for(capability: tuple[int, int]) -> str:
    """The one of ARCHITECTURES that a GPU of this compute capability runs."""
    return "sm_80" if capability < (9, 0) else "sm_90a" if capability == (9, 0) else "compute_90"


def find_cuda() -> Cuda | str:
    """The toolkit, or why there is none that serves."""
    home = os.environ.get("CUDA_HOME")
    packages = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu1*/bin/nvcc"), reverse=True)
    candidates = [home and Path(home) / "bin" / "nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc", *packages]
    reason = "no nvcc found: set CUDA_HOME, or pip install 'pyfast-kernels[cuda-build]'"
    for nvcc in map(Path, filter(None, candidates)):
        if not nvcc.exists():
            continue
        # what it says of itself: on PATH there may be a script that calls it
        said = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
        here = re.search(r"_HERE_=(.+)", said)
        home = Path(here[1]).parent if here else nvcc.parents[1]
        listed = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release (\d+)\.(\d+)", listed)
        headers = next((p for p in (home / "include", *home.glob("targets/*/include")) if p.is_dir()), None)
        places = [home / "lib64", home / "lib", *home.glob("targets/*/lib")]
        runtime = next((p / "libcudart_static.a" for p in places if (p / "libcudart_static.a").exists()), None)
        if not release or headers is None or runtime is None:
            reason = f"the CUDA toolkit in {home} is not whole: nvcc, its headers or libcudart_static.a are missing"
        elif (version := tuple(map(int, release.groups()))) < OLDEST:
            reason = "nvcc in {} is {}.{}, expected {}.{} or later".format(home, *version, *OLDEST)
        else:
            return Cuda(nvcc, runtime, ".".join(release.groups()))
    return reason


def ninja_file(
    root: Path, libraries: dict[str, str], folder: Path = FOLDER, sanitizers: str = "", architectures=ARCHITECTURES
) -> str:
    """build.ninja for `libraries` (name -> file name), made in `folder`; sanitizers: flags for g++; architectures: what
    `_cuda` holds."""
    import torch
    from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

    # TORCH_TARGET_VERSION: the oldest torch whose stable ABI is used, 2.11
    includes = " ".join(f"-isystem {quote(p)}" for p in include_paths())
    torch_flags = f"{includes} -DTORCH_TARGET_VERSION=0x020b000000000000"
    torch_libraries = f"-L{quote(TORCH_LIB_PATH)} -ltorch_cpu -lc10 -ldl"
    link = {"_cpu": torch_libraries, "_emu": f"{torch_libraries} -lpthread", "_info": ""}
    depfile = "  depfile = $out.d\n  deps = gcc"
    lines = [
        f"builddir = {folder}",
        f"rule cxx\n  command = {CXX} -MMD -MF $out.d {COMMON} {sanitizers} $flags -c $in -o $out\n{depfile}",
        f"rule link\n  command = {CXX} -shared {sanitizers} $in $flags -o $out",
    ]
    objects: dict[str, list[str]] = {library: [] for library in libraries}

    def compile_(library: str, pattern: str, flags: str = "", tag: str = "", rule: str = "cxx"):
        for source in sorted(str(p.relative_to(root)) for p in root.glob(pattern)):
            target = folder / f"{source.replace('/', '_')}{tag}.o"
            objects[library].append(str(target))
            lines.extend([f"build {target}: {rule} {source}", f"  flags = {flags}"])

    if "_cpu" in libraries:
        compile_("_cpu", "csrc/binding/*.cpp", torch_flags)
        # AVX2 objects first: of a standard-library template that both instantiate, the linker keeps the first one
        for isa, flags in ISAS.items():
            compile_("_cpu", "csrc/cpu/*.cpp", f"{flags} -DPYFAST_ISA={isa}", f".{isa}")
    if "_emu" in libraries:
        emulator = "-DPYFAST_EMULATOR -Wno-unknown-pragmas"
        for pattern in ("csrc/binding/cuda/*.cpp", "csrc/emulator/*.cpp"):
            compile_("_emu", pattern, f"{emulator} {torch_flags}", ".emulator")
        compile_("_emu", "csrc/cuda/*.cu", f"{emulator} -x c++", ".emulator")
    if "_cuda" in libraries:
        cuda = find_cuda()
        flags = "-std=c++20 -O3 -Icsrc -Xcompiler -fPIC,-fvisibility=hidden"
        command = f"{quote(str(cuda.nvcc))} -ccbin {CXX} -MMD -MF $out.d {flags} {architecture_flags(architectures)}"
        lines.append(f"rule nvcc\n  command = {command} -c $in -o $out\n{depfile}")
        names = f"-DPYFAST_ARCHITECTURES='\"{', '.join(architectures)}\"'"
        compile_("_cuda", "csrc/binding/cuda/*.cpp", f"{names} {torch_flags}")
        compile_("_cuda", "csrc/cuda/*.cu", rule="nvcc")
        link["_cuda"] = f"{quote(str(cuda.runtime))} {torch_libraries} -lrt -lpthread"
    if "_info" in libraries:
        python = quote(sysconfig.get_path("include"))
        version = f"-DPYFAST_TORCH_VERSION='\"{torch.__version__}\"'"
        compile_("_info", "csrc/info.cpp", f"{includes} -I{python} {version}")
    for library, file in libraries.items():
        path = folder / file
        lines += [f"build {path}: link {' '.join(objects[library])}", f"  flags = {link[library]}", f"default {path}"]
    return "\n".join(lines) + "\n"


def build(root: Path, libraries: dict[str, str], folder: Path = FOLDER, architectures=ARCHITECTURES) -> None:
    """Makes `libraries` in `folder` by what ninja_file says."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / folder / "build.ninja").write_text(ninja_file(root, libraries, folder, architectures=architectures))
    ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
    subprocess.check_call([*command, "-C", str(root), "-f", str(folder / "build.ninja")])


def install(made: Path, target: Path) -> None:
    """Beside what is there, then in its place: a process that has the old one loaded keeps it."""
    fresh = target.with_suffix(".new")
    shutil.copy(made, fresh)
    fresh.replace(target)


if __name__ == "__main__":
    architecture, project = sys.argv[1], Path(__file__).resolve().parents[1]
    file, folder = f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}", FOLDER.with_name(f"{FOLDER.name}-{architecture}")
    build(project, {"_cuda": file}, folder, (architecture,))
    install(project / folder / file, project / "pyfast" / file)
