"""How a Triton kernel is started: which launchers there are, on which device, with which tile.

A launcher is a Python function with the name and the arguments of a schema in pyfast/ops/schemas.py; pyfast registers
it as that op of the namespace pyfast_triton. It allocates the results, picks a tile and calls `run`.
"""

import contextlib
import functools
import importlib

import torch

from pyfast.kernels.tiles import TILES

_MODULES = (
    "activation", "attention", "cross_entropy", "dropout", "linear_cross_entropy", "lora", "norm", "quantized", "rope",
)  # fmt: skip
_launchers: dict = {}


def launcher(function):
    """Decorates the launcher of the schema of the same name."""
    _launchers[function.__name__] = function
    return function


def launchers() -> dict:
    """schema name -> launcher, of every kernel."""
    for module in _MODULES:
        importlib.import_module(f"pyfast.kernels.{module}")
    return _launchers


@functools.cache
def architecture(device: torch.device) -> str:
    """The name of a device in the tile tables: "interpreter", "sm_90", "gfx942"."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def tile(kernel, device: torch.device, size: int = 0, variant: str = "") -> dict:
    """The tile of a kernel, or of a variant of it, on a device for a problem of `size`, from kernels/tiles.py."""
    table = TILES[f"{kernel.__name__} {variant}".rstrip()]
    rows = table.get(architecture(device), table["default"])
    return next(tile for limit, tile in rows if limit is None or size <= limit)


def _tensors(arguments):
    """Those of nested tuples, in order."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors(argument)


def run(kernel, programs: int, *arguments, **constants):
    """Starts `programs` programs of a kernel, on the device of its first tensor; returns the compiled kernel."""
    if programs == 0:
        return None
    device = next(_tensors(arguments)).device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        return kernel[(programs,)](*arguments, **constants, enable_fp_fusion=True)


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """x as (rows, N) with unit stride in N: a view where its layout allows one."""
    x = x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
