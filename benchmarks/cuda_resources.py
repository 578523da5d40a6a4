"""Tabulates what each CUDA C++ kernel takes on each architecture in `_cuda`, read from the library itself: registers,
stack, spills (local loads and stores), shared memory, and the instructions that it must, or must not, contain.

    python -m benchmarks.cuda_resources [--write]

Without --write it prints; with it, it writes benchmarks/results/cuda/<architecture>.csv. Exit status 1 where a
kernel spills or lacks its instructions. Needs cuobjdump (CUDA toolkit, or Triton), no GPU. Shared memory is what the
launch asks for at most, from the kernels' own constants, compiled here; that of cross_entropy grows with the row.
"""

import argparse
import csv
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "cuda"
FIELDS = ["kernel", "registers", "stack_bytes", "local_instructions", "shared_bytes", "tensor_core", "async_copies"]
FIELDS += ["wgmma_groups", "given", "taken"]  # on sm_90a; a producer's registers by setmaxnreg, and a consumer's
#: instruction mnemonics in SASS
LOCAL, TENSOR_CORE, ASYNC_COPY = r"\b(?:LDL|STL)\b", r"\bHMMA\b", r"\bLDGSTS\b"
WGMMA, TMA = r"\bHGMMA\b", r"\bUTMALDG\b"  # what kernels for sm_90a must contain instead
WGMMA_GROUP = r"\bHGMMA\b.*\bgsb0\b"  # the last wgmma before it is committed
SETMAXNREG = r"\bUSETMAXREG\.(DEALLOC|TRY_ALLOC)\.\S+ (?:UP\d, )?(0x[0-9a-f]+)"
BUDGETS = """
#include <cstdio>
#include "cuda/attention90_backward.cuh"
#include "cuda/linear_cross_entropy.cuh"
#include "cuda/lora.cuh"
#include "cuda/lora90.cuh"
using namespace pyfast;
template <class T, int kDim> void print(const char* type) {
  using Q = cuda::Tiling<T, kDim, true>; using K = cuda::Tiling<T, kDim, false>;
  std::printf("attention_kernel<%s, %d %d\\n", type, kDim, Q::shared_bytes(1));
  std::printf("attention_dq_kernel<%s, %d %d\\n", type, kDim, Q::shared_bytes(2));
  std::printf("attention_dkv_kernel<%s, %d %d\\n", type, kDim, K::shared_bytes(2));
}
template <class T, bool kADeep, bool kBDeep> void product(const char* type) {
  const char* const flags[] = {"false", "true"}; const int bytes = cuda::Gemm<T, kADeep, kBDeep>::kSharedBytes;
  std::printf("gemm_kernel<%s, %s, %s %d\\n", type, flags[kADeep], flags[kBDeep], bytes);
  if (!kADeep) std::printf("logits_kernel<%s, %s %d\\n", type, flags[kBDeep], bytes);
}
template <class T> void product90(const char* type) {
  const int bytes = cuda::Gemm90<T, true>::kSharedBytes;
  std::printf("gemm90_kernel<%s, true %d\\nlogits90_kernel<%s %d\\n", type, bytes, type, bytes);
  std::printf("lora90_kernel<%s %d\\n", type, cuda::Lora90<T>::kSharedBytes);
}
template <class T, int kDim> void attention90(const char* type) {
  const int bytes = cuda::Backward90<T, kDim>::kSharedBytes;
  std::printf("attention90_kernel<%s, %d %d\\n", type, kDim, cuda::Attention90<T, kDim>::kSharedBytes);
  std::printf("attention_dq90_kernel<%s, %d %d\\n", type, kDim, bytes);
  std::printf("attention_dkv90_kernel<%s, %d %d\\n", type, kDim, bytes);
}
template <class T> void widths(const char* type) {
  print<T, 64>(type); print<T, 128>(type); print<T, 256>(type);
  product<T, false, false>(type); product<T, false, true>(type); product<T, true, true>(type);
}
template <class T, int kRank> void lora(const char* type) {
  for (const char* up : {"false", "true"}) {
    std::printf("lora_kernel<%s, %d, %s, false %d\\n", type, kRank, up,
                cuda::LoraTiles<T, kRank, false>::shared_bytes(true));
    std::printf("lora_kernel<%s, %d, %s, true %d\\n", type, kRank, up,
                cuda::LoraTiles<T, kRank, true>::shared_bytes(true));
  }
}
int main() {
  widths<float>("float"); widths<bf16>("bf16"); widths<fp16>("fp16");
  product90<bf16>("bf16"); product90<fp16>("fp16");
  attention90<bf16, 64>("bf16"); attention90<bf16, 128>("bf16");
  attention90<fp16, 64>("fp16"); attention90<fp16, 128>("fp16");
  lora<float, 16>("float"); lora<float, 32>("float");
  lora<bf16, 16>("bf16"); lora<bf16, 32>("bf16"); lora<bf16, 64>("bf16");
  lora<fp16, 16>("fp16"); lora<fp16, 32>("fp16"); lora<fp16, 64>("fp16");
}
"""


def cuobjdump() -> str:
    """The toolkit's, or the one in Triton's package."""
    found = shutil.which("cuobjdump")
    if found is None and (triton := importlib.util.find_spec("triton")):
        found = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if found is None:
        sys.exit("cuobjdump was not found: it comes with the CUDA toolkit, and with Triton (pip install triton)")
    return str(found)


def output(*command) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def readable(mangled: str) -> str:
    """A kernel's name and template arguments, without namespaces and parameters."""
    name = output("c++filt", mangled).strip()
    name = re.sub(r"pyfast::(cuda::)?|\(anonymous namespace\)::|^void ", "", name)
    return re.sub(r"\(bool\)|\(int\)", "", re.sub(r"\((?!bool|int).*", "", name))


def shared_budgets() -> dict[str, int]:
    """The first part of a kernel's name and template arguments -> bytes of dynamic shared memory."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "budgets.cpp"
        source.write_text(BUDGETS)
        program = Path(folder) / "budgets"
        flags = ["-std=c++20", "-w", "-DPYFAST_EMULATOR", f"-I{ROOT / 'csrc'}"]
        subprocess.run(["g++", *flags, source, "-o", program], check=True)
        return {line.rsplit(" ", 1)[0]: int(line.rsplit(" ", 1)[1]) for line in output(program).splitlines()}


def tables(library: Path) -> dict[str, list[dict]]:
    """architecture -> rows."""
    tool, budgets = cuobjdump(), shared_budgets()
    rows: dict[str, list[dict]] = {}
    for architecture in sorted(set(re.findall(r"sm_\d+a?", output(tool, "--list-elf", library)))):
        usage = output(tool, "--dump-resource-usage", "-arch", architecture, library)
        sass = output(tool, "-sass", "-arch", architecture, library)
        bodies = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function :|\Z)", sass, re.S))
        for mangled, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage):
            body, name = bodies.get(mangled, ""), readable(mangled)
            if "kernel" not in name or ("90_kernel" in name and architecture != "sm_90a"):
                continue  # a function that kernels call, or a kernel that has its body on sm_90a alone
            needed = (WGMMA, TMA) if "90_kernel" in name else (TENSOR_CORE, ASYNC_COPY)
            local, multiply, copy = (len(re.findall(p, body)) for p in (LOCAL, *needed))
            shared = next((size for key, size in budgets.items() if re.match(re.escape(key) + "[,>]", name)), "")
            values = (name, int(registers), int(stack), local, shared, multiply, copy)
            if "90_kernel" in name:
                limits = {action: int(count, 16) for action, count in re.findall(SETMAXNREG, body)}
                values += (len(re.findall(WGMMA_GROUP, body)), limits.get("DEALLOC", ""), limits.get("TRY_ALLOC", ""))
            values += ("",) * (len(FIELDS) - len(values))
            rows.setdefault(architecture, []).append(dict(zip(FIELDS, values, strict=True)))
        rows[architecture].sort(key=lambda row: row["kernel"])
    return rows


def faults(rows: list[dict]) -> list[str]:
    """What breaks a rule: no spills; tensor cores and asynchronous copies in 16-bit products; on sm_90a several wgmma
    in flight, and no more registers taken than there are, for which a kernel would wait without end."""
    found = []
    for row in rows:
        copies = re.match(r"(?:attention\w*|gemm|gemm90|logits|logits90|lora|lora90)_kernel", row["kernel"])
        multiplies = copies or row["kernel"].startswith("quantized_linear")
        if row["local_instructions"]:
            found.append(f"{row['kernel']}: {row['local_instructions']} local loads and stores")
        if copies and not row["async_copies"]:
            found.append(f"{row['kernel']}: no asynchronous copies")
        if multiplies and "<float" not in row["kernel"] and not row["tensor_core"]:
            found.append(f"{row['kernel']}: no tensor-core instructions")
        if "90_kernel" not in row["kernel"]:
            continue
        if 2 * row["wgmma_groups"] > row["tensor_core"]:  # as nvcc's remarks C7510 and C7515 say
            found.append(f"{row['kernel']}: its wgmma are serialized")
        groups = (64 << 10) // (128 * row["registers"])  # of warps; one gives, the others take
        if not row["given"] or not row["taken"]:
            found.append(f"{row['kernel']}: setmaxnreg was ignored")
        elif row["given"] + (groups - 1) * row["taken"] > groups * row["registers"]:
            found.append(f"{row['kernel']}: setmaxnreg asks for more registers than the block has")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    library = next((ROOT / "pyfast").glob("_cuda.*so"), None)
    if library is None:
        sys.exit("pyfast/_cuda.*.so was not built: install nvcc, then run `make build`")
    wrong = []
    for architecture, rows in tables(library).items():
        if options.write:
            RESULTS.mkdir(parents=True, exist_ok=True)
        target = (RESULTS / f"{architecture}.csv").open("w", newline="") if options.write else sys.stdout
        writer = csv.DictWriter(target, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        wrong += [f"{architecture}: {fault}" for fault in faults(rows)]
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
