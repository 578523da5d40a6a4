"""linear_cross_entropy: the language-model head and its loss as one op that never holds the logits.

The gradient is made in the forward pass, as Liger-Kernel does it: with a frozen head a step takes two matrix products
(logits, then the gradient of input) over the rows that count, and nothing else.
"""

import math

import torch
import torch.nn.functional as F

from pyfast import dispatch, reference
from pyfast.ops.autograd import anchor, autocast, distinct, first_order
from pyfast.ops.checks import check_floating, check_number, describe, values_known
from pyfast.ops.cross_entropy import check_loss, check_vector, composite_loss, divisors, per_row, total_loss

#: of a chunk's logits, the memory that the native op needs beyond its results
LOGITS_BYTES = 48 << 20
GPU_LOGITS_BYTES = 160 << 20  # of their exponentials, on a GPU: 512 rows of 128,256 or 151,936 classes


def linear_cross_entropy(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    *,
    linear_bias: torch.Tensor | None = None,
    lora_A: torch.Tensor | None = None,
    lora_B: torch.Tensor | None = None,
    scaling: float = 1.0,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    num_items_in_batch: int | float | torch.Tensor | None = None,
) -> torch.Tensor:
    """cross_entropy of logits = (input Wᵀ + bias + scaling · (input Aᵀ) Bᵀ) · logit_scale, then softcap.

    input: (..., K), floating. linear_weight (V, K), linear_bias (V,), lora_A (r, K) and lora_B (V, r): floating, any
    dtype and strides; logits are computed in input's dtype, each gradient has its parameter's dtype, and where none is
    needed none is made. target: (...), int64: 0 <= target < V, or ignore_index; kernels never multiply ignored rows.
    weight, label_smoothing, softcap, z_loss, reduction: as in pyfast.ops.cross_entropy; reduction "none" gives (...).
    num_items_in_batch: with reduction "mean", what loss and z-loss are divided by instead of the batch's own count
    (gradient accumulation over several batches); a number or a 0-dim tensor. Where no row counts the loss and its
    gradients are then 0, whatever the number of items.
    Returns fp32 (fp64 for fp64 input). Under autocast input is cast to its dtype.
    "mean" and "sum" save the gradients, not input; so does "none" where only input needs one, else it saves its inputs
    and computes the logits again in backward.
    Raises TypeError for wrong dtypes, ValueError for wrong shapes, devices, values or a target out of range.
    """
    op = "linear_cross_entropy"
    check_floating(op, input=input, linear_weight=linear_weight)
    if input.dim() < 1:
        raise ValueError(f"{op}: input is {describe(input)}, expected (..., K)")
    if linear_weight.dim() != 2 or linear_weight.shape[1] != input.shape[-1]:
        raise ValueError(f"{op}: linear_weight is {describe(linear_weight)}, expected (V, {input.shape[-1]})")
    if linear_weight.device != input.device:
        raise ValueError(f"{op}: linear_weight is {describe(linear_weight)}, expected input's device, {input.device}")
    classes = linear_weight.shape[0]
    options = (ignore_index, reduction, label_smoothing)
    counted = check_loss(op, input, target, classes, weight, *options, softcap, z_loss)
    if linear_bias is not None:
        check_vector(op, "linear_bias", linear_bias, classes, input)
    _check_lora(op, input, classes, lora_A, lora_B)
    check_number(op, scaling=scaling, logit_scale=logit_scale)
    if num_items_in_batch is not None:
        _check_num_items(op, num_items_in_batch, reduction)
    unset = (weight, linear_bias, lora_A, softcap, num_items_in_batch)
    plain = counted and z_loss == 0 and all(option is None for option in unset)
    backend = dispatch.choose(op, input, input.numel() * classes if plain else None)
    if backend == "reference":
        return reference.linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            lora_A=lora_A,
            lora_B=lora_B,
            scaling=scaling,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            softcap=softcap,
            z_loss=z_loss,
            logit_scale=logit_scale,
            num_items_in_batch=num_items_in_batch,
        )
    (input,) = autocast(input)
    parameters = (linear_weight, linear_bias, lora_A, lora_B)
    if backend == "torch":
        linear_weight, linear_bias, lora_A, lora_B = (None if p is None else p.to(input.dtype) for p in parameters)
        logits = F.linear(input, linear_weight, linear_bias)
        if lora_A is not None:
            logits = logits + scaling * F.linear(F.linear(input, lora_A), lora_B)
        logits = reference.wide(logits) * logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return composite_loss(logits, target, weight, *options, z_loss, num_items_in_batch)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (input, *parameters)]
    loss = _LinearCrossEntropy.apply(
        *distinct(
            input.reshape(math.prod(input.shape[:-1]), input.shape[-1]),
            *parameters,
            target.reshape(-1),
            weight,
            num_items_in_batch,
        ),
        reduction,
        z_loss,
        (scaling, ignore_index, label_smoothing, softcap, logit_scale),
        needs,
        anchor(input, *parameters) if any(needs) else None,
        backend,
    )
    return loss.view(target.shape) if reduction == "none" else loss


def _check_lora(op, input, classes, lora_A, lora_B):
    if (lora_A is None) != (lora_B is None):
        raise ValueError(f"{op}: lora_A and lora_B go together, but one of them is None")
    if lora_A is None:
        return
    check_floating(op, lora_A=lora_A, lora_B=lora_B)
    features = input.shape[-1]
    if lora_A.dim() != 2 or lora_A.shape[1] != features or lora_A.shape[0] < 1:
        raise ValueError(f"{op}: lora_A is {describe(lora_A)}, expected (r, {features}) with r of 1 or more")
    if lora_B.shape != (classes, lora_A.shape[0]):
        raise ValueError(f"{op}: lora_B is {describe(lora_B)}, expected ({classes}, {lora_A.shape[0]})")
    for name, tensor in (("lora_A", lora_A), ("lora_B", lora_B)):
        if tensor.device != input.device:
            raise ValueError(f"{op}: {name} is {describe(tensor)}, expected the device of input, {input.device}")


def _check_num_items(op, num_items_in_batch, reduction):
    if reduction != "mean":
        raise ValueError(f"{op}: num_items_in_batch replaces the divisor of 'mean', but reduction is {reduction!r}")
    if isinstance(num_items_in_batch, torch.Tensor):
        if num_items_in_batch.dim() != 0:
            given = describe(num_items_in_batch)
            raise ValueError(f"{op}: num_items_in_batch is {given}, expected a number or a tensor of shape ()")
        if not values_known(num_items_in_batch):
            return  # its value is the device's own
    elif not isinstance(num_items_in_batch, int | float):
        raise TypeError(
            f"{op}: num_items_in_batch is {type(num_items_in_batch).__name__}, expected a number or a 0-dim tensor"
        )
    if not num_items_in_batch >= 0:
        raise ValueError(f"{op}: num_items_in_batch is {num_items_in_batch}, expected a number that is not negative")


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward for a result that is the plain sum of the losses, and multiplied by the true
    factor (upstream gradient over divisor) at the end: 16-bit gradients of the logits keep their full precision. With
    reduction "none" each row has its own factor, which only the gradient of input can be multiplied by so late.
    """

    @staticmethod
    def forward(
        ctx,
        input,
        linear_weight,
        linear_bias,
        lora_A,
        lora_B,
        target,
        weight,
        num_items_in_batch,
        reduction,
        z_loss,
        options,
        needs,
        graph,
        backend,
    ):
        ctx.options, ctx.z_loss, ctx.needs, ctx.backend = options, z_loss, needs, backend
        ctx.dtypes = [None if p is None else p.dtype for p in (input, linear_weight, linear_bias, lora_A, lora_B)]
        scalar = reduction != "none"
        ctx.made = any(needs) if scalar else needs[0] and not any(needs[1:])
        inputs = (input, linear_weight, linear_bias, lora_A, lora_B, target, weight)
        loss_divisor, row_divisor = divisors(target, weight, options[1], reduction, num_items_in_batch)
        upstream = None
        if ctx.made:
            one = torch.ones_like(loss_divisor)
            upstream = per_row(one, z_loss * loss_divisor / row_divisor, len(target))
        loss, lse, *gradients = _run(ctx, *inputs, upstream=upstream)
        if ctx.made:
            factor = (1 / loss_divisor).where((target != options[1]).any(), 0)  # no row counts: zeros, as in torch
            ctx.save_for_backward(factor, graph, *gradients)
        elif any(needs):
            ctx.save_for_backward(*inputs)
        if not scalar:
            return (loss + z_loss * lse.square()).float()
        return total_loss(loss, lse, z_loss, loss_divisor, row_divisor)

    @staticmethod
    @first_order
    def backward(ctx, dy):
        if ctx.made:
            factor, _, *gradients = ctx.saved_tensors
            factor = factor * dy if dy.dim() == 0 else (factor * dy)[:, None]  # "none": one for each row of input
            gradients = [g * factor if needed else g for g, needed in zip(gradients, ctx.needs, strict=True)]
        else:
            upstream = per_row(dy, ctx.z_loss * dy, len(dy))
            _, _, *gradients = _run(ctx, *ctx.saved_tensors, upstream=upstream)
        gradients = zip(gradients, ctx.dtypes, ctx.needs, strict=True)
        return *(g.to(dtype) if needed else None for g, dtype, needed in gradients), *[None] * 9


def _logits_bytes(linear_weight, needs) -> int:
    """A trained head's gradient is as large as the head, and each chunk goes over it once: longer chunks, then."""
    if linear_weight.device.type != "cpu":
        return GPU_LOGITS_BYTES
    return max(LOGITS_BYTES, linear_weight.numel()) if needs[1] else LOGITS_BYTES


def _run(ctx, input, linear_weight, linear_bias, lora_A, lora_B, target, weight, upstream):
    """Per row the loss and logsumexp, and the gradients for upstream (empty where not needed, or without upstream)."""

    parameters = (None if p is None else p.to(input.dtype) for p in (linear_weight, linear_bias, lora_A, lora_B))
    return dispatch.kernels(ctx.backend).linear_cross_entropy(
        input.contiguous(),
        *parameters,
        target.contiguous(),
        None if weight is None else weight.float().contiguous(),
        upstream,
        *ctx.options,
        _logits_bytes(linear_weight, ctx.needs),
        ctx.needs,
    )
