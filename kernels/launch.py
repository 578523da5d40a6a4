"""How a Triton kernel is started: which launchers there are, on which device, with which tile.

A launcher is a Python function with the name and the arguments of a schema in pyfast/ops/schemas.py; pyfast registers
it as that op of the namespace pyfast_triton. It allocates the results, picks a tile and calls `run`.
"""

import contextlib
import importlib

import torch

from pyfast import dispatch
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


def architecture(device: torch.device) -> str:
    """The name of a device in the tile tables: "interpreter", "sm_90", "gfx942"."""
    return "interpreter" if device.type == "cpu" else dispatch.architecture(device)


def tile(kernel, device: torch.device, size: int = 0, variant: str = "") -> dict:
    """The tile of a kernel, or of a variant of it, on a device for a problem of `size`, from kernels/tiles.py."""
    table = TILES[f"{kernel.__name__} {variant}".rstrip()]
    rows = table.get(architecture(device), table["default"])
    return next(tile for limit, tile in rows if limit is None or size <= limit)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own, which may also be called in kernels, takes 2.6 µs on the host."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least that is no less than n, for n >= 1."""
    return 1 << (n - 1).bit_length()


#: what a launch depends on, but for addresses -> (the compiled kernel, the constants that it takes as arguments)
_compiled: dict[tuple, tuple] = {}
_PLAIN = {int, float, bool, type(None)}  # most of all arguments, and looked for first
#: shapes may never repeat
_MOST_COMPILED = 4096


def _traits(arguments, found: list) -> None:
    """Appends of every argument all that Triton may compile for: the values of numbers, and of tensors the dtype and
    the alignment."""
    for argument in arguments:
        if type(argument) in _PLAIN:
            found.append(argument)
        elif isinstance(argument, tuple):
            _traits(argument, found)
        else:
            found += (argument.dtype, argument.device, argument.data_ptr() % 16)


def run(kernel, programs: int, *arguments, **constants):
    """Starts `programs` programs of a kernel, on the device of its first tensor; returns the compiled kernel.

    Triton looks up which compilation of a kernel serves a launch by examining every argument, 20 to 25 µs on the host
    for these kernels. Here a launch whose arguments were seen before, but for the tensors' addresses, is found in 10 to
    15 (benchmarks/NOTES.md, "The host of a GPU").
    """
    if programs == 0:
        return None
    traits = []
    _traits(arguments, traits)
    # types too: 1 == 1.0 == True
    key = (kernel.__name__, tuple(traits), tuple(map(type, traits)), tuple(constants.items()))
    device = next(trait for trait in traits if isinstance(trait, torch.device))
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        if key in _compiled:
            compiled, last = _compiled[key]
            compiled[(programs, 1, 1)](*arguments, *last)
            return compiled
        compiled = kernel[(programs,)](*arguments, **constants, enable_fp_fusion=True)
    # the interpreter compiles nothing; for AMD's GPUs Triton also compiles for the size of a tensor's memory
    if compiled is not None and not torch.version.hip:
        if len(_compiled) == _MOST_COMPILED:
            _compiled.clear()
        _compiled[key] = compiled, [constants[p.name] for p in kernel.params[len(arguments) :]]
    return compiled


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """x as (rows, N) with unit stride in N: a view where its layout allows one."""
    x = x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
