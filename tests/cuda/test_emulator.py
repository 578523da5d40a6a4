"""The emulator itself: kernels.cu gives the right results in every schedule, and every error planted in it is seen."""

import ctypes
import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import TORCH_LIB_PATH

ROOT = Path(__file__).parents[2]
SCHEDULES = list(itertools.product(range(3), (True, False)))


def compiled(target, *flags):
    """kernels.cu and the emulator as a shared library."""
    sources = ["-x", "c++", ROOT / "tests/cuda/kernels.cu", *sorted((ROOT / "csrc/emulator").glob("[!b]*.cpp"))]
    options = ["-std=c++20", "-O1", "-fPIC", "-shared", "-DPYFAST_EMULATOR", "-fvisibility=hidden", f"-I{ROOT}/csrc"]
    library = [f"-L{TORCH_LIB_PATH}", "-ltorch_cpu", f"-Wl,-rpath,{TORCH_LIB_PATH}"]
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("this test compiles kernels for the emulator, and no C++ compiler (g++) is installed")
    subprocess.run([compiler, *options, *flags, *sources, "-o", target, *library], check=True)
    return target


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """run(name, in, out, ...) -> None, or a RuntimeError with the emulator's message."""
    library = ctypes.CDLL(str(compiled(tmp_path_factory.mktemp("kernels") / "kernels.so")))
    library.error.restype = ctypes.c_char_p

    def done(code, out):
        if code:
            raise RuntimeError(library.error(code).decode())
        return out

    def pointers(*tensors):
        return [ctypes.c_void_p(t.data_ptr()) for t in tensors]

    def run(name, x, out, threads, blocks=1, bug=0, n=None, shared=0, cluster=1, schedule=(0, True), arch=80):
        library.emulate(schedule[0], 3, schedule[1], arch)
        n = x.numel() if n is None else n
        code = library.run(name.encode(), *pointers(x, out), n, bug, ctypes.c_int64(blocks), threads, shared, cluster)
        assert code != -1, f"there is no kernel {name}"
        return done(code, out)

    def run_product(a, b, out, bug=0, schedule=(0, True)):
        library.emulate(schedule[0], 3, schedule[1], 90)
        return done(library.run_product(a.dtype == torch.bfloat16, *pointers(a, b, out), a.shape[1], bug), out)

    def run_box(x, out, schedule=(0, True)):
        library.emulate(schedule[0], 3, schedule[1], 90)
        return done(library.run_box(*pointers(x), x.shape[-1], *pointers(out)), out)

    run.product, run.box = run_product, run_box
    return run


def poisoned(*shape):
    return torch.full(shape, torch.nan)


def reverse(run, **kwargs):
    x = torch.randn(96)
    return run("reverse", x, poisoned(96), 96, shared=96 * 4, **kwargs), x.flip(0)


def reverse_pairs(run, **kwargs):
    x = torch.randn(128)
    return run("reverse_pairs", x, poisoned(128), 160, shared=128 * 4, **kwargs), x.view(2, 64).flip(1).view(-1)


def warp_sum(run, **kwargs):
    x = torch.randint(-9, 9, (64,)).float()
    return run("warp_sum", x, poisoned(64), 64, **kwargs), x.view(2, 32).sum(1, keepdim=True).expand(2, 32).reshape(-1)


def warp_scan(run, **kwargs):
    x = torch.randint(-9, 9, (64,)).float()
    return run("warp_scan", x, poisoned(64), 64, **kwargs), x.view(8, 8).cumsum(1).view(-1)


def atomic_sum(run, **kwargs):
    x = torch.randint(-9, 9, (640,)).float()
    out = run("atomic_sum", x, torch.zeros(3), 64, blocks=10, **kwargs)
    return torch.stack([out[0], *out.view(torch.int32)[1:].float()]), torch.tensor([x.sum(), 640.0, 639.0])


def pipeline(run, **kwargs):
    x = torch.randn(64 * 4 * 5 - 50)
    return run("pipeline", x, poisoned(x.numel()), 64, shared=3 * 64 * 16, **kwargs), x


def matmul_bf16(run, name="matmul_bf16", dtype=torch.bfloat16, **kwargs):
    x = torch.randn(24, 16).to(dtype).float()
    return run(name, x, poisoned(16, 8), 32, shared=24 * 48, **kwargs), x[:16] @ x[16:].T


def matmul_fp16(run, **kwargs):
    return matmul_bf16(run, "matmul_fp16", torch.float16, **kwargs)


def transpose(run, **kwargs):
    x = torch.randn(4, 8, 8).half().float()
    return run("transpose", x, poisoned(4, 8, 8), 32, shared=512, **kwargs), x.mT


def vectors(run, **kwargs):
    x = torch.randn(512)
    return run("vectors", x, poisoned(512), 64, blocks=2, **kwargs), x


def cluster_sum(run, **kwargs):
    x = torch.randint(-9, 9, (8,)).float()
    out = run("cluster_sum", x, poisoned(8), 32, blocks=8, n=4, shared=32, **{"cluster": 4, "arch": 90, **kwargs})
    return out, x.view(2, 4).sum(1, keepdim=True).expand(2, 4).reshape(-1)


def product(run, dtype=torch.bfloat16, **kwargs):
    """By TMA, mbarriers and wgmma; a depth of 328 leaves a tile that is not whole."""
    a, b = torch.randn(64, 328).to(dtype), torch.randn(128, 328).to(dtype)
    actual, expected = run.product(a, b, poisoned(64, 128), **kwargs), a.double() @ b.double().T
    off = (actual.double() - expected).abs() > 1e-4
    return torch.where(off, actual, expected.float()), expected.float()


def product_fp16(run, **kwargs):
    return product(run, torch.float16, **kwargs)


def box(run, **kwargs):
    """A tile of 4 dimensions that reaches over the tensor's end in two of them."""
    x = torch.randn(3, 5, 9, 40).half()
    padded = torch.nn.functional.pad(x.float(), (0, 24, 0, 0, 0, 0))
    return run.box(x, poisoned(3, 2, 8, 64), **kwargs), padded[:, 2:4, 1:9]


KERNELS = (
    reverse, reverse_pairs, warp_sum, warp_scan, atomic_sum, pipeline, matmul_bf16, matmul_fp16, transpose, vectors,
    cluster_sum, product, product_fp16, box,
)  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.__name__)
def test_right(emulated, kernel, schedule):
    torch.testing.assert_close(*kernel(emulated, schedule=schedule))


#: (kernel, bug, words of the error, or None where the result is wrong)
BUGS = [
    (reverse, 1, None),
    (reverse, 2, None),
    (reverse, 3, "deadlock: block .0, 0, 0., thread .0, 0, 0. waits at a barrier"),
    (reverse, 4, "different numbers of threads"),
    (reverse, 5, "barrier 16 does not exist"),
    (reverse, 6, "a barrier of 40 threads"),
    (reverse_pairs, 1, "deadlock"),
    (warp_sum, 1, "has exited"),
    (warp_sum, 2, "the mask leaves out a lane that calls it .block .0, 0, 0., thread .0, 0, 0."),
    (warp_sum, 3, "outside its mask"),
    (warp_sum, 4, "different collectives"),
    (warp_sum, 5, None),
    (pipeline, 1, None),
    (pipeline, 2, None),
    (pipeline, 3, None),
    (pipeline, 4, "cp.async: not aligned to 16 bytes .*thread .9, 0, 0."),
    (pipeline, 5, "cp.async outside shared memory"),
    (pipeline, 6, "cp.async: the source is not aligned"),
    (matmul_bf16, 1, "ldmatrix: not aligned to 16 bytes"),
    (matmul_fp16, 2, None),
    (vectors, 1, "a 16-byte load from an address that is not aligned"),
    (vectors, 2, "a 16-byte store to an address that is not aligned"),
    (cluster_sum, 1, None),
    (cluster_sum, 2, "a block that has exited"),
    (cluster_sum, 3, "there is no block 4 in the cluster"),
    (cluster_sum, 4, "ld.shared::cluster"),
    (product, 1, "mbarrier.* of a barrier that was not initialised"),
    (product, 2, "more arrivals than the barrier expects|deadlock"),
    (product, 3, "deadlock|more arrivals"),
    (product, 4, "deadlock|more arrivals"),
    (product, 5, "TMA: not aligned to 1024 bytes"),
    (product, 6, "deadlock|more arrivals"),
    (product, 7, "deadlock|more arrivals"),
    (product, 8, None),
    (product, 9, None),
]


@pytest.mark.parametrize("kernel, bug, words", BUGS, ids=lambda v: getattr(v, "__name__", str(v))[:20])
def test_planted_bug(emulated, kernel, bug, words):
    """In one schedule or more: the lazy ones show what a missing wait leaves."""
    seen = []
    for schedule in SCHEDULES:
        try:
            actual, expected = kernel(emulated, bug=bug, schedule=schedule)
            seen.append(None if torch.equal(actual, expected) else "wrong")
        except RuntimeError as error:
            seen.append(error)
    if words is None:
        assert "wrong" in seen
    else:
        with pytest.raises(RuntimeError, match=words):
            raise next(error for error in seen if isinstance(error, RuntimeError))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"shared": 164 << 10}, "167936 bytes of shared memory"),
        ({"threads": 1025}, "a block of 1025 threads"),
        ({"blocks": 0}, "an empty grid"),
        ({"cluster": 2, "blocks": 2}, "clusters before sm_90"),
        ({"cluster": 2, "blocks": 3, "arch": 90}, "no number of clusters"),
    ],
)
def test_refused_launch(emulated, changes, words):
    with pytest.raises(RuntimeError, match=words):
        emulated("reverse", torch.randn(96), poisoned(96), **{"threads": 96, "shared": 384, **changes})


def test_after_an_error_all_is_well(emulated):
    """A launch that failed leaves nothing behind."""
    for _ in range(3):
        with pytest.raises(RuntimeError, match="deadlock"):
            reverse(emulated, bug=3)
        torch.testing.assert_close(*reverse(emulated))
