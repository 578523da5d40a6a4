"""Times the variants of an op side by side: results checked first, turns interleaved, medians and spread reported.

A `Case` is one shape and dtype of one op. Its variants compute the same thing; the first is PyFast. FLOPs and bytes are
counted by hand per case, from what the operation must do and no more, so that a rate is comparable between variants.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

ROUNDS = 7


@dataclass
class Case:
    """op, label: what is measured. inputs(): fresh tensors; those that require grad get gradients.

    variants: name -> function of the inputs, giving one tensor or a tuple of them; "pyfast" is checked and compared.
    flops, bytes: of forward and backward together. tolerance: of PyFast against "reference" or the first peer, as a
    share of the largest value; the error rule itself is the tests' matter, this catches a benchmark of a wrong call.
    """

    op: str
    label: str
    inputs: Callable[[], tuple]
    variants: dict[str, Callable]
    flops: float = 0.0
    bytes: float = 0.0
    backward: bool = True
    tolerance: float = 2e-2
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def run(self, variant: str, inputs: tuple) -> list[torch.Tensor]:
        """Outputs and, with backward, gradients of one call."""
        outputs = self.variants[variant](*inputs)
        outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
        if not self.backward:
            return list(outputs)
        wanted = [x for x in inputs if torch.is_tensor(x) and x.requires_grad]
        gradients = torch.autograd.grad(outputs, wanted, [self.cotangent(y) for y in outputs])
        return [y.detach() for y in outputs] + list(gradients)

    def cotangent(self, y: torch.Tensor) -> torch.Tensor:
        """A fixed incoming gradient, made once per shape so that making it is not timed."""
        key = (tuple(y.shape), y.dtype)
        if key not in self._cotangents:
            self._cotangents[key] = torch.ones_like(y) if y.dim() == 0 else torch.randn_like(y)
        return self._cotangents[key]

    def __post_init__(self):
        self._cotangents: dict = {}

    def check(self) -> None:
        """Raises AssertionError where PyFast and the first peer disagree."""
        inputs = self.inputs()
        peer = next(name for name in self.variants if name != "pyfast")
        results = [self.run(name, inputs) for name in ("pyfast", peer)]
        for i, (ours, theirs) in enumerate(zip(*results, strict=True)):
            error, size = (ours.float() - theirs.float()).abs().max(), theirs.float().abs().max()
            assert error <= self.tolerance * size, f"{self.op} {self.label}: result {i} is off by {error / size:.1e}"

    def measure(self, rounds: int = ROUNDS) -> None:
        inputs = self.inputs()
        for variant in self.variants:
            self.run(variant, inputs)
        once = time.perf_counter()
        self.run("pyfast", inputs)
        repeats = max(1, int(0.02 / max(time.perf_counter() - once, 1e-6)))
        self.seconds = {variant: [] for variant in self.variants}
        for _ in range(rounds):
            for variant in self.variants:
                start = time.perf_counter()
                for _ in range(repeats):
                    self.run(variant, inputs)
                self.seconds[variant].append((time.perf_counter() - start) / repeats)

    def rows(self, roofline: dict) -> Iterable[dict]:
        """One row per variant: median seconds with the spread, rates, and the share of this machine's limits."""
        ours = statistics.median(self.seconds["pyfast"])
        for variant, seconds in self.seconds.items():
            median = statistics.median(seconds)
            row = {"op": self.op, "case": self.label, "variant": variant, "ms": round(median * 1e3, 4)}
            row |= {"min_ms": round(min(seconds) * 1e3, 4), "max_ms": round(max(seconds) * 1e3, 4)}
            row["pyfast_speedup"] = round(median / ours, 3)
            if self.flops:
                row["tflops"] = round(self.flops / median / 1e12, 4)
                dtype = "bf16" if "bf16" in self.label else "fp32"
                row["of_gemm"] = round(row["tflops"] / roofline[f"gemm_{dtype}_tflops"], 3)
            if self.bytes:
                row["gb_per_s"] = round(self.bytes / median / 1e9, 3)
                row["of_copy"] = round(row["gb_per_s"] / roofline["copy_gb_per_s"], 3)
            yield row


def measure(cases: Iterable[Case], roofline: dict, progress: Callable[[str], None] = lambda _: None) -> list[dict]:
    rows = []
    for case in cases:
        progress(f"{case.op} {case.label}")
        case.check()
        case.measure()
        rows.extend(case.rows(roofline))
    return rows
