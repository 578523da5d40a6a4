"""The CUDA kernels' own source on CPU tensors, for tests: csrc/emulator, which a checkout builds, and no wheel holds.

Once loaded, `use_backend("cuda")` serves CPU tensors too. An error of a kernel's (a deadlock, a wrong mask, a
misaligned address) is raised as a RuntimeError.
"""

import contextlib

import torch

from pyfast import dispatch, ops  # noqa: F401  (ops defines the kernels' schemas)

ORDERS = ("forward", "reverse", "random")
ARCHITECTURES = ("sm_80", "sm_90a")


def load() -> str | None:
    """Loads the emulator; returns why it cannot be used, or None."""
    namespace, devices = dispatch.BACKENDS["cuda"]
    if "cpu" in devices:
        return None
    reason = dispatch.load_library(
        "_emu", "the emulator of CUDA kernels", "install a C++ compiler, clone the repository"
    )
    if reason is None:
        devices = devices if dispatch.unavailable("cuda") is None else ()
        dispatch.BACKENDS["cuda"] = (namespace, (*devices, "cpu"))
        dispatch._UNAVAILABLE.pop("cuda", None)
    return reason


@contextlib.contextmanager
def emulating(order: str = "forward", *, seed: int = 1, lazy: bool = True, arch: str = "sm_80"):
    """How kernels run inside the `with` block.

    order: in which threads take turns, "forward", "reverse" or "random" (by seed). lazy: asynchronous copies and
    products happen as late as the kernel's waits allow, else at once. arch: the GPU, "sm_80" or "sm_90a".
    """
    torch.ops.pyfast_cuda.emulate(order, seed, lazy, arch)
    try:
        yield
    finally:
        torch.ops.pyfast_cuda.emulate("forward", 1, True, "sm_80")
