"""Results of 32 MB and more lie in memory that is kept between calls (csrc/binding/blocks.h)."""

import os
import threading
from pathlib import Path

import torch

from pyfast.ops import rope, swiglu

SHAPE = (4096, 2048)  # 32 MB in fp32


def test_memory_is_used_again_only_after_it_was_freed():
    gate, up = torch.randn(SHAPE), torch.randn(SHAPE)
    first, second = swiglu(gate, up), swiglu(up, gate)
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, torch.nn.functional.silu(up) * gate)
    assert first.data_ptr() != second.data_ptr()
    view, address = first[7:9], first.data_ptr()
    del first
    third = swiglu(up, up)
    assert third.data_ptr() != address, "a view still uses this memory"
    torch.testing.assert_close(view, expected[7:9])
    del view
    assert swiglu(gate, up).data_ptr() == address


def test_a_slightly_different_size_shares_the_block():
    x = torch.randn(4608, 2048)
    address = swiglu(x, x).data_ptr()
    fewer = x[:4600]
    y = swiglu(fewer, fewer)
    assert y.data_ptr() == address
    torch.testing.assert_close(y, torch.nn.functional.silu(fewer) * fewer)


def test_kept_memory_can_be_freed():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    x = torch.randn(SHAPE)
    swiglu(x, x)
    before = resident()
    torch.ops.pyfast_cpu.empty_cache()
    assert before - resident() > 24 << 20


def test_large_results_keep_the_layout_of_their_input():
    q = torch.randn(1, 4096, 32, 64).transpose(1, 2)
    k = torch.randn(1, 4096, 2, 64).transpose(1, 2)
    cos, sin = torch.ones(1, 4096, 64), torch.zeros(1, 4096, 64)
    turned, _ = rope(q, k, cos, sin)
    assert turned.stride() == q.stride() and torch.equal(turned, q)


def test_threads_get_blocks_of_their_own():
    results = {}

    def work(i):
        x = torch.full(SHAPE, float(i))
        for _ in range(3):
            results[i] = swiglu(x, x)

    threads = [threading.Thread(target=work, args=(i,)) for i in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, y in results.items():
        assert (y == y[0, 0]).all() and abs(y[0, 0].item() - i * i * torch.tensor(float(i)).sigmoid().item()) < 1e-4
