"""The emulator itself: kernels.cu gives the right results in every schedule, and every error planted in it is seen."""

import itertools
import os
import shutil
import subprocess

import pytest
import torch
from instructions import (
    ROOT,
    SM_80,
    SM_90A,
    SOURCE,
    Kernels,
    chain,
    cluster_sum,
    compiled_for_gpus,
    matmul_bf16,
    matmul_fp16,
    pair,
    pair_deep,
    pipeline,
    product,
    product_deep,
    register_product,
    register_product_narrow,
    reverse,
    reverse_pairs,
    turns,
    vectors,
    warp_sum,
)
from torch.utils.cpp_extension import TORCH_LIB_PATH

SCHEDULES = list(itertools.product(range(3), (True, False)))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """kernels.cu and the emulator."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("this test compiles kernels for the emulator, and no C++ compiler (g++) is installed")
    target = tmp_path_factory.mktemp("kernels") / "kernels.so"
    sources = ["-x", "c++", SOURCE, *sorted((ROOT / "csrc/emulator").glob("[!b]*.cpp"))]
    options = ["-std=c++20", "-O1", "-fPIC", "-shared", "-DPYFAST_EMULATOR", "-fvisibility=hidden", f"-I{ROOT}/csrc"]
    library = [f"-L{TORCH_LIB_PATH}", "-ltorch_cpu", f"-Wl,-rpath,{TORCH_LIB_PATH}"]
    subprocess.run([compiler, *options, *sources, "-o", target, *library], check=True)
    return Kernels(target, "cpu")


def run(emulated, kernel, schedule=(0, True), **options):
    """What comes of a kernel, and what must."""
    emulated.library.emulate(schedule[0], 3, schedule[1], 90 if kernel in SM_90A else 80)
    return kernel(emulated, **options)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("kernel", SM_80 + SM_90A, ids=lambda k: k.__name__)
def test_right(emulated, kernel, schedule):
    torch.testing.assert_close(*run(emulated, kernel, schedule), rtol=0, atol=0)


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
    (turns, 1, "deadlock"),
    (turns, 2, "deadlock"),
    (turns, 3, "deadlock"),
    (turns, 4, "different numbers of threads"),
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
    (product, 7, "deadlock|more arrivals|exits before a tile"),
    (product, 8, None),
    (product, 9, None),
    (product_deep, 10, None),
    (product, 11, None),
    (product, 12, "the lanes of a warp differ in their wgmmas"),
    (product, 13, "the warps of a warp group differ in their wgmmas"),
    (register_product, 1, "registers of a were changed while it read them"),
    (register_product, 2, None),
    (register_product, 3, None),
    (register_product, 4, None),
    (register_product_narrow, 5, None),
    (pair_deep, 1, None),
    (pair, 2, "deadlock"),
    (pair, 3, "a block that the cluster does not have"),
    (pair, 4, "deadlock"),
    (pair, 5, "deadlock|more arrivals|exits before a tile"),
    (pair, 6, "deadlock|no block 2 in the cluster"),
    (pair, 7, None),
    (pair, 8, "without fence.proxy.async"),
    (pair, 9, "TMA: not aligned to 1024 bytes"),
    (pair, 10, "before shared memory that it stores has been read"),
    (pair, 11, "a block that has exited"),
    (chain, 1, "no fence.mbarrier_init followed"),
    (chain, 2, "deadlock: .* waits at setmaxnreg"),
    (chain, 3, "exits before a tile that TMA brings has come"),
    (chain, 4, "without wgmma.fence"),
    (chain, 5, "wgmma reads what was written without fence.proxy.async"),
    (chain, 6, None),
    (chain, 7, "deadlock: .* waits at setmaxnreg"),
]


@pytest.mark.parametrize("kernel, bug, words", BUGS, ids=lambda v: getattr(v, "__name__", str(v))[:20])
def test_planted_bug(emulated, kernel, bug, words):
    """In one schedule or more: the lazy ones show what a missing wait leaves."""
    seen = []
    for schedule in SCHEDULES:
        try:
            seen.append(None if torch.equal(*run(emulated, kernel, schedule, bug=bug)) else "wrong")
        except RuntimeError as error:
            seen.append(error)
    if words is None:
        assert "wrong" in seen
    else:
        with pytest.raises(RuntimeError, match=words):
            raise next(error for error in seen if isinstance(error, RuntimeError))


@pytest.mark.parametrize(
    "architecture, changes, words",
    [
        (80, {"shared": 164 << 10}, "167936 bytes of shared memory"),
        (80, {"threads": 1025}, "a block of 1025 threads"),
        (80, {"blocks": 0}, "an empty grid"),
        (80, {"cluster": 2, "blocks": 2}, "clusters before sm_90"),
        (90, {"cluster": 2, "blocks": 3}, "no number of clusters"),
    ],
)
def test_refused_launch(emulated, architecture, changes, words):
    emulated.library.emulate(0, 3, True, architecture)
    with pytest.raises(RuntimeError, match=words):
        reverse(emulated, **changes)


def test_after_an_error_all_is_well(emulated):
    """A launch that failed leaves nothing behind."""
    for _ in range(3):
        with pytest.raises(RuntimeError, match="deadlock"):
            run(emulated, reverse, bug=3)
        torch.testing.assert_close(*run(emulated, reverse))


def test_compiles_for_gpus():
    """tests/gpu runs the same kernels on one. Without one the CUDA runtime says so."""
    path = compiled_for_gpus()
    if isinstance(path, str):
        pytest.skip(path)
    if not torch.cuda.is_available():
        for kernel in SM_80 + SM_90A[:1]:
            with pytest.raises(RuntimeError, match="CUDA"):
                kernel(Kernels(path, "cpu"))
