"""cross_entropy: softmax cross-entropy of logits, with label smoothing (Szegedy et al. 2016), softcap (Gemma 2) and
z-loss (PaLM). On CPUs the gradient is made in the forward pass while a row is in cache, as Liger-Kernel does.
"""

import torch
import torch.nn.functional as F

from pyfast import dispatch, reference
from pyfast.ops.autograd import anchor, first_order
from pyfast.ops.checks import check_floating, check_number, check_softcap, describe, values_known


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy of logits and class indices, as torch.nn.functional.cross_entropy, always in fp32.

    input: (rows, V) or (V,), floating: the logits. target: (rows,) or (), int64: 0 <= target < V, or ignore_index.
    weight: (V,), floating, any dtype: a weight per class; it gets no gradient.
    softcap: logits are first replaced by softcap * tanh(logits / softcap).
    z_loss: adds z_loss * logsumexp(logits)² per row that counts; its mean is over the rows that count.
    Returns () for reduction "mean" (divided by the sum of the targets' class weights; NaN where no row counts, as in
    torch) and "sum", the shape of target for "none" (0 in ignored rows); fp32, or fp64 for fp64 input.
    Logits of more dimensions need a reshape(-1, V): torch puts the classes in dimension 1 there. Class probabilities as
    target are not served. Saves the gradient of input (or input itself, for reduction "none", on GPUs, and for fp16,
    whose range would lose small gradients before a loss scaler's factor reaches them).
    Raises TypeError for wrong dtypes, ValueError for wrong shapes, devices, values or a target out of range.
    """
    op = "cross_entropy"
    check_floating(op, input=input)
    if input.dim() not in (1, 2):
        raise ValueError(f"{op}: input is {describe(input)}, expected (rows, V) or (V,): reshape it to (-1, V)")
    options = (ignore_index, reduction, label_smoothing)
    counted = check_loss(op, input, target, input.shape[-1], weight, *options, softcap, z_loss)
    plain = counted and weight is None and softcap is None and z_loss == 0
    backend = dispatch.choose(op, input, input.numel() if plain else None)
    if backend == "reference":
        return reference.cross_entropy(
            input,
            target,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            softcap=softcap,
            z_loss=z_loss,
        )
    if backend == "torch":
        logits = reference.wide(input)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return composite_loss(logits, target, weight, *options, z_loss)
    rows = input.reshape(-1, input.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    graph = anchor(rows) if torch.is_grad_enabled() and input.requires_grad else None
    loss = _CrossEntropy.apply(rows, target.reshape(-1), weight, graph, *options, softcap, z_loss, backend)
    return loss.view(target.shape) if reduction == "none" else loss


def check_loss(op, input, target, classes, weight, ignore_index, reduction, label_smoothing, softcap, z_loss) -> bool:
    """The checks of every loss: target (...) of input (..., anything) with `classes` classes, and the options.

    Returns whether it is known that every row counts: PyTorch's operators let a NaN through from a row that does not.
    """
    if not isinstance(target, torch.Tensor):
        raise TypeError(f"{op}: target is {type(target).__name__}, expected a torch.Tensor")
    if target.dtype != torch.int64:
        hint = " (class probabilities are not served)" if target.is_floating_point() else ""
        raise TypeError(f"{op}: target is {describe(target)}, expected int64 class indices{hint}")
    if target.shape != input.shape[:-1]:
        expected = tuple(input.shape[:-1])
        raise ValueError(f"{op}: target is {describe(target)}, expected {expected}: one class per row of input")
    if target.device != input.device:
        raise ValueError(f"{op}: target is {describe(target)}, expected the device of input, {input.device}")
    if classes < 1:
        raise ValueError(f"{op}: there are no classes: the vocabulary's dimension is empty")
    if weight is not None:
        check_vector(op, "weight", weight, classes, input)
        if weight.requires_grad:
            raise ValueError(f"{op}: weight requires grad, but class weights get no gradient: detach it")
    if not isinstance(ignore_index, int):
        raise TypeError(f"{op}: ignore_index is {ignore_index!r}, expected an int")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"{op}: ignore_index is {ignore_index}, expected an int that fits in 64 bits")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{op}: reduction is {reduction!r}, expected 'none', 'mean' or 'sum'")
    check_number(op, label_smoothing=label_smoothing, z_loss=z_loss)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing is {label_smoothing}, expected a number from 0 to 1")
    check_softcap(op, softcap)
    if not z_loss >= 0:
        raise ValueError(f"{op}: z_loss is {z_loss}, expected a number that is not negative")
    if not values_known(target) or not target.numel():  # the kernels check
        return False
    low, high = (value.item() for value in target.aminmax())
    if low >= 0 and high < classes:
        return not 0 <= ignore_index < classes
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if wrong.any():
        raise ValueError(
            f"{op}: target has {int(wrong.sum())} values out of range, the first {int(target[wrong][0])}:"
            f" expected 0 to {classes - 1}, or ignore_index {ignore_index}"
        )
    return False


def check_vector(op, name, vector, classes, input):
    """`vector`, one value per class, on input's device."""
    check_floating(op, **{name: vector})
    if vector.shape != (classes,):
        raise ValueError(f"{op}: {name} is {describe(vector)}, expected ({classes},): one value per class")
    if vector.device != input.device:
        raise ValueError(f"{op}: {name} is {describe(vector)}, expected the device of input, {input.device}")


def composite_loss(
    logits, target, weight, ignore_index, reduction, label_smoothing, z_loss, num_items_in_batch=None
) -> torch.Tensor:
    """The loss of logits in fp32 or fp64 by PyTorch's own operators."""

    flat = logits.dim() == 2  # a view of itself would be a node of autograd more

    def loss(reduction):
        return F.cross_entropy(
            logits if flat else logits.reshape(-1, logits.shape[-1]),
            target if flat else target.reshape(-1),
            None if weight is None else weight.to(logits.dtype),
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )

    if z_loss == 0 and num_items_in_batch is None:
        return loss(reduction).view(target.shape) if reduction == "none" else loss(reduction)
    counted = target != ignore_index
    z = z_loss * logits.logsumexp(-1).square().where(counted, 0)
    if reduction == "none":
        return loss("none").view(target.shape) + z
    if reduction == "sum":
        return loss("sum") + z.sum()
    if num_items_in_batch is not None:
        items = torch.as_tensor(num_items_in_batch, dtype=logits.dtype, device=logits.device)
        return (loss("sum") + z.sum()) / items.where(counted.any(), 1)
    return loss("mean") + z.sum() / counted.sum()


def divisors(target, weight, ignore_index, reduction, num_items_in_batch=None):
    """What a reduction divides the sum of the losses and the sum of the squared logsumexps by: two fp64 scalars."""
    counted = target != ignore_index
    rows = counted.sum(dtype=torch.float64)
    if reduction != "mean":
        return torch.ones_like(rows), torch.ones_like(rows)
    if num_items_in_batch is not None:
        items = torch.as_tensor(num_items_in_batch, dtype=torch.float64, device=target.device)
        items = items.where(rows > 0, 1)  # without rows the loss is 0, also of 0 items
        return items, items
    if weight is None:
        return rows, rows
    return weight.double()[target.where(counted, 0)].where(counted, 0).sum(), rows


def per_row(loss_gradient: torch.Tensor, square_gradient: torch.Tensor, rows: int) -> torch.Tensor:
    """(rows, 2) fp64 for a kernel: the gradient of the result with respect to each row's loss and squared logsumexp."""
    return torch.stack((loss_gradient.expand(rows), square_gradient.expand(rows)), -1).double()


def total_loss(loss, lse, z_loss, loss_divisor, row_divisor):
    total = loss.sum() / loss_divisor
    if z_loss != 0:
        total = total + z_loss * lse.square().sum() / row_divisor
    return total.float()


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, target, weight, graph, ignore_index, reduction, label_smoothing, softcap, z_loss, backend):
        target = target.contiguous()
        weight = None if weight is None else weight.float().contiguous()
        ctx.options, ctx.z_loss, ctx.backend = (ignore_index, label_smoothing, softcap), z_loss, backend
        scalar = reduction != "none"
        upstream = None
        if scalar:
            loss_divisor, row_divisor = divisors(target, weight, ignore_index, reduction)
            upstream = per_row(1 / loss_divisor, z_loss / row_divisor, target.shape[0])
        # a gradient made now makes the host ask in backward whether dy is 1: not on GPUs, which it does not wait for
        ctx.fused = scalar and graph is not None and input.dtype != torch.float16 and backend == "cpu"
        loss, lse, dinput = dispatch.kernels(backend).cross_entropy(
            input, target, weight, upstream if ctx.fused else None, *ctx.options
        )
        if ctx.fused:
            ctx.save_for_backward(dinput, graph)
        elif graph is not None:
            ctx.save_for_backward(input, target, weight, upstream)
        if scalar:
            return total_loss(loss, lse, z_loss, loss_divisor, row_divisor)
        return (loss + z_loss * lse.square()).float()

    @staticmethod
    @first_order
    def backward(ctx, dy):
        if ctx.fused:
            dinput, _ = ctx.saved_tensors
            # what is saved is handed out itself only where no other backward can come: its receiver may write to it
            kept = torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()
            if kept or dy.item() != 1:
                dinput = dinput * dy
        else:
            input, target, weight, upstream = ctx.saved_tensors
            upstream = per_row(dy, ctx.z_loss * dy, target.shape[0]) if upstream is None else upstream * dy
            _, _, dinput = dispatch.kernels(ctx.backend).cross_entropy(input, target, weight, upstream, *ctx.options)
        return dinput, *[None] * 9
