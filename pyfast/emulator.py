"""How the backend "emulator" runs the CUDA kernels' own source on CPU tensors (csrc/emulator): for tests. A checkout
builds it, no wheel holds it. A kernel's error (a deadlock, a wrong mask, a misaligned address) is a RuntimeError.
"""

import contextlib

import torch

ORDERS = ("forward", "reverse", "random")
ARCHITECTURES = ("sm_80", "sm_90a")

_now = {"order": "forward", "seed": 1, "lazy": True, "arch": "sm_80"}


@contextlib.contextmanager
def emulating(order: str | None = None, *, seed: int | None = None, lazy: bool | None = None, arch: str | None = None):
    """How kernels run inside the `with` block; what is not given stays as it is.

    order: in which threads take turns, "forward", "reverse" or "random" (by seed). lazy: asynchronous copies and
    products happen as late as the kernel's waits allow, else at once. arch: the GPU, "sm_80" or "sm_90a".
    """
    if order not in (None, *ORDERS):
        raise ValueError(f"the emulator has no order {order!r}: choose from {', '.join(ORDERS)}")
    if arch not in (None, *ARCHITECTURES):
        raise ValueError(f"the emulator has no arch {arch!r}: choose from {', '.join(ARCHITECTURES)}")
    before = dict(_now)
    given = {"order": order, "seed": seed, "lazy": lazy, "arch": arch}
    _now.update((name, value) for name, value in given.items() if value is not None)
    try:
        torch.ops.pyfast_emu.emulate(**_now)
        yield
    finally:
        _now.update(before)
        torch.ops.pyfast_emu.emulate(**_now)
