"""pyfast.verify: are loss, logits and every gradient of your patched model right, on your own batch?

(A module called pyfast.verify would hide the function.)
"""

import copy
import functools
import inspect
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import psutil
import torch
from rich.console import Console
from rich.table import Column, Table
from torch import nn
from torch.overrides import TorchFunctionMode

from pyfast import ops
from pyfast.close import WEAK, Comparison, Step, compare_steps, compare_stock
from pyfast.hf.patch import _check_model, _root, patch, unpatch
from pyfast.hf.swap import stock_class

IGNORED = -100
SHOWN = 12  # rows of gradients in the printed table: the nearest to their bound, and all that fail


class Planted(NamedTuple):
    """A known error that was planted in one op, and what showed it, None where nothing did."""

    op: str
    error: str
    caught_by: str | None


@dataclass
class VerifyReport:
    """What `verify` found. Printed, it is a table; `passed` says whether all is right.

    compared: error and bound of the loss, the logits and each parameter's gradient
    precision: what stock and patched were held against: fp64, fp32, or None: against each other alone
    planted: with mutate=True, each known error and what caught it
    left_out: how many queries without keys were left out, and supervised tokens with them
    """

    model: str
    dtype: torch.dtype
    precision: torch.dtype | None
    compared: list[Comparison]
    planted: list[Planted] = field(default_factory=list)
    left_out: tuple[int, int] = (0, 0)

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.compared) and all(p.caught_by is not None for p in self.planted)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120)
        console.print(self._table())
        if len(self.compared) > SHOWN:
            console.print(f"{len(self.compared)} tensors compared; the nearest to their bound are shown.")
        if self.precision is None:
            console.print(
                "Weaker check: a copy of the model in more precision does not fit in memory (or its weights are"
                " quantized), so that patched was held against stock alone."
            )
        if self.left_out[0]:
            console.print(
                f"{self.left_out[0]} queries without keys (leading padding) were left out of the logits, and"
                f" {self.left_out[1]} labels of what they predict out of the loss."
            )
        if self.planted:
            table = Table(
                "op", "planted error", Column("caught by", overflow="fold"), title="Known errors, planted one by one"
            )
            for op, error, caught in self.planted:
                table.add_row(op, error, caught or "[bold]NOT CAUGHT[/bold]")
            console.print(table)
        console.print("PASSED" if self.passed else "FAILED")
        return console.file.getvalue().rstrip()

    def _table(self) -> Table:
        against = str(self.precision or "stock").removeprefix("torch.")
        title = f"{self.model}, {str(self.dtype).removeprefix('torch.')}, patched against {against}"
        table = Table(Column("tensor", overflow="fold"), "size", "error", "allowed", "", title=title)

        def nearness(row):
            return (row.passed, -(row.error / row.allowed if row.allowed else 0.0))

        shown = sorted(self.compared, key=nearness)
        results = [row for row in self.compared if row.name in ("loss", "eval loss", "logits")]
        failing = sum(not row.passed for row in shown)
        for row in [*results, *[r for r in shown if r not in results][: max(SHOWN, failing)]]:
            numbers = (f"{x:.2e}" for x in (row.size, row.error, row.allowed))
            table.add_row(row.name, *numbers, "ok" if row.passed else row.reason or "WRONG")
        return table


def verify(model: nn.Module, batch: Mapping, *, mutate: bool = False) -> VerifyReport:
    """Takes one training step of the model stock, patched and in more precision, and compares them.

    model: a transformers model or a PEFT model around one. If it is patched, that patch is checked; if not,
        `pyfast.patch(model)` is. batch: what the model is called with, labels included.
    mutate: also plants known errors (a wrong scale, a dropped mask, a lost gradient...) in the ops that the patched
        model uses, one by one, and shows that the comparison catches each.

    The patched model's loss, its loss and logits in eval(), and the gradient of every trainable parameter may err by
    twice what the stock model's do against the same model in fp64 (fp32 for a 16-bit model if fp64 does not fit in
    memory). Where neither fits, patched is compared with stock alone and the report is labelled as the weaker check.
    Dropout is off, since stock and patched draw different masks; queries without keys are left out, for their output is
    not defined.
    The model, its gradients, its training mode and the random number generators stay as they are: the steps are taken
    by copies that share the weights.
    Raises TypeError for a thing that is not a model or a batch, ValueError for a batch without labels.
    """
    _check_model(model)
    if not isinstance(batch, Mapping):
        raise TypeError(f"pyfast.verify: batch is {type(batch).__name__}, expected a mapping of the model's arguments")
    if batch.get("labels") is None:
        raise ValueError("pyfast.verify: batch has no labels, and without them the model gives no loss to compare")
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("pyfast.verify: no parameter of the model requires a gradient: there is no step to compare")
    batch, keyless, lost = _without_keyless(batch)
    patched, stock = _copy(model), _copy(model)
    unpatch(stock)
    if not any(stock_class(module) is not type(module) for module in model.modules()):
        patch(patched)
    # the coarsest dtype that the weights have sets what rounding does to a step
    dtype = max({p.dtype for p in model.parameters() if p.dtype in WEAK}, key=lambda d: torch.finfo(d).eps)
    precision = _affordable(model, dtype)
    own = _step(stock, batch, keyless)
    if precision is None:
        compare = functools.partial(compare_stock, own=own, dtype=dtype)
    else:
        stock.to(precision)
        for module in stock.modules():  # recomputation in backward would not be under InDouble
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False
        with InDouble() if precision == torch.float64 else nullcontext():
            truth = _step(stock, _cast(batch, precision), keyless)
        compare = functools.partial(compare_steps, ref=truth, own=own, u=torch.finfo(dtype).eps / 2)
    del stock
    report = VerifyReport(stock_class(_root(model)).__name__, dtype, precision, compare(_step(patched, batch, keyless)))
    report.left_out = 0 if keyless is None else int(keyless.sum()), lost
    if mutate:
        for mutation in MUTATIONS:
            with _planted(mutation) as uses:
                wrong = compare(_step(patched, batch, keyless))
            if uses:
                caught = max((row for row in wrong if not row.passed), key=_excess, default=None)
                report.planted.append(Planted(mutation.op, mutation.error, caught and caught.name))
    return report


def _excess(row: Comparison) -> float:
    if row.reason or row.error != row.error:
        return float("inf")
    return row.error / max(row.allowed, 1e-300)


# ---- copies and steps
def _copy(model: nn.Module) -> nn.Module:
    """A model of its own that shares the weights' memory, in training mode, without dropout."""
    memo = {}
    for parameter in model.parameters():
        shared = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        memo[id(parameter)] = shared if type(parameter) is nn.Parameter else parameter
    model = copy.deepcopy(model, memo)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(vars(holder).items()) if holder is not None else ():
                if "drop" in name and isinstance(value, float):
                    setattr(holder, name, 0.0)
    return model.train()


def _step(model: nn.Module, batch: dict, keyless: torch.Tensor | None) -> Step:
    """Loss and gradients of a training step, loss and logits in eval(). The model's gradients are left empty."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.enable_grad():
        torch.manual_seed(0)
        loss = model(**batch).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        model.zero_grad(set_to_none=True)
        model.eval()
        with torch.no_grad():
            outputs = model(**batch)
        model.train()
    logits = getattr(outputs, "logits", None)
    if torch.is_tensor(logits) and keyless is not None and logits.shape[:-1] == keyless.shape:
        logits = logits[~keyless.to(logits.device)]
    return Step(loss.detach(), outputs.loss, gradients, logits if torch.is_tensor(logits) else None)


def _cast(batch: dict, dtype: torch.dtype) -> dict:
    return {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}


def _without_keyless(batch: Mapping) -> tuple[dict, torch.Tensor | None, int]:
    """The batch without labels that a query without keys predicts, where such queries are, and how many labels went.

    Such a query stands before a row's first token (left padding), or in a row with no token at all.
    """
    batch = dict(batch)
    mask, labels = batch.get("attention_mask"), batch["labels"]
    if not torch.is_tensor(mask) or mask.dim() != 2:
        return batch, None, 0
    keyless = mask.cumsum(-1) == 0
    if not keyless.any():
        return batch, None, 0
    lost = 0
    if torch.is_tensor(labels) and labels.shape == mask.shape:
        # a label belongs to the query at its place, or to the one before it (next-token prediction)
        unseen = keyless | nn.functional.pad(keyless, (1, 0))[:, :-1]
        unseen = unseen.to(labels.device) & (labels != IGNORED)
        batch["labels"] = labels.masked_fill(unseen, IGNORED)
        lost = int(unseen.sum())
    return batch, keyless, lost


def _affordable(model: nn.Module, dtype: torch.dtype) -> torch.dtype | None:
    """The precision of the copy that stock and patched are held against: fp64, else fp32 for a 16-bit model, else None.

    Counted: the copy's weights, its gradients and the other two's, and half as much again for activations.
    """
    if getattr(model, "quantization_method", None) is not None or not all(
        p.is_floating_point() and type(p) is nn.Parameter for p in model.parameters()
    ):
        return None
    weights = sum(p.numel() for p in model.parameters())
    gradients = sum(p.numel() for p in model.parameters() if p.requires_grad)
    device = next(model.parameters()).device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    for precision in (torch.float64, torch.float32):
        need = (weights + gradients) * precision.itemsize + 2 * gradients * dtype.itemsize
        if torch.finfo(precision).eps < torch.finfo(dtype).eps and 1.5 * need < free:
            return precision
    return None


class InDouble(TorchFunctionMode):
    """Turns the fp32 that models ask for by name into fp64, so that an fp64 model is fp64 throughout."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            return args[0].double()
        if func is torch.Tensor.type_as:
            return args[0].to(args[1].dtype)

        def wide(value):
            return torch.float64 if value is torch.float32 else value

        return func(*[wide(a) for a in args], **{name: wide(value) for name, value in (kwargs or {}).items()})


# ---- known errors
class Mutation(NamedTuple):
    """A known error of one op: `plant` changes its arguments, a dict, and says whether the error applies to them."""

    op: str
    error: str
    plant: Callable[[dict], bool]


@contextmanager
def _planted(mutation: Mutation) -> Iterator[list]:
    """Plants the error in pyfast.ops for the time of the block; gives a list that is not empty once it took effect."""
    op, uses = getattr(ops, mutation.op), []
    signature = inspect.signature(op)

    def wrong(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if mutation.plant(bound.arguments):
            uses.append(True)
        return op(*bound.args, **bound.kwargs)

    setattr(ops, mutation.op, wrong)
    try:
        yield uses
    finally:
        setattr(ops, mutation.op, op)


def _change(name: str, change: Callable, applies: Callable = lambda value, arguments: value is not None):
    """Plants change(value) for one argument where applies(value, arguments)."""

    def plant(arguments: dict) -> bool:
        if not applies(arguments[name], arguments):
            return False
        arguments[name] = change(arguments[name])
        return True

    return plant


def _steeper(x: torch.Tensor) -> torch.Tensor:
    """x, whose gradient is a quarter too large."""
    quarter = x * 0.25
    return x + (quarter - quarter.detach())


def _has_gradient(value, arguments) -> bool:
    return value is not None and value.requires_grad


def _scores_too_large(arguments: dict) -> bool:
    scale = arguments["scale"]
    arguments["scale"] = 1.25 * (arguments["q"].shape[-1] ** -0.5 if scale is None else scale)
    return True


def _looks_ahead(arguments: dict) -> bool:
    if not arguments["causal"]:
        return False
    arguments["causal"] = False
    if arguments["window_size"] is not None:  # it may end at the query too
        arguments["window_size"] = (arguments["window_size"][0], None)
    return True


def _padding_counts(arguments: dict) -> bool:
    mask = arguments["attention_mask"]
    if mask is None:
        return False
    behind = (~mask).cumsum(-1) > 0  # a causal query sees padding only if it stands before a token
    seen = (mask & behind).any() if arguments["causal"] else (~mask).any()
    if seen:
        arguments["attention_mask"] = None
    return bool(seen)


def _one_sequence(arguments: dict) -> bool:
    if len(arguments["cu_seqlens_q"]) < 3:
        return False
    for side in "qk":
        joined = arguments[f"cu_seqlens_{side}"][[0, -1]]
        arguments[f"cu_seqlens_{side}"], arguments[f"max_seqlen_{side}"] = joined, int(joined[1])
    return True


def _projections(change: Callable, applies: Callable):
    """Plants change(weights) in every LoRA projection among the arguments for which `applies`."""

    def plant(arguments: dict) -> bool:
        found = False
        for name, value in arguments.items():
            several = isinstance(value, list | tuple) and not hasattr(value, "_fields")
            changed = [
                change(w) if isinstance(w, ops.LoraWeights) and applies(w) else w
                for w in (value if several else [value])
            ]
            if any(a is not b for a, b in zip(changed, value if several else [value], strict=True)):
                arguments[name] = changed if several else changed[0]
                found = True
        return found

    return plant


def _swapped_gate(arguments: dict) -> bool:
    if arguments["gate"] is None:
        return False
    arguments["gate"], arguments["up"] = arguments["up"], arguments["gate"]
    return True


_LORA = (
    ("the adapter's scaling is a quarter too large", "scaling", lambda s: 1.25 * s, lambda w: w.lora_A is not None),
    (
        "lora_B gets no gradient",
        "lora_B",
        lambda b: b.detach(),
        lambda w: w.lora_B is not None and w.lora_B.requires_grad,
    ),
)

MUTATIONS: tuple[Mutation, ...] = (
    *(
        mutation
        for op in ("attention", "attention_varlen")
        for mutation in (
            Mutation(op, "scores are a quarter too large", _scores_too_large),
            Mutation(op, "the causal mask is dropped", _looks_ahead),
            Mutation(op, "the window is dropped", _change("window_size", lambda w: None)),
            Mutation(op, "the softcap is a quarter of what it is", _change("softcap", lambda c: 0.25 * c)),
            Mutation(op, "the gradient of v is a quarter too large", _change("v", _steeper, _has_gradient)),
        )
    ),
    Mutation("attention", "the padding mask is dropped", _padding_counts),
    Mutation("attention_varlen", "packed sequences see each other", _one_sequence),
    Mutation("rope", "positions turn backwards", _change("sin", lambda s: -s)),
    *(
        mutation
        for op in ("rms_norm", "layer_norm")
        for mutation in (
            Mutation(op, "the result is a quarter too large", _change("weight", lambda w: 1.25 * w)),
            Mutation(op, "the residual gets no gradient", _change("residual", torch.Tensor.detach, _has_gradient)),
        )
    ),
    *(
        Mutation(
            "lora_linear",
            error,
            _change(name, change, lambda _, a, f=applies: f(ops.LoraWeights(a["weight"], a["lora_A"], a["lora_B"]))),
        )
        for error, name, change, applies in _LORA
    ),
    *(
        Mutation(
            op,
            error,
            _projections(lambda w, name=name, change=change: w._replace(**{name: change(getattr(w, name))}), applies),
        )
        for op in ("lora_linears", "lora_mlp")
        for error, name, change, applies in _LORA
    ),
    Mutation("lora_mlp", "gate and up are exchanged", _swapped_gate),
    Mutation("lora_mlp", "the gradient of x is a quarter too large", _change("x", _steeper, _has_gradient)),
    Mutation(
        "cross_entropy", "the sum is not divided", _change("reduction", lambda r: "sum", lambda r, _: r == "mean")
    ),
    Mutation("cross_entropy", "the gradient is a quarter too large", _change("input", _steeper, _has_gradient)),
    Mutation("linear_cross_entropy", "targets are off by one row", _change("target", lambda t: t.roll(1))),
    Mutation("linear_cross_entropy", "the gradient is a quarter too large", _change("input", _steeper, _has_gradient)),
    Mutation("linear_cross_entropy", "logits are a quarter too large", _change("logit_scale", lambda s: 1.25 * s)),
)
