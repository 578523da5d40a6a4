"""The language-model head and its loss in Triton, without its logits: the epilogue of the product x Wᵀ leaves, of each
tile, the largest logit of every row and the sum of the exponentials above it, and the logit of the row's target.

With gradients it also leaves the exponentials, relative to their tile's largest, in the input's dtype and for a chunk
of rows at a time; one pass turns them into the logits' gradient in place, and that gradient's products follow with what
needs one, so that a frozen head takes two products (the exponentials in the epilogue are QuACK's idea, the gradient in
the forward Liger-Kernel's). With softcap the exponentials are kept times its slope; label smoothing beside it, whose
gradient has the slope without them, keeps the slopes too.

Rows that count come first (a stable sort, so that the order is always the same), and the products stop at their number,
which only the GPU knows.
"""

import torch
import triton
import triton.language as tl

from pyfast.kernels import launch
from pyfast.kernels.cross_entropy import softcapped
from pyfast.kernels.lora import adapter_gradients, low_rank_product, matmul


@triton.jit
def exponentials_kernel(
    X,
    WEIGHT,
    BIAS,
    H,
    LORA_B,
    TARGET,
    CLASS_WEIGHT,
    LIMIT,
    KEPT,
    SLOPE,
    MAXIMUM,
    TOTAL,
    BELOW,
    TARGET_LOGIT,
    rows,
    classes,
    k,
    rank,
    weight_stride_n,
    weight_stride_k,
    lora_stride_n,
    lora_stride_r,
    logit_scale,
    scaling,
    softcap,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """X (rows, k), H (rows, rank); MAXIMUM, TOTAL, BELOW (tiles of classes, rows): the largest logit, the sum of
    exp(logit - largest), and that of class weight * (logit - largest); KEPT, SLOPE (rows, classes): exp(logit -
    largest) times softcap's slope, and that slope. Rows from LIMIT on are not computed."""
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tile_m, tile_n = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m  # neighbours share a part of WEIGHT
    if tile_m * BLOCK_M >= tl.load(LIMIT):
        return
    row = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
    column = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]).to(tl.int64)
    logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        across = start + tl.arange(0, BLOCK_K)[None, :]
        down = (start + tl.arange(0, BLOCK_K)[:, None]).to(tl.int64)
        x = tl.load(X + row * k + across, mask=(row < rows) & (across < k), other=0.0)
        w = WEIGHT + down * weight_stride_k + column * weight_stride_n
        w = tl.load(w, mask=(down < k) & (column < classes), other=0.0)
        logits = tl.dot(x, w, logits, input_precision="ieee")
    logits *= logit_scale
    if H is not None:
        product = low_rank_product(
            H, LORA_B, row, column, rows, classes, rank, rank, lora_stride_r, lora_stride_n, X.dtype.element_ty,
            BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        logits += product * scaling
    if BIAS is not None:
        logits += tl.load(BIAS + column, mask=column < classes, other=0.0)
    logits = softcapped(logits, softcap, SOFTCAP)
    inside = column < classes

    target = tl.load(TARGET + row, mask=row < rows, other=-1)
    target_logit = tl.sum(tl.where(column == target, logits, 0.0), 1, keep_dims=True)
    here = (target >= tile_n * BLOCK_N) & (target < tl.minimum((tile_n + 1) * BLOCK_N, classes))
    tl.store(TARGET_LOGIT + row, target_logit, mask=(row < rows) & here)
    logits = tl.where(inside, logits, -float("inf"))
    largest = tl.max(logits, 1, keep_dims=True)
    shift = tl.where(largest == -float("inf"), 0.0, largest)
    e = tl.exp(logits - shift)
    at = tile_n.to(tl.int64) * rows + row
    tl.store(MAXIMUM + at, largest, mask=row < rows)
    tl.store(TOTAL + at, tl.sum(e, 1, keep_dims=True), mask=row < rows)
    if SMOOTHING:
        weight = tl.where(inside, 1.0, 0.0)
        if CLASS_WEIGHT is not None:
            weight = tl.load(CLASS_WEIGHT + column, mask=inside, other=0.0)
        below = tl.sum(tl.where(inside, weight * (logits - shift), 0.0), 1, keep_dims=True)
        tl.store(BELOW + at, below, mask=row < rows)
    if KEPT is not None:
        inside = (row < rows) & inside
        if SOFTCAP:
            slope = (1 - logits / softcap) * (1 + logits / softcap)
            e *= slope
            if SMOOTHING:
                tl.store(SLOPE + row * classes + column, slope.to(SLOPE.dtype.element_ty), mask=inside)
        tl.store(KEPT + row * classes + column, e.to(KEPT.dtype.element_ty), mask=inside)


@triton.jit
def logits_gradient_kernel(
    D,
    SLOPE,
    TARGET,
    CLASS_WEIGHT,
    TILE_MAXIMUM,
    MAXIMUM,
    FACTOR,
    SOFT,
    D_TARGET,
    rows,
    classes,
    tile_columns,
    ignore_index,
    SMOOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """D (rows, classes) holds exp(logit - its tile's maximum) * slope, and is overwritten with (factor * exp(logit -
    maximum) - soft * class weight) * slope, but D_TARGET at the target. Zeros in ignored rows."""
    blocks = tl.cdiv(classes, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < classes
    D += row * classes + column
    target = tl.load(TARGET + row)
    if target == ignore_index:
        tl.store(D, tl.zeros([BLOCK], D.dtype.element_ty), mask=inside)
        return
    maximum = tl.load(MAXIMUM + row)
    e = tl.load(D, mask=inside, other=0.0).to(tl.float32)
    at = (column // tile_columns).to(tl.int64) * rows + row
    d = tl.load(FACTOR + row) * (e * tl.exp(tl.load(TILE_MAXIMUM + at, mask=inside, other=0.0) - maximum))
    if SMOOTHING:
        soft = tl.load(SOFT + row)
        if CLASS_WEIGHT is not None:
            soft *= tl.load(CLASS_WEIGHT + column, mask=inside, other=0.0)
        if SLOPE is not None:
            soft *= tl.load(SLOPE + row * classes + column, mask=inside, other=0.0).to(tl.float32)
        d -= soft
    d = tl.where(column == target, tl.load(D_TARGET + row), d)
    tl.store(D, d.to(D.dtype.element_ty), mask=inside)


class _Chunk:
    """The losses of some rows, and on demand the gradient of their logits."""

    def __init__(
        self, x, linear_weight, bias, h, lora_B, target, weight, limit, scaling, logit_scale, options, gradient
    ):
        self.target, self.weight, self.options = target, weight, options
        self.ignore_index, self.smoothing, self.softcap = options
        rows, self.classes = len(x), len(linear_weight)
        tile = launch.tile(exponentials_kernel, x.device, self.classes)
        self.tile_columns = tile["BLOCK_N"]
        tiles = launch.cdiv(self.classes, self.tile_columns)
        self.kept = x.new_empty((rows, self.classes)) if gradient else None
        slopes = gradient and self.softcap is not None and self.smoothing > 0
        self.slope = torch.empty_like(self.kept) if slopes else None
        self.tile_maximum, total = (x.new_empty((tiles, rows), dtype=torch.float32) for _ in range(2))
        below = torch.empty_like(total) if self.smoothing > 0 else None
        self.target_logit = x.new_full((rows,), torch.nan, dtype=torch.float32)  # stays so for a target out of range
        launch.run(
            exponentials_kernel,
            launch.cdiv(rows, tile["BLOCK_M"]) * tiles,
            x,
            linear_weight,
            bias,
            h,
            lora_B,
            target,
            weight,
            limit,
            self.kept,
            self.slope,
            self.tile_maximum,
            total,
            below,
            self.target_logit,
            rows,
            self.classes,
            x.shape[1],
            0 if h is None else h.shape[1],
            *linear_weight.stride(),
            *((0, 0) if lora_B is None else lora_B.stride()),
            float(logit_scale),
            float(scaling * logit_scale),
            float(self.softcap or 1.0),
            SMOOTHING=self.smoothing > 0,
            SOFTCAP=self.softcap is not None,
            BLOCK_R=16 if h is None else min(64, max(16, launch.power_of_two(h.shape[1]))),
            **tile,
        )
        self.maximum = self.tile_maximum.amax(0)
        shift = self.maximum.where(self.maximum != -torch.inf, 0)
        self.total = (total * torch.exp(self.tile_maximum - shift)).sum(0, dtype=torch.float64)
        self.lse = self.maximum.double() + self.total.log()
        in_range = (target >= 0) & (target < self.classes)
        self.target_weight = 1.0 if weight is None else weight[target.where(in_range, 0)].double()
        # the two terms of lse are kept apart: lse - target_logit keeps its digits under a large maximum
        loss = self.target_weight * ((self.maximum.double() - self.target_logit) + self.total.log())
        self.weights = self.classes
        if self.smoothing > 0:
            of_classes = x.new_ones(self.classes, dtype=torch.float32) if weight is None else weight
            missing = tiles * self.tile_columns - self.classes
            of_tiles = torch.nn.functional.pad(of_classes, (0, missing)).view(tiles, -1).sum(1, dtype=torch.float64)
            self.weights = of_tiles.sum()
            lower = torch.where(of_tiles[:, None] == 0, 0, of_tiles[:, None] * (self.tile_maximum - shift))
            below = (below + lower).sum(0)
            smooth = self.smoothing / self.classes * (self.weights * self.total.log() - below)
            loss = (1 - self.smoothing) * loss + smooth
        self.ignored = target == self.ignore_index
        self.loss, self.lse = (t.masked_fill(self.ignored, 0) for t in (loss, self.lse))

    def logits_gradient(self, upstream):
        """(rows, classes) for upstream (rows, 2), in the place of the exponentials."""
        hard = upstream[:, 0] * (1 - self.smoothing) * self.target_weight
        soft = upstream[:, 0] * (self.smoothing / self.classes)
        square = 2 * upstream[:, 1] * self.lse + 0 * self.target_logit  # NaN for a target out of range
        p = torch.exp(self.target_logit - self.maximum).double() / self.total
        d_target = hard * (p - 1) + square * p + soft * (self.weights * p - self.target_weight)
        if self.softcap is not None:
            d_target *= 1 - (self.target_logit.double() / self.softcap) ** 2
        factor = (hard + soft * self.weights + square) / self.total
        d = self.kept
        tile = launch.tile(logits_gradient_kernel, d.device, self.classes)
        launch.run(
            logits_gradient_kernel,
            len(d) * launch.cdiv(self.classes, tile["BLOCK"]),
            d,
            self.slope,
            self.target,
            self.weight,
            self.tile_maximum,
            self.maximum,
            factor.float(),
            soft.float(),
            d_target.float(),
            *d.shape,
            self.tile_columns,
            self.ignore_index,
            SMOOTHING=self.smoothing > 0,
            **tile,
        )
        return d


@launch.launcher
def linear_cross_entropy(
    input, linear_weight, linear_bias, lora_A, lora_B, target, weight, upstream, scaling, ignore_index,
    label_smoothing, softcap, logit_scale, logits_bytes, needs,
):  # fmt: skip
    rows, classes = len(target), len(linear_weight)
    loss = input.new_empty(rows, dtype=torch.float64)
    lse = torch.empty_like(loss)
    need_x, need_weight, need_bias, need_A, need_B = needs if upstream is not None else [False] * 5
    dx = torch.zeros_like(input) if need_x else input.new_empty(0)
    dweight, dbias, dA, dB = (
        (
            input.new_zeros(p.shape if p is not None and needed else 0, dtype=torch.float32)
            for p, needed in zip((linear_weight, linear_bias, lora_A, lora_B), needs[1:], strict=True)
        )
        if upstream is not None
        else (input.new_empty(0, dtype=torch.float32) for _ in range(4))
    )

    ignored = target == ignore_index
    order = torch.argsort(ignored.to(torch.int8), stable=True)
    counted = rows - ignored.sum()
    bias = None if linear_bias is None else linear_bias.float() * logit_scale
    options = (ignore_index, label_smoothing, softcap)
    kept = 2 if softcap is not None and label_smoothing > 0 else 1  # of each logit, numbers in the input's dtype
    chunk_rows = max(16, logits_bytes // (kept * input.element_size() * classes))
    if chunk_rows > 256:  # whole tiles
        chunk_rows -= chunk_rows % 256
    for begin in range(0, rows, chunk_rows):
        chunk = d = None  # the memory of the one before serves this one
        at = order[begin : begin + chunk_rows]
        limit = (counted - begin).clamp(0)
        x = torch.where(ignored[at, None], 0, input[at])  # what ignored rows hold must not reach a gradient
        h = None if lora_A is None else matmul(x, lora_A.T, torch.float32)
        chunk = _Chunk(
            x, linear_weight, bias, h, lora_B, target[at], weight, limit, scaling, logit_scale, options,
            upstream is not None,
        )  # fmt: skip
        loss[at], lse[at] = chunk.loss, chunk.lse
        if upstream is None:
            continue
        d = chunk.logits_gradient(upstream[at])
        if need_weight:
            matmul(d.T, x, torch.float32, out=dweight, add=dweight, alpha=logit_scale)
        need_low, adapter = lora_A is not None and (need_x or need_A), None
        low, of_B, of_bias = adapter_gradients(d, lora_B, h, low=need_low, db=need_B, dbias=need_bias)
        if need_bias:
            dbias += of_bias * logit_scale
        if need_B:
            dB += of_B * (scaling * logit_scale)
        if low is not None:
            adapter = (low, lora_A, scaling * logit_scale)
        if need_A:
            dA += matmul(x.T, low, torch.float32, alpha=scaling * logit_scale, split=True).T
        if need_x:
            # few rows by few features are few programs for a sum over all classes
            few = launch.cdiv(len(x), 128) * launch.cdiv(x.shape[1], 128) < 128 and adapter is None
            sums = {"alpha": logit_scale, "limit": limit, "split": few}
            dx[at] = matmul(d, linear_weight, x.dtype, out=torch.zeros_like(x), adapter=adapter, **sums)
    return loss, lse, dx, dweight, dbias, dA, dB
