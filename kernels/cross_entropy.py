"""Cross-entropy of logits in Triton: one program per row, which it reads twice (once without a gradient).

First pass: the running maximum m and sum of exp(x - m) (Milakov and Gimelshein 2018, "Online normalizer calculation for
softmax"), with label smoothing also the weighted sum of x - m. Second pass: the gradient from what the first one found.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from pyfast.kernels import launch


@triton.jit
def softcapped(x, softcap, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        x = softcap * libdevice.tanh(x / softcap)
    return x


@triton.jit
def cross_entropy_kernel(
    INPUT,
    TARGET,
    WEIGHT,
    UPSTREAM,
    LOSS,
    LSE,
    DINPUT,
    classes,
    stride,
    ignore_index,
    label_smoothing,
    softcap,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    INPUT += row * stride
    if DINPUT is not None:
        DINPUT += row * classes
    target = tl.load(TARGET + row)
    at = tl.arange(0, BLOCK)
    if target == ignore_index:
        tl.store(LOSS + row, 0.0)
        tl.store(LSE + row, 0.0)
        if DINPUT is not None:
            for begin in range(0, classes, BLOCK):
                zeros = tl.zeros([BLOCK], DINPUT.dtype.element_ty)
                tl.store(DINPUT + begin + at, zeros, mask=begin + at < classes)
        return

    # a target out of range makes its row NaN
    x_target = tl.load(INPUT + target, mask=(target >= 0) & (target < classes), other=float("nan")).to(tl.float32)
    x_target = softcapped(x_target, softcap, SOFTCAP)
    target_weight = 1.0
    if WEIGHT is not None:
        target_weight = tl.load(WEIGHT + target, mask=(target >= 0) & (target < classes), other=0.0)

    m = -float("inf")  # the largest logit so far
    total = 0.0  # the sum of exp(x - m)
    below = 0.0  # the sum of weight * (x - m)
    weights = 0.0  # the sum of weight
    for begin in range(0, classes, BLOCK):
        inside = begin + at < classes
        x = tl.load(INPUT + begin + at, mask=inside, other=-float("inf")).to(tl.float32)
        x = softcapped(x, softcap, SOFTCAP)
        x = tl.where(inside, x, -float("inf"))
        larger = tl.maximum(m, tl.max(x, 0))
        shift = tl.where(larger == -float("inf"), 0.0, larger)
        total = total * tl.exp(m - shift) + tl.sum(tl.exp(x - shift), 0)
        if SMOOTHING:
            weight = tl.where(inside, 1.0, 0.0)
            if WEIGHT is not None:
                weight = tl.load(WEIGHT + begin + at, mask=inside, other=0.0)
            below += tl.where(weights == 0, 0.0, weights * (m - shift))
            below += tl.sum(tl.where(inside, weight * (x - shift), 0.0), 0)
            weights += tl.sum(weight, 0)
        m = larger
    log_total = tl.log(total)

    # the two terms of lse = m + log_total are kept apart, and joined in fp64: lse - x keeps its digits under a large m
    loss = target_weight * ((m.to(tl.float64) - x_target) + log_total)
    if SMOOTHING:
        loss = (1 - label_smoothing) * loss + label_smoothing / classes * (weights * log_total - below)
    tl.store(LOSS + row, loss)
    tl.store(LSE + row, m.to(tl.float64) + log_total)

    if DINPUT is not None:
        # dx = (p (hard + soft weights + square) - hard [target] - soft weight) slope, with the factors of a row in fp64
        d_loss = tl.load(UPSTREAM + 2 * row)
        hard = d_loss * (1 - label_smoothing.to(tl.float64)) * target_weight
        soft = d_loss * (label_smoothing.to(tl.float64) / classes)
        square = 2 * tl.load(UPSTREAM + 2 * row + 1) * (m.to(tl.float64) + log_total)
        square += 0 * x_target  # NaN for a target out of range
        p_target = tl.exp(x_target - m).to(tl.float64) / total
        dx_target = hard * (p_target - 1) + square * p_target
        if SMOOTHING:
            dx_target += soft * (weights * p_target - target_weight)
        factor = ((hard + soft * weights + square) / total).to(tl.float32)
        dx_target, soft = dx_target.to(tl.float32), soft.to(tl.float32)
        for begin in range(0, classes, BLOCK):
            inside = begin + at < classes
            x = tl.load(INPUT + begin + at, mask=inside, other=0.0).to(tl.float32)
            slope = 1.0
            if SOFTCAP:
                capped = libdevice.tanh(x / softcap)
                slope = (1 - capped) * (1 + capped)
                x = softcap * capped
            dx = factor * tl.exp(x - m)
            if SMOOTHING:
                weight = 1.0
                if WEIGHT is not None:
                    weight = tl.load(WEIGHT + begin + at, mask=inside, other=0.0)
                dx -= soft * weight
            dx = tl.where(begin + at == target, dx_target, dx) * slope
            tl.store(DINPUT + begin + at, dx.to(DINPUT.dtype.element_ty), mask=inside)


def row_losses(input, target, weight, upstream, dinput, ignore_index, label_smoothing, softcap):
    """(loss, lse) of each row, fp64; dinput (rows, V), contiguous, of any floating dtype, is written for upstream."""
    rows, classes = input.shape
    loss = input.new_empty(rows, dtype=torch.float64)
    lse = torch.empty_like(loss)
    launch.run(
        cross_entropy_kernel,
        rows,
        input,
        target,
        weight,
        upstream,
        loss,
        lse,
        dinput,
        classes,
        input.stride(0),
        ignore_index,
        float(label_smoothing),
        float(softcap or 1.0),
        SMOOTHING=label_smoothing > 0,
        SOFTCAP=softcap is not None,
        **launch.tile(cross_entropy_kernel, input.device, classes),
    )
    return loss, lse


@launch.launcher
def cross_entropy(input, target, weight, upstream, ignore_index, label_smoothing, softcap):
    dinput = None if upstream is None else input.new_empty(input.shape)
    loss, lse = row_losses(input, target, weight, upstream, dinput, ignore_index, label_smoothing, softcap)
    return loss, lse, input.new_empty(0) if dinput is None else dinput
