"""Times the variants of an op side by side: results checked first, turns interleaved, medians and spread reported.

A `Case` is one shape and dtype of one op. Its variants compute the same thing: the first is PyFast, the second, in
fp32, is what all are checked against. FLOPs and bytes are counted by hand per case, from what the operation must do and
no more, so that rates are comparable between variants.
"""

import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch

from pyfast import dispatch

from . import machine
from .roofline import clones

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDS = 5
PEER_TOLERANCE = 0.3  # a wrong call is off by more; torch's own sums of 16,384 rows in bf16 by less
TURN_SECONDS = 0.02  # a turn repeats a quick variant until it takes about this long


def compiled(function: Callable) -> Callable:
    """A peer under torch.compile, for the one shape that it will see."""
    compile_once = functools.cache(
        lambda: torch.compile(function, dynamic=False)
    )  # importing the compiler takes seconds
    return lambda *inputs: compile_once()(*inputs)


def clone(times: float, of: int = 1) -> dict[str, Callable]:
    """The floor of an op that is bound by memory: clone() of the first `of` inputs, so often that its bytes move."""
    return {"clone": lambda *inputs: clones(times, *inputs[:of])}


@dataclass
class Case:
    """op, label: what is measured. inputs(): fresh tensors; those that require grad get gradients.

    variants: name -> function of the inputs, giving one tensor or a tuple of them.
    floors: name -> function of the inputs that only moves the same bytes, or only makes the same matrix products,
        forward and backward together: what the time is held against. Its results are not checked.
    flops, bytes: of forward and backward together; flops of elementwise ops are left out, being no limit.
    tolerance: how far PyFast may be off, as a share of the largest value; the error rule itself is the tests' matter,
        this catches a benchmark of a wrong call.
    axis, x: the quantity along which charts are drawn (sequence length, vocabulary) and this case's value of it.
    """

    op: str
    label: str
    inputs: Callable[[], tuple]
    variants: dict[str, Callable]
    dtype: torch.dtype = torch.float32
    floors: dict[str, Callable] = field(default_factory=dict)
    flops: float = 0.0
    bytes: float = 0.0
    backward: bool = True
    tolerance: float = 2e-2
    axis: str | None = None
    x: int | None = None

    def __post_init__(self):
        self._cotangents: dict = {}
        self.seconds: dict[str, list[float]] = {}
        self.memory: dict[str, float] = {}
        self.by_torch = False  # whether PyFast has PyTorch serve this case: dispatch.SMALL

    @property
    def timed(self) -> list[str]:
        return [*self.variants, *self.floors]

    def without(self, names: Iterable[str]) -> "Case":
        """Leaves out the variants of these names. PyFast and the first peer stay."""
        kept = list(self.variants)[:2]
        self.variants = {name: f for name, f in self.variants.items() if name in kept or name not in names}
        return self

    def run(self, variant: str, inputs: tuple) -> list[torch.Tensor]:
        """Outputs and, with backward, gradients of one call."""
        if variant in self.floors:
            with torch.no_grad():
                self.floors[variant](*inputs)
            return []
        outputs = self.variants[variant](*inputs)
        outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
        if not self.backward:
            return list(outputs)
        wanted = [x for x in inputs if torch.is_tensor(x) and x.requires_grad]
        gradients = torch.autograd.grad(outputs, wanted, [self.cotangent(y) for y in outputs])
        return [y.detach() for y in outputs] + list(gradients)

    def cotangent(self, y: torch.Tensor) -> torch.Tensor:
        """A fixed incoming gradient, made once per shape so that making it is not timed."""
        if y.shape not in self._cotangents:
            drawn = torch.ones(()) if y.dim() == 0 else torch.randn(y.shape)
            self._cotangents[y.shape] = drawn.to(y.dtype)
        return self._cotangents[y.shape].to(y.dtype)

    def check(self, inputs: tuple) -> None:
        """Raises AssertionError where a variant is off from what the first peer computes in fp32."""
        with mock.patch.object(dispatch, "choose", side_effect=dispatch.choose, autospec=True) as choose:
            found = {"pyfast": self.run("pyfast", inputs)}
        self.by_torch = choose.called and dispatch.choose(*choose.call_args.args) == "torch"
        found |= {variant: self.run(variant, inputs) for variant in list(self.variants)[1:]}
        exact = tuple(
            x.detach().float().requires_grad_(x.requires_grad) if torch.is_tensor(x) and x.is_floating_point() else x
            for x in inputs
        )
        expected = self.run(list(self.variants)[1], exact)
        for variant, results in found.items():
            tolerance = self.tolerance if variant == "pyfast" else PEER_TOLERANCE
            for i, (result, truth) in enumerate(zip(results, expected, strict=True)):
                error, size = (result.float() - truth).abs().max(), truth.abs().max()
                assert error <= tolerance * size, (
                    f"{self.op} {self.label}: result {i} of {variant} is off by {error / size:.1e}"
                )

    def measure(self, rounds: int = ROUNDS) -> None:
        """Checks, reads what each variant holds at its peak, then times all variants and floors in turns."""
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # the compiled peers of the case before are not its business
        gc.collect()
        torch.manual_seed(0)
        inputs = self.inputs()
        self.check(inputs)
        repeats = {}
        for variant in self.timed:
            start = time.perf_counter()
            self.memory[variant] = machine.peak_mb(lambda variant=variant: self.run(variant, inputs))
            if time.perf_counter() - start < 1:  # else it is warm, and one call is a turn
                start = time.perf_counter()
                self.run(variant, inputs)
            repeats[variant] = max(1, int(TURN_SECONDS / max(time.perf_counter() - start, 1e-6)))
        self.seconds = {variant: [] for variant in self.timed}
        for _ in range(rounds):
            for variant in self.timed:
                start = time.perf_counter()
                for _ in range(repeats[variant]):
                    self.run(variant, inputs)
                self.seconds[variant].append((time.perf_counter() - start) / repeats[variant])

    def rows(self, limits: dict) -> Iterable[dict]:
        """One row per variant: median with the spread, rates, and the shares of this machine's limits."""
        ours = statistics.median(self.seconds["pyfast"])
        gemm = limits["gemm_bf16_tflops" if self.dtype == torch.bfloat16 else "gemm_fp32_tflops"]
        for variant, seconds in self.seconds.items():
            median = statistics.median(seconds)
            row = {"op": self.op, "case": self.label, "variant": variant, "ms": median * 1e3}
            row |= {"min_ms": min(seconds) * 1e3, "max_ms": max(seconds) * 1e3, "pyfast_speedup": median / ours}
            row |= {"floor": variant in self.floors, "loses": variant not in self.floors and median < ours}
            if variant == "pyfast":
                row["backend"] = "torch" if self.by_torch else "kernels"
            row |= {"flops": self.flops, "bytes": self.bytes, "peak_mb": self.memory[variant]}
            if self.flops:
                row["tflops"] = self.flops / median / 1e12
                row["of_gemm"] = row["tflops"] / gemm
            if self.bytes:
                row["gb_per_s"] = self.bytes / median / 1e9
                row["of_copy"] = row["gb_per_s"] / limits["copy_gb_per_s"]
            if self.axis:
                row |= {"axis": self.axis, "x": self.x}
            row["dtype"] = str(self.dtype).removeprefix("torch.")
            yield {key: float(f"{x:.4g}") if isinstance(x, float) else x for key, x in row.items()}


def on_rows(shapes: Iterable[tuple[int, int]], ops: Iterable[tuple]) -> Iterator[Case]:
    """Cases of ops on rows that are bound by memory, in both dtypes.

    ops: name, PyFast's function, torch's, the inputs ("x": of the rows' shape, "v": a vector of their width), and how
    many tensors of the first input's size forward and backward together move.
    """
    for name, dtype in DTYPES.items():
        for rows, width in shapes:
            for op, ours, torchs, kinds, moved in ops:

                def inputs(rows=rows, width=width, dtype=dtype, kinds=kinds):
                    sizes = ((rows, width) if kind == "x" else (width,) for kind in kinds)
                    return tuple(torch.randn(size).to(dtype).requires_grad_() for size in sizes)

                variants = {"pyfast": ours, "torch": torchs, "compile": compiled(torchs)}
                size = moved * rows * width * dtype.itemsize
                yield Case(op, f"{name} {rows} × {width}", inputs, variants, dtype, clone(moved / 2), bytes=size)


def measure(cases: Iterable[Case], limits: dict, before: Callable[[Case], None] = lambda _: None) -> list[dict]:
    """The rows of all cases. `before` is called with each case before its turn."""
    rows = []
    for case in cases:
        before(case)
        case.measure()
        rows.extend(case.rows(limits))
    return rows
