"""The small kernels of tests/cuda/kernels.cu, one mechanism of CUDA each: what they get, and what must come of it.

tests/cuda runs them in the emulator and tests/gpu on a GPU, so that the emulator's idea of an instruction is held
against the instruction. Numbers that are summed are small integers: exact in whatever order.
"""

import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "tests/cuda/kernels.cu"
sys.path.insert(0, str(ROOT / "csrc"))
import toolchain  # noqa: E402


class Kernels:
    """kernels.cu as a shared library that takes tensors of `device`. A failed launch is a RuntimeError."""

    def __init__(self, path: Path, device: str):
        self.library, self.device = ctypes.CDLL(str(path)), device
        self.library.error.restype = ctypes.c_char_p

    def _call(self, name, inputs, out, *arguments):
        tensors = [x.to(self.device) for x in (*inputs, out)]
        code = getattr(self.library, name)(*(ctypes.c_void_p(x.data_ptr()) for x in tensors), *arguments)
        assert code != -1, f"there is no such kernel: {arguments}"
        if code:
            raise RuntimeError(self.library.error(code).decode())
        return tensors[-1].cpu()

    def run(self, name, x, out, threads, blocks=1, bug=0, n=None, shared=0, cluster=1):
        n = x.numel() if n is None else n
        return self._call("run", [x], out, name.encode(), n, bug, ctypes.c_int64(blocks), threads, shared, cluster)

    def product(self, a, b, out, bug=0):
        """a b, or a bᵀ where b is of out's columns."""
        return self._call("run_product", [a, b], out, a.dtype == torch.bfloat16, len(b) == a.shape[1], a.shape[1], bug)

    def pair(self, a, b, out, deep, bug=0):
        return self._call("run_pair", [a, b], out, a.dtype == torch.bfloat16, deep, a.shape[1], bug)

    def register_product(self, a, b, out, bug=0):
        return self._call("run_register_product", [a, b], out, a.dtype == torch.bfloat16, b.shape[1], bug)

    def chain(self, a, b, v, out, rows, bug=0):
        return self._call("run_chain", [a, b, v], out, a.dtype == torch.bfloat16, rows, bug)

    def box(self, x, out):
        return self._call("run_box", [x], out, x.shape[-1])


def compiled_for_gpus() -> Path | str:
    """kernels.cu by nvcc, for what `_cuda` is built for, or why there is none. Kept until a source changes, so that a
    GPU machine without nvcc can be given it."""
    target = ROOT / "build" / "kernels.so"
    sources = [SOURCE, *(ROOT / "csrc/cuda").glob("*.cuh"), *(ROOT / "csrc/common").glob("*.h")]
    if target.exists() and target.stat().st_mtime > max(source.stat().st_mtime for source in sources):
        return target
    cuda = toolchain.find_cuda()
    if isinstance(cuda, str):
        return cuda
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        library = Path(folder) / target.name
        options = ["-std=c++20", "-O3", f"-I{ROOT}/csrc", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        options += ["-ccbin", toolchain.CXX, "-cudart", "none", *toolchain.architecture_flags().split(), "--threads=0"]
        libraries = [cuda.runtime, "-ldl", "-lrt", "-lpthread"]
        subprocess.run([cuda.nvcc, *options, SOURCE, *libraries, "-o", library], check=True)
        os.replace(library, target)
    return target


def poisoned(*shape):
    return torch.full(shape, torch.nan)


def integers(*shape, below=9):
    return torch.randint(1 - below, below, shape).float()


def reverse(kernels, **options):
    x = torch.randn(96)
    return kernels.run("reverse", x, poisoned(96), **{"threads": 96, "shared": 96 * 4, **options}), x.flip(0)


def reverse_pairs(kernels, **options):
    x = torch.randn(128)
    out = kernels.run("reverse_pairs", x, poisoned(128), 160, shared=128 * 4, **options)
    return out, x.view(2, 64).flip(1).view(-1)


def warp_sum(kernels, **options):
    x = integers(64)
    out = kernels.run("warp_sum", x, poisoned(64), 64, **options)
    return out, x.view(2, 32).sum(1, keepdim=True).expand(2, 32).reshape(-1)


def turns(kernels, **options):
    x = torch.randn(5 * 32)
    return kernels.run("turns", x, poisoned(5 * 32), 64, shared=128, **options), x


def warp_scan(kernels, **options):
    x = integers(64)
    return kernels.run("warp_scan", x, poisoned(64), 64, **options), x.view(8, 8).cumsum(1).view(-1)


def atomic_sum(kernels, **options):
    x = integers(640)
    out = kernels.run("atomic_sum", x, torch.zeros(3), 64, blocks=10, **options)
    return torch.stack([out[0], *out.view(torch.int32)[1:].float()]), torch.tensor([x.sum(), 640.0, 639.0])


def pipeline(kernels, **options):
    x = torch.randn(64 * 4 * 5 - 50)
    return kernels.run("pipeline", x, poisoned(x.numel()), 64, shared=3 * 64 * 16, **options), x


def matmul_bf16(kernels, name="matmul_bf16", **options):
    x = integers(24, 16)
    return kernels.run(name, x, poisoned(16, 8), 32, shared=24 * 48, **options), x[:16] @ x[16:].T


def matmul_fp16(kernels, **options):
    return matmul_bf16(kernels, "matmul_fp16", **options)


def transpose(kernels, **options):
    x = torch.randn(4, 8, 8).half().float()
    return kernels.run("transpose", x, poisoned(4, 8, 8), 32, shared=512, **options), x.mT


def vectors(kernels, **options):
    x = torch.randn(512)
    return kernels.run("vectors", x, poisoned(512), 64, blocks=2, **options), x


def conversions(kernels, **options):
    """Ties, overflow, denormals, NaN; powers of two within 2^-22; shared memory begins at a multiple of 1024."""
    x = torch.tensor(
        [
            0.0,
            -0.0,
            1.0,
            0.1,
            1 + 2**-8,
            1 + 3 * 2**-8,
            1 + 2**-11,
            1 + 3 * 2**-11,
            65519.0,
            65520.0,
            -1e6,
            3.4e38,
            1e-7,
        ]
        + [1e-7, 6e-8, -3e-8, 127.5, -125.5, 3.3, -17.25, torch.inf, -torch.inf, torch.nan]
        + torch.linspace(-9, 9, 42).tolist()
    )
    n = len(x)
    out = kernels.run("conversions", x, poisoned(5 * n + 1), n, shared=1024, **options)
    rounded, powers, begin = out[: 4 * n].view(4, n), out[4 * n : 5 * n].double(), out[5 * n :]
    exact = x.double().exp2()
    right = (powers == exact) | ((powers - exact).abs() <= exact * 2**-22) | (powers.isnan() & exact.isnan())
    right |= (exact < 2.0**-126) & (powers <= 2.0**-126) | (exact > 3.4e38) & powers.isinf()
    expected = torch.stack([x.bfloat16().float(), x.half().float()]).repeat(2, 1)
    parts = [t.nan_to_num(12345.0, torch.inf, -torch.inf).view(-1) for t in (rounded, expected)]
    return torch.cat([parts[0], right.float(), begin]), torch.cat([parts[1], torch.ones(n), torch.zeros(1)])


def cluster_sum(kernels, **options):
    x = integers(8)
    out = kernels.run("cluster_sum", x, poisoned(8), 32, blocks=8, n=4, shared=32, cluster=4, **options)
    return out, x.view(2, 4).sum(1, keepdim=True).expand(2, 4).reshape(-1)


def product(kernels, dtype=torch.bfloat16, **options):
    """By TMA, mbarriers and wgmma; a depth of 328 leaves a tile that is not whole."""
    a, b = integers(64, 328), integers(128, 328)
    return kernels.product(a.to(dtype), b.to(dtype), poisoned(64, 128), **options), a @ b.T


def product_fp16(kernels, **options):
    return product(kernels, torch.float16, **options)


def product_deep(kernels, **options):
    """b's rows in memory are depths."""
    a, b = integers(64, 328).bfloat16(), integers(328, 128).bfloat16()
    return kernels.product(a, b, poisoned(64, 128), **options), a.float() @ b.float()


def pair(kernels, dtype=torch.bfloat16, deep=False, **options):
    """By a cluster: multicast, arrivals at another block's barriers, wgmma of 256 columns, and TMA back to a matrix of
    120 x 250, beyond which nothing is written."""
    a, b = integers(128, 200, below=2), integers(256, 200, below=2)
    out = kernels.pair(
        a.to(dtype), (b.T.contiguous() if deep else b).to(dtype), poisoned(128, 256).to(dtype), deep, **options
    )
    expected = poisoned(128, 256)
    expected[:120, :250] = (a @ b.T)[:120, :250]
    return out.float().nan_to_num(1000.0), expected.nan_to_num(1000.0)


def pair_deep(kernels, **options):
    return pair(kernels, torch.float16, deep=True, **options)


def register_product(kernels, dtype=torch.bfloat16, columns=128, **options):
    """One operand in registers, the other in tiles of 64 columns."""
    a, b = integers(64, 64), integers(64, columns)
    return kernels.register_product(a.to(dtype), b.to(dtype), poisoned(64, columns), **options), a @ b


def register_product_narrow(kernels, **options):
    return register_product(kernels, torch.float16, 64, **options)


def chain(kernels, dtype=torch.bfloat16, rows=101, **options):
    """Two products in flight, one the other's operand; zeros over what TMA brought; registers given and taken."""
    a, b, v = integers(128, 64, below=2), integers(128, 64, below=2), integers(128, 128)
    out = kernels.chain(a.to(dtype), b.to(dtype), v.to(dtype), poisoned(128, 128), rows, **options)
    return out, (a @ b[:rows].T) @ v[:rows]


def chain_fp16(kernels, **options):
    return chain(kernels, torch.float16, **options)


def box(kernels, **options):
    """A tile of 4 dimensions that reaches over the tensor's end in two of them."""
    x = torch.randn(3, 5, 9, 40).half()
    padded = torch.nn.functional.pad(x.float(), (0, 24, 0, 0, 0, 0))
    return kernels.box(x, poisoned(3, 2, 8, 64), **options), padded[:, 2:4, 1:9]


SM_80 = (
    reverse, reverse_pairs, warp_sum, turns, warp_scan, atomic_sum, pipeline, matmul_bf16, matmul_fp16, transpose,
    vectors, conversions,
)  # fmt: skip
SM_90A = (
    cluster_sum, product, product_fp16, product_deep, pair, pair_deep, register_product, register_product_narrow,
    chain, chain_fp16, box,
)  # fmt: skip
