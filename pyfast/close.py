"""The error rule: how far a kernel's result may be from the truth.

`k` is the kernel's result, `ref` the same in fp64, `torch_result` PyTorch's own in the kernel's dtype, u that dtype's
unit roundoff. Elementwise:        max|k - ref| <= 2 max|torch - ref| + u max|ref|
and per row and per column of 16 elements or more, so that a few wrong ones cannot hide:
                              ||k - ref|| <= 2 worst||torch - ref|| + 2u ||ref|| + u worst||ref||
the worst over all rows (columns). The first is FlashAttention's rule; the second is ours.

For a whole training step (`compare_steps`) the same idea holds with one change: a model chains dozens of roundings, so
that the error of one small tensor is luck. The stock model's worst relative error over all gradients, in norm and by
element, stands for each.
"""

from typing import NamedTuple

import torch


def violation(k: torch.Tensor, ref: torch.Tensor, torch_result: torch.Tensor) -> str | None:
    """How `k` breaks the error rule, or None where it keeps it."""
    if not k.shape == ref.shape == torch_result.shape:
        return f"shapes {tuple(k.shape)}, {tuple(ref.shape)}, {tuple(torch_result.shape)}"
    if ref.dtype != torch.float64:
        return f"the reference must be fp64, not {ref.dtype}"
    if k.numel() == 0:
        return None
    u = torch.finfo(k.dtype).eps / 2
    k, t = k.detach().double(), torch_result.detach().double()
    ref = ref.detach()
    for label, value in (("result", k), ("reference", ref), ("PyTorch's result", t)):
        same = torch.isfinite(value) == torch.isfinite(ref)
        if not same.all():
            return f"{label} is not finite at {int((~same).sum())} places where the reference is"
    finite = torch.isfinite(ref)
    if not torch.equal(k[~finite].nan_to_num(nan=7.0), ref[~finite].nan_to_num(nan=7.0)):
        return "infinities differ"
    zero = torch.zeros((), dtype=torch.float64, device=ref.device)
    k, t, ref = (torch.where(finite, value, zero) for value in (k, t, ref))
    error, allowed = (k - ref).abs().max(), 2 * (t - ref).abs().max() + u * ref.abs().max()
    if not error <= allowed:
        return f"max error {error:.3e} > {allowed:.3e} (PyTorch's own {(t - ref).abs().max():.3e})"
    lines = [("row", (k if k.dim() else k[None])), ("column", k.reshape(-1, k.shape[-1]).T if k.dim() > 1 else None)]
    for kind, lines_k in lines:
        if lines_k is None or lines_k.shape[-1] < 16:
            continue

        def shaped(x, kind=kind):
            return (x.reshape(-1, x.shape[-1]).T if kind == "column" else x).double()

        d = (shaped(k) - shaped(ref)).norm(dim=-1)
        d_torch, size = (shaped(t) - shaped(ref)).norm(dim=-1).max(), shaped(ref).norm(dim=-1)
        bound = 2 * d_torch + 2 * u * size + u * size.max()
        if not (d <= bound).all():
            return (
                f"{kind} {int((d - bound).argmax())} of {d.numel()} is off by {float((d - bound).max()):.3e} beyond"
                f" the bound in norm ({int((d > bound).sum())} {kind}s are)"
            )
    return None


class Comparison(NamedTuple):
    """One tensor of a step: its error and what is allowed, in the measure (norm or largest element) that is worse."""

    name: str
    error: float
    allowed: float
    size: float
    reason: str = ""  # where the tensors cannot be compared at all

    @property
    def passed(self) -> bool:
        return not self.reason and self.error <= self.allowed


class Step(NamedTuple):
    """What a training step gave, and eval() on the same batch. A gradient is None where a parameter got none."""

    loss: torch.Tensor
    eval_loss: torch.Tensor | None
    gradients: dict[str, torch.Tensor | None]
    logits: torch.Tensor | None = None


_MEASURES = (torch.linalg.vector_norm, lambda t: t.abs().max())


def compare_steps(got: Step, ref: Step, own: Step, u: float) -> list[Comparison]:
    """`got` may err twice as much as `own`, the stock model's step, does against `ref`, the same in more precision.

    A gradient that is zero but for rounding (the bias of keys) is held to the stock model's own error.
    """
    rows = []
    for name in ("loss", "eval_loss"):
        if getattr(ref, name) is not None:
            loss, ref_loss, own_loss = (float(getattr(step, name)) for step in (got, ref, own))
            allowed = 2 * abs(own_loss - ref_loss) + 4 * u * abs(ref_loss)
            rows.append(Comparison(name.replace("_", " "), abs(loss - ref_loss), allowed, abs(ref_loss)))
    if ref.logits is not None:
        rows.append(_worse("logits", [_excess(m, got.logits, ref.logits, own.logits, u) for m in _MEASURES]))
    return rows + _compare_gradients(got.gradients, ref.gradients, own.gradients, u)


def _excess(measure, got, ref, own, u):
    error, size = float(measure(got.double() - ref)), float(measure(ref.double()))
    return error, 2 * float(measure(own.double() - ref)) + 2 * u * size, size


def _compare_gradients(got, ref, own, u):
    sizes = {name: float(torch.linalg.vector_norm(g.double())) for name, g in ref.items() if g is not None}
    negligible = 1e-6 * max(sizes.values(), default=0.0)
    found: dict[str, list] = {name: [] for name in sizes}
    for measure in _MEASURES:
        size = {name: float(measure(ref[name].double())) for name in sizes}
        errors = {name: float(measure(own[name].double() - ref[name])) for name in sizes if own[name] is not None}
        worst = max((errors[name] / size[name] for name in errors if sizes[name] > negligible), default=0.0)
        for name in sizes:
            if got.get(name) is not None and own[name] is not None:
                error = float(measure(got[name].double() - ref[name]))
                allowed = 2 * max(worst * size[name], 2 * errors[name]) + 4 * u * size[name]
                found[name].append((error, allowed, size[name]))
    rows = []
    for name in ref:
        given = (got.get(name), own[name])
        if any((g is None) != (ref[name] is None) for g in given):
            rows.append(Comparison(name, 0.0, 0.0, sizes.get(name, 0.0), _missing(*given)))
        elif ref[name] is not None and given[0].dtype != given[1].dtype:
            rows.append(Comparison(name, 0.0, 0.0, sizes[name], f"{given[0].dtype}, stock {given[1].dtype}"))
        elif ref[name] is not None:
            rows.append(_worse(name, found[name]))
    return rows


def _missing(got, own):
    return "no gradient where stock has one" if got is None else "a gradient where stock has none"


def _worse(name, found):
    """The measure whose error stands further beyond what is allowed; a NaN is worst of all."""
    return Comparison(name, *max(found, key=lambda f: float("inf") if f[0] != f[0] else f[0] / max(f[1], 1e-300)))


#: of `compare_stock`: the share of a tensor's norm that patched and stock may differ by, a tenth of it for a loss.
#: Seen in bf16: 3 % in 8 layers of width 768.
WEAK = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 2e-2}


def compare_stock(got: Step, own: Step, dtype: torch.dtype) -> list[Comparison]:
    """The weaker check, with nothing to say which of the two is right: in norm, by fixed shares (`WEAK`).

    A small gradient may differ by the share of a hundredth of the largest one: its own rounding may be all that it is.
    """
    share = WEAK[dtype]
    rows = []
    for name in ("loss", "eval_loss"):
        if getattr(own, name) is not None:
            ours, theirs = float(getattr(got, name)), float(getattr(own, name))
            rows.append(Comparison(name.replace("_", " "), abs(ours - theirs), 0.1 * share * abs(theirs), abs(theirs)))
    if own.logits is not None:
        size = float(own.logits.double().norm())
        rows.append(Comparison("logits", float((got.logits.double() - own.logits).norm()), share * size, size))
    sizes = {name: float(g.double().norm()) for name, g in own.gradients.items() if g is not None}
    floor = 1e-2 * max(sizes.values(), default=0.0)
    for name, gradient in own.gradients.items():
        ours = got.gradients.get(name)
        if (ours is None) != (gradient is None):
            rows.append(Comparison(name, 0.0, 0.0, sizes.get(name, 0.0), _missing(ours, gradient)))
        elif gradient is not None:
            error = float((ours.double() - gradient).norm())
            rows.append(Comparison(name, error, share * max(sizes[name], floor), sizes[name]))
    return rows
