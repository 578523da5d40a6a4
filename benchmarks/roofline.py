"""The limits of this machine, measured in the same run as what is held against them.

python -m benchmarks.roofline
"""

import ctypes
import json
import statistics
import time

import torch

HUGE_PAGE, MADV_HUGEPAGE = 2 << 20, 14


def huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Asks for huge pages under the tensor's memory, before it is first touched: page faults then cost little."""
    start = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    end = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE * HUGE_PAGE
    if end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_HUGEPAGE)
    return tensor


def seconds(function, rounds: int = 7) -> float:
    function()
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def clones(times: float, *sources: torch.Tensor) -> None:
    """clone() of the sources into fresh memory with huge pages; a fraction of `times` clones that part of them.

    Moves 2 * times * the sources' bytes: the floor of an op that is bound by memory.
    """
    while times > 0:
        for source in sources:
            part = source if times >= 1 else source[: max(1, int(len(source) * times))]
            huge_pages(torch.empty_like(part)).copy_(part)
        times -= 1


def copy_rate(size: int = 128 << 20) -> float:
    """GB/s of clone() into fresh memory with huge pages, reads and writes counted."""
    source = torch.zeros(size // 4)
    return 2 * size / seconds(lambda: clones(1, source)) / 1e9


def gemm_rate(dtype: torch.dtype, n: int = 2048) -> float:
    """TFLOP/s of a square matrix product, its output reused."""
    a, b, out = (torch.randn(n, n).to(dtype) for _ in range(3))
    return 2 * n**3 / seconds(lambda: torch.mm(a, b.T, out=out)) / 1e12


def measure() -> dict:
    return {
        "copy_gb_per_s": round(copy_rate(), 2),
        "gemm_bf16_tflops": round(gemm_rate(torch.bfloat16), 3),
        "gemm_fp32_tflops": round(gemm_rate(torch.float32), 3),
    }


if __name__ == "__main__":
    print(json.dumps(measure()))
