"""A launch seen before is started without Triton's own look-up, with the same kernel and arguments.

On a driver that starts nothing, in a process of its own, because this one interprets the kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.language", reason="triton is not installed")
ROOT = Path(__file__).parents[3]

SCRIPT = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks.aot import _Driver
from pyfast.kernels import launch
from pyfast.kernels.lora import matmul

started, looked_up = [], []


class Driver(_Driver):
    class utils:
        load_binary = staticmethod(lambda name, *_: (0, name, 32, 0, 1024))
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 1 << 20})
        unload_module = staticmethod(lambda module: None)

    def launcher_cls(self, source, metadata):
        def start(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            kernel = source.signature, source.constants, source.attrs
            started.append((kernel, (x, y, z), plain(arguments)))

        return start

    def get_device_interface(self):
        return torch.cpu


def plain(argument):
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.shape, argument.stride()
    return tuple(map(plain, argument)) if isinstance(argument, tuple) else argument


def starts(call):
    started.clear(), looked_up.clear()
    call()
    return list(started), len(looked_up)


driver.set_active(Driver(GPUTarget("cuda", 90, 32)))
launch.architecture = lambda device: "sm_90"
stock_run = JITFunction.run
JITFunction.run = lambda self, *a, **k: (looked_up.append(self), stock_run(self, *a, **k))[1]


def rows(*shape):
    return torch.randn(shape).bfloat16()


kernels = launch.launchers()
q, k = (rows(1, 9, heads, 16).transpose(1, 2) for heads in (4, 2))
CALLS = [
    lambda: kernels["norm"](rows(5, 40), rows(40), None, rows(5, 40), 1e-6, 0.0, True),
    lambda: kernels["attention"](q, k, k, None, None, None, None, None, None, 9, 0.25, 0.0, -1, 0, 0.0),
    lambda: matmul(rows(33, 40), rows(40, 24), torch.bfloat16, adapter=(torch.randn(33, 8), rows(8, 24), 2.0)),
]
for call in CALLS:
    first, searched = starts(call)
    again, searched_again = starts(call)
    assert (len(first), searched, searched_again) == (1, 1, 0), (len(first), searched, searched_again)
    assert first == again

# what Triton compiles another kernel for is another launch
x, shifted = rows(4, 64), torch.cat([rows(1), rows(256)])[1:].view(4, 64)
assert x.data_ptr() % 16 == 0 and shifted.data_ptr() % 16 == 2
norm = lambda x, eps=1e-6: kernels["norm"](x, None, None, None, eps, 0.0, False)
kinds = [x, shifted, x[:1], x.float(), x[:, :33]]
found = [starts(lambda: norm(kind)) for kind in kinds]
assert [searched for _, searched in found] == [1] * len(kinds)
assert len({str(launches[0][0]) for launches, _ in found}) == len(kinds)
assert starts(lambda: norm(x, 1))[1] == 1 and starts(lambda: norm(x, 1.0))[1] == 1
"""


def test_a_launch_is_found_again():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
