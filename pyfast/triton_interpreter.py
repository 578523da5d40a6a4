"""Triton's interpreter, repaired and with checks: the kernels run on a CPU, in numpy, exactly as they are written.

`install()` is called when pyfast is imported with TRITON_INTERPRET=1 in the environment (`@triton.jit` reads it when a
kernel is defined); `pyfast.use_backend("triton")` then serves CPU tensors. It is slow and meant for tests.

Repairs, so that a result can be held to the error rule:
  * bf16: the interpreter keeps it as uint16 and would do integer arithmetic; here operators compute in fp32 and round
    once, and `tl.dot` multiplies in fp32, which is exact for bf16 operands, as tensor cores do (triton issue 11584);
  * fp32 -> bf16 rounds to nearest even instead of truncating;
  * a float argument is an fp32 scalar, as on a GPU, not a Python float;
  * exp, log and their kin round once: numpy's fp32 exp is off by up to 2.5 units in the last place, a GPU's by 2;
  * the libdevice functions that the kernels use;
  * `range` over a loaded bound works with numpy >= 2.4 (before triton 3.8);
  * triton.language is patched once per launch, and restored after it, not at every call of a device function.

Checks, each raising KernelMemoryError (inside triton's InterpreterError) at the offending load or store:
  * a lane that is not masked off lies outside the tensor that its pointer came from, gaps of a strided view included;
  * two programs of one launch store to one address, or one loads what another has stored;
  * a masked-off lane that reaches a result: without `other`, such lanes hold NaN (a huge number for integers).
"""

import numpy as np
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime import interpreter

_Builder, _Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
_COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}
_BITWISE = {np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift}
_ROUNDED_ONCE = {np.exp, np.exp2, np.log, np.log2, np.sin, np.cos}
_LIBDEVICE = {"tanh": np.tanh, "erfc": lambda x: torch.special.erfc(torch.from_numpy(x)).numpy()}


class KernelMemoryError(AssertionError):
    """A kernel read or wrote memory that it must not."""


def install() -> None:
    """Repairs the interpreter of this process and turns the checks on; a second call changes nothing."""
    if getattr(_Builder, "_pyfast", False):
        return
    _Builder._pyfast = True
    _repair_bfloat16()
    _repair_rounding()
    _repair_scalars()
    _patch_once_per_launch()
    for name, function in _LIBDEVICE.items():
        setattr(libdevice, name, _elementwise(function))
    _follow_pointers()
    _check_memory()


# ---- repairs
def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """The bits (uint16) of x rounded to bf16, nearest even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).reshape(np.shape(x))
    rounded = (bits + ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded.astype(np.uint16))


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The fp32 values of bf16 bits (uint16)."""
    return (np.asarray(bits, dtype=np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _is_bfloat16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _values(handle) -> np.ndarray:
    return from_bfloat16(handle.data) if _is_bfloat16(handle) else handle.data


def _repair_bfloat16() -> None:
    stock = {name: getattr(_Builder, name) for name in ("cast_impl", "create_fp_to_fp", "create_dot", "create_fma")}

    def cast_impl(self, source, target):
        narrow, wide = target.scalar == tl.bfloat16, _is_bfloat16(source)
        if narrow and not wide:
            return _Handle(to_bfloat16(source.data.astype(np.float32)), tl.bfloat16)
        if wide and not narrow:
            source = _Handle(from_bfloat16(source.data), tl.float32)
            return source if target.scalar == tl.float32 else stock["cast_impl"](self, source, target)
        return stock["cast_impl"](self, source, target)

    def create_fp_to_fp(self, source, target, rounding_mode):
        if _is_bfloat16(source) or target.scalar == tl.bfloat16:
            return cast_impl(self, source, target)
        return stock["create_fp_to_fp"](self, source, target, rounding_mode)

    def create_dot(self, a, b, *rest):
        a, b = (_Handle(_values(x), tl.float32) if _is_bfloat16(x) else x for x in (a, b))
        return stock["create_dot"](self, a, b, *rest)

    def create_fma(self, x, y, z):
        if not _is_bfloat16(z):
            return stock["create_fma"](self, x, y, z)
        return _Handle(to_bfloat16(_values(x).astype(np.float64) * _values(y) + _values(z)), tl.bfloat16)

    for function in (cast_impl, create_fp_to_fp, create_dot, create_fma):
        setattr(_Builder, function.__name__, function)
    for name in ("unary_op", "binary_op", "ternary_op"):
        setattr(_Builder, name, _bfloat16_operator(getattr(_Builder, name)))
    stock_reduce, semantic = interpreter.ReduceOps.apply_impl, interpreter.interpreter_semantic

    def reduce(self, inputs):
        if not any(_is_bfloat16(x.handle) for x in inputs):
            return stock_reduce(self, inputs)
        results = stock_reduce(self, tuple(semantic.cast(x, tl.float32) for x in inputs))
        results = results if isinstance(results, list | tuple) else (results,)
        return [semantic.cast(x, tl.bfloat16) for x in results]

    interpreter.ReduceOps.apply_impl = reduce


def _repair_rounding() -> None:
    stock = _Builder.unary_op

    def unary_op(self, argument, function):
        if function not in _ROUNDED_ONCE or argument.data.dtype != np.float32:
            return stock(self, argument, function)
        return _Handle(function(argument.data.astype(np.float64)).astype(np.float32), argument.dtype.scalar)

    _Builder.unary_op = unary_op


def _bfloat16_operator(stock):
    def operator(self, *operands_and_function):
        *operands, function = operands_and_function
        if function is np.where or function in _BITWISE or not any(map(_is_bfloat16, operands)):
            return stock(self, *operands, function)
        result = function(*map(_values, operands))
        if function in _COMPARISONS:
            return _Handle(result, tl.int1)
        return _Handle(to_bfloat16(result), tl.bfloat16)

    return operator


def _repair_scalars() -> None:
    stock_convert, stock_patch = interpreter._implicit_cvt, interpreter._patch_lang_tensor

    def convert(argument):
        if type(argument) is float:
            return tl.tensor(_Handle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
        return stock_convert(argument)

    def patch(tensor, *scope):
        stock_patch(tensor, *scope)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])

    interpreter._implicit_cvt, interpreter._patch_lang_tensor = convert, patch


def _patch_once_per_launch() -> None:
    stock_launch = interpreter.GridExecutor.__call__

    def launch(self, *args, **kwargs):
        scope = interpreter._patch_lang(tl.standard.sum.fn)  # triton.language.core; the kernel's own adds the rest
        try:
            return stock_launch(self, *args, **kwargs)
        finally:
            scope.restore()

    def call_device_function(self, *args, **kwargs):
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = launch
    interpreter.InterpretedFunction.__call__ = call_device_function


def _elementwise(function):
    def call(x, **_):
        return tl.tensor(_Handle(function(x.handle.data.astype(np.float64)).astype(np.float32), x.handle.dtype), x.type)

    return call


# ---- checks
class _Memory:
    """The elements of one tensor argument of a launch, and which program has stored to each element of its storage."""

    def __init__(self, tensor: torch.Tensor, stores: dict):
        self.name = f"{str(tensor.dtype).removeprefix('torch.')} tensor {tuple(tensor.shape)}"
        self.itemsize = tensor.element_size()
        storage = tensor.untyped_storage()
        self.start, elements = storage.data_ptr(), storage.nbytes() // self.itemsize
        inside = torch.zeros(elements, dtype=torch.bool)
        inside.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
        self.inside = inside.numpy()
        self.stores = stores.setdefault((self.start, self.itemsize), np.full(elements, -1))

    def lanes(self, action: str, pointers: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The element numbers, in the storage, of the lanes that are on."""
        index = (np.broadcast_to(pointers, mask.shape)[mask].astype(np.int64) - self.start) // self.itemsize
        outside = (index < 0) | (index >= self.inside.size)
        if not outside.any():
            outside = ~self.inside[index]
        if outside.any():
            raise KernelMemoryError(
                f"{action}: {int(outside.sum())} of {index.size} lanes lie outside their {self.name} in program"
                f" {interpreter.interpreter_builder.grid_idx}; mask them off"
            )
        return index

    def check_load(self, pointers, mask) -> None:
        writers = self.stores[self.lanes("load", pointers, mask)]
        if ((writers != -1) & (writers != _program())).any():
            raise KernelMemoryError(f"race: program {_program()} loads what another has stored to its {self.name}")

    def check_store(self, pointers, mask) -> None:
        index, program = self.lanes("store", pointers, mask), _program()
        writers = self.stores[index]
        if ((writers != -1) & (writers != program)).any():
            raise KernelMemoryError(f"race: program {program} and another store to one address of their {self.name}")
        self.stores[index] = program


def _program() -> int:
    (x, y, z), (_, ny, nz) = interpreter.interpreter_builder.grid_idx, interpreter.interpreter_builder.grid_dim
    return (x * ny + y) * nz + z


def _follow_pointers() -> None:
    """Every pointer carries, through arithmetic and broadcasting, the memory that it came from."""
    stores: dict = {}
    stock_convert, stock_call = interpreter._implicit_cvt, interpreter.GridExecutor.__call__

    def convert(argument):
        result = stock_convert(argument)
        if isinstance(argument, torch.Tensor):
            result.handle.attr["memory"] = _Memory(argument, stores)
        return result

    def call(self, *args, **kwargs):
        stores.clear()
        with np.errstate(all="ignore"):  # as on a GPU, overflow and NaN are values
            return stock_call(self, *args, **kwargs)

    interpreter._implicit_cvt, interpreter.GridExecutor.__call__ = convert, call

    def following(stock):
        def method(self, *args):
            result = stock(self, *args)
            source = next(a for a in args if isinstance(a, _Handle))
            if "memory" in source.attr:
                result.attr["memory"] = source.attr["memory"]
            return result

        return method

    for name in ("addptr", "splat", "unsplat", "broadcast", "expand_dims", "reshape", "trans", "bitcast"):
        if hasattr(_Builder, f"create_{name}"):
            setattr(_Builder, f"create_{name}", following(getattr(_Builder, f"create_{name}")))


def _check_memory() -> None:
    stock_load, stock_store = _Builder.create_masked_load, _Builder.create_masked_store

    def load(self, pointers, mask, other, *rest):
        mask = _Handle(np.broadcast_to(np.asarray(mask.data, bool), np.shape(pointers.data)).copy(), tl.int1)
        _memory(pointers).check_load(pointers.data, mask.data)
        if other is None:
            other = _poison(pointers)
        return stock_load(self, pointers, mask, other, *rest)

    def store(self, pointers, value, mask, *rest):
        _memory(pointers).check_store(pointers.data, np.broadcast_to(mask.data, np.shape(pointers.data)))
        return stock_store(self, pointers, value, mask, *rest)

    _Builder.create_masked_load, _Builder.create_masked_store = load, store


def _memory(pointers) -> _Memory:
    if "memory" not in pointers.attr:
        raise KernelMemoryError("a pointer was made in a way that the checks cannot follow: add offsets to an argument")
    return pointers.attr["memory"]


def _poison(pointers):
    """What masked-off lanes without `other` hold."""
    dtype = pointers.get_element_ty()
    if dtype.is_floating():
        bits = dtype.primitive_bitwidth
        nan = {tl.bfloat16: 0x7FC0}.get(dtype, 0x7F if bits == 8 else np.nan)
        return _Handle(np.full(np.shape(pointers.data), nan, interpreter._get_np_dtype(dtype)), dtype)
    numpy_dtype = interpreter._get_np_dtype(dtype)
    huge = True if numpy_dtype == np.bool_ else np.iinfo(numpy_dtype).max // 2
    return _Handle(np.full(np.shape(pointers.data), huge, numpy_dtype), dtype)


assert triton.knobs.runtime.interpret, "pyfast.triton_interpreter needs TRITON_INTERPRET=1 before triton is imported"
