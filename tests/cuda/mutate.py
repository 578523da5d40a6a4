"""Plants errors in the CUDA kernels, one at a time, and shows that the tests catch every one of them.

    python tests/cuda/mutate.py [NAME ...] [--jobs 2]

Each compiles one kernel file with one piece replaced, links it with the other objects of the last `make build` into an
emulator of its own, and runs the named tests in a copy of the package; it is caught if they fail. Exit status 1, with
the survivors' names, if any is not.
"""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from torch.utils.cpp_extension import TORCH_LIB_PATH

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "csrc"), str(ROOT / "tests")]
import mutations  # noqa: E402
import toolchain  # noqa: E402


class Mutation(NamedTuple):
    """In csrc/cuda/<file>, which `old` names once, it becomes `new`; csrc/cuda/<kernel>.cu is compiled with it, and
    tests/cuda/test_op_<the kernel's op>.py -k `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    kernel: str
    tests: str


LOSS, LOSS_FILE = "cross_entropy", "cross_entropy.cuh"
HEADS, TILES = "attention.cuh", "tile.cuh"
BF16, FP32 = "attention_bf16", "attention_fp32"
RULE = "test_error_rule"
MUTATIONS = [
    Mutation("dropped rescale", LOSS_FILE, "sum *= exp(max - shift);", "", LOSS, "largest_logit_moves"),
    Mutation("smoothing not rescaled", LOSS_FILE, "if (weights != 0.f) below += weights * (max - shift);", "", LOSS,
             f"{RULE} and smoothing"),
    Mutation("no barrier before the warps join", LOSS_FILE, "__syncthreads();\n  state = lane < warps",
             "state = lane < warps", LOSS, RULE),
    Mutation("no barrier before the gradient", LOSS_FILE, "{\n    __syncthreads();\n    const RowGradient",
             "{\n    const RowGradient", LOSS, RULE),
    Mutation("no cluster barrier before the sums are read", LOSS_FILE,
             "cluster_barrier();\n    state = Softmax::none();", "state = Softmax::none();", LOSS, "long_rows"),
    Mutation("a block leaves while its sums are read", LOSS_FILE, "cluster_barrier();  // no", "// no", LOSS,
             "blocks_of_a_cluster"),
    Mutation("elements before the row", LOSS_FILE, "begin + i >= 0 && begin + i < classes ? x",
             "begin + i < classes ? x", LOSS, "begin_anywhere"),
    Mutation("elements after the row", LOSS_FILE, "begin + i >= 0 && begin + i < classes ? x", "begin + i >= 0 ? x",
             LOSS, "begin_anywhere"),
    Mutation("vectors where they are not aligned", LOSS_FILE, "if (aligned_alike && x.whole(first))",
             "if (x.whole(first))", LOSS, "begin_anywhere"),
    Mutation("no target in the gradient", LOSS_FILE, "if (at == target) d[i] = g.target;", "", LOSS, RULE),
    Mutation("the softcap's slope", LOSS_FILE, "slope = (1.f - t) * (1.f + t);", "", LOSS, f"{RULE} and softcap"),
    Mutation("ignored rows keep what was there", LOSS_FILE, "c += threads) store(c, zeros);", "c += threads) {}", LOSS,
             RULE),
    Mutation("a bad target passes", LOSS_FILE, "+ 0.0 * x_target", "", LOSS, "out_of_range"),
    Mutation("a's matrices", TILES, "k / 8 + lane / 16", "k / 8 + lane / 8 % 2", BF16, f"{RULE} and bfloat16"),
    Mutation("b's matrices", TILES, "k + matrix % 2 * 8 + within, n / 8 + matrix / 2",
             "k + matrix / 2 * 8 + within, n / 8 + matrix % 2", BF16, f"{RULE} and bfloat16"),
    Mutation("the swizzle", TILES, "load_matrices<false>(r, b.chunk(n + matrix / 2 * 8 + within, k / 8 + matrix % 2))",
             "load_matrices<false>(r, b.data + (n + matrix / 2 * 8 + within) * b.kStride + k + matrix % 2 * 8)", BF16,
             f"{RULE} and bfloat16"),
    Mutation("columns beyond the head's width", TILES, "dim - column < kChunk ? dim - column : kChunk", "kChunk", BF16,
             f"{RULE} and bfloat16"),
    Mutation("asynchronous copies of what is not aligned", TILES, "if (aligned) {", "if (true) {", BF16,
             f"{RULE} and odd and bfloat16"),
    Mutation("no barrier before scratch is written", TILES, "__syncwarp();  // the last", "// the last", FP32,
             f"{RULE} and float32"),
    Mutation("no barrier before scratch is read", TILES, "__syncwarp();\n    multiply<", "multiply<", FP32,
             f"{RULE} and float32"),
    Mutation("a copy not waited for", TILES, "wait_copies<1>", "wait_copies<2>", BF16, f"{RULE} and bfloat16"),
    Mutation("no barrier before the work", TILES, "__syncthreads();\n    work(", "work(", BF16, f"{RULE} and bfloat16"),
    Mutation("no barrier after the work", TILES, "__syncthreads();  // all are done", "// all are done", BF16,
             f"{RULE} and bfloat16"),
    Mutation("the wrong stage", TILES, "load(at + kInner, stage ^ 1)", "load(at + kInner, stage)", BF16,
             f"{RULE} and bfloat16"),
    Mutation("the sums not rescaled", HEADS, "acc[j][2 * h] *= rescale, acc[j][2 * h + 1] *= rescale;", "{}", BF16,
             f"{RULE} and bfloat16"),
    Mutation("the denominator not rescaled", HEADS, "total[h] *= rescale;", "", BF16, f"{RULE} and bfloat16"),
    Mutation("the maximum of half a row", HEADS, "largest[h] = fmaxf(largest[h], __shfl_xor_sync(~0u, largest[h], 2));",
             "", BF16, f"{RULE} and bfloat16"),
    Mutation("the denominator of half a row", HEADS, "total[h] += __shfl_xor_sync(~0u, total[h], 2);", "", BF16,
             f"{RULE} and bfloat16"),
    Mutation("causal too early", HEADS, "offset <= a.right);", "offset < a.right);", BF16, f"{RULE} and causal"),
    Mutation("a window that begins too late", HEADS, "a.left >= 0 && left > 0 ? left : 0, end = a.right >= 0 && right",
             "a.left >= 0 && left > 0 ? left + 1 : 0, end = a.right >= 0 && right", BF16, f"{RULE} and window"),
    Mutation("a tile taken for visible", HEADS, "i1 <= queries && j1 <= keys", "i1 <= queries", BF16,
             f"{RULE} and bfloat16 and whole"),
    Mutation("queries too few for a window's keys", HEADS, "p.first + Tiles::kOuter - shift + a.left",
             "p.first - shift + a.left", BF16, f"{RULE} and window"),
    Mutation("dropout's index", HEADS, "return (row + i) * a.dropout_keys + j;", "return row * a.dropout_keys + i + j;",
             BF16, f"{RULE} and dropout"),
    Mutation("no 1 / (1 - p)", HEADS, "float(1.0 / (1.0 - a.dropout_p))", "1.f", BF16, f"{RULE} and dropout"),
    Mutation("the sign of lse's gradient", HEADS, "sum -= a.dlse", "sum += a.dlse", BF16, f"{RULE} and lse"),
    Mutation("one query head of a group", HEADS, "head < (p.head + 1) * group", "head < p.head * group + 1", BF16,
             f"{RULE} and grouped"),
    Mutation("dk without the scale", HEADS, "scale[2] = {a.scale, a.scale}", "scale[2] = {1.f, 1.f}", BF16,
             f"{RULE} and bfloat16"),
    Mutation("tiles of packed sequences", HEADS, "(cu_at(cu, wide, n) / tile_rows + n)) * tile_rows",
             "(cu_at(cu, wide, n) / tile_rows)) * tile_rows", BF16, "varlen_error_rule"),
    Mutation("masked keys", HEADS, "(!kGeneral || !mask || mask[j])", "true", BF16, f"{RULE} and padding"),
    Mutation("the scores' slope", HEADS, "slope = (1.f - t) * (1.f + t);", "", BF16, f"{RULE} and softcap"),
    Mutation("no sink in the denominator", HEADS, "total[h] * rescale + exponential<T>(sink - base)",
             "total[h] * rescale", BF16, f"{RULE} and sinks"),
    Mutation("half of a wide head", HEADS, "warp / (Tiles::kOuter / 16) * kColumns", "0", BF16, f"{RULE} and wide"),
    Mutation("the sign of a sink's gradient", "attention.cu", "sum -= exp(", "sum += exp(", "attention",
             f"{RULE} and sinks"),
    Mutation("terms of a bias's gradient", "attention.cu", "left /= full[i];", "left /= full[i] + 1;", "attention",
             f"{RULE} and bias"),
]  # fmt: skip


def caught(mutation: Mutation) -> bool:
    with mutations.planted(mutation, f"csrc/cuda/{mutation.file}") as copy:
        built = ROOT / toolchain.FOLDER
        replaced = built / f"csrc_cuda_{mutation.kernel}.cu.emulator.o"
        objects = [o for o in sorted(built.glob("*.emulator.o")) if o != replaced]
        flags = toolchain.COMMON.replace("-O3", "-O1").replace("-Icsrc", f"-I{copy}/csrc").split()
        flags += ["-DPYFAST_EMULATOR", "-w", "-x", "c++"]
        kernel = copy / "csrc" / "cuda" / f"{mutation.kernel}.cu"
        subprocess.run([toolchain.CXX, *flags, "-c", kernel, "-o", copy / "kernel.o"], check=True)
        library = [f"-L{TORCH_LIB_PATH}", "-ltorch_cpu", "-lc10", "-lpthread"]
        target = copy / "pyfast" / next((ROOT / "pyfast").glob("_emu.*so")).name
        subprocess.run([toolchain.CXX, "-shared", copy / "kernel.o", *objects, *library, "-o", target], check=True)
        op = mutation.kernel.split("_")[0] if mutation.kernel.startswith("attention") else mutation.kernel
        return mutations.fails(copy, mutation, f"tests/cuda/test_op_{op}.py")


if __name__ == "__main__":
    sys.exit(mutations.main(__doc__, MUTATIONS, caught))
