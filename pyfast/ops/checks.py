"""Argument checks shared by the public ops: one clear sentence that says what was given and what was expected."""

import contextlib
import math
import numbers

import torch

#: what some backend serves: fp8, for one, is storage only
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


_on_gpu = False


@contextlib.contextmanager
def checks():
    """Inside the `with` block, in the whole process, the values of targets and cu_seqlens are checked on GPUs too.

    Outside it nothing waits for the GPU: a target out of range makes its row NaN, and cu_seqlens are cut off at the
    rows that there are. Inside, each such call waits for the GPU and raises the ValueError that CPU tensors raise.
    """
    global _on_gpu
    before, _on_gpu = _on_gpu, True
    try:
        yield
    finally:
        _on_gpu = before


def values_known(tensor: torch.Tensor) -> bool:
    """Whether the host may look at this tensor's values: not while compiling, and on a GPU only inside `checks`."""
    return not torch.compiler.is_compiling() and (tensor.device.type == "cpu" or _on_gpu)


def describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} on {tensor.device}"


# These run at every call, so that each first asks, in as few looks at the tensors as can be, whether all is well.
def check_floating(op: str, **tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} is {type(tensor).__name__}, expected a torch.Tensor")
        if tensor.dtype not in FLOATING or tensor.layout != torch.strided:
            layout = "" if tensor.layout == torch.strided else f" {tensor.layout}"
            raise TypeError(f"{op}: {name} is {describe(tensor)}{layout}, expected a floating-point tensor, dense")


def check_number(op: str, **values: float) -> None:
    """Each value is a real number; a comparison of its range may follow."""
    for name, value in values.items():
        if type(value) is float:
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Real | torch.SymInt | torch.SymFloat):
            raise TypeError(f"{op}: {name} is {value!r}, expected a number")


def like(tensor: torch.Tensor, first: torch.Tensor) -> bool:
    """Whether it is a tensor of the dtype, device and layout of another one that was checked."""
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.dtype == first.dtype
        and tensor.device == first.device
        and tensor.layout == first.layout
    )


def beside(tensor: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether it is like x, or in fp32 beside an x of lower precision."""
    return like(tensor, x) or (
        isinstance(tensor, torch.Tensor)
        and tensor.dtype == torch.float32
        and x.dtype != torch.float64
        and tensor.device == x.device
        and tensor.layout == x.layout
    )


def check_same(op: str, *, shape: bool = True, **tensors: torch.Tensor) -> None:
    """All tensors have the first one's dtype and device, and its shape unless shape=False."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if like(tensor, first) and (not shape or tensor.shape == first.shape):
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} is {type(tensor).__name__}, expected a torch.Tensor")
        if tensor.dtype != first.dtype:
            raise TypeError(f"{op}: {name} is {describe(tensor)}, expected the dtype of {first_name}, {first.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{op}: {name} is {describe(tensor)}, expected the device of {first_name}, {first.device}")
        if shape and tensor.shape != first.shape:
            raise ValueError(
                f"{op}: {name} is {describe(tensor)}, expected the shape of {first_name}, {tuple(first.shape)}"
            )


def check_parameter(op: str, x: torch.Tensor, **parameters: torch.Tensor) -> None:
    """Each parameter is on x's device and in x's dtype, or in fp32 beside a lower-precision x."""
    for name, parameter in parameters.items():
        if beside(parameter, x):
            continue
        check_floating(op, **{name: parameter})
        if parameter.dtype != x.dtype and (parameter.dtype != torch.float32 or x.dtype == torch.float64):
            raise TypeError(f"{op}: {name} is {describe(parameter)}, expected {x.dtype}, as the input, or float32")
        if parameter.device != x.device:
            raise ValueError(f"{op}: {name} is {describe(parameter)}, expected the input's device, {x.device}")


def check_softcap(op: str, softcap: float | None) -> None:
    if softcap is None:
        return
    check_number(op, softcap=softcap)
    if not 0 < softcap < math.inf:
        raise ValueError(f"{op}: softcap is {softcap}, expected a positive, finite number, or None for no cap")
