"""LoRA in Triton: every product of a projection and of its gradients is one kernel,

    C = alpha · A B + bias + scale · U V + ADD

in which the adapter's product U V rides in the epilogue of the large one, and dropout, replayed from its seed, acts on
A (x, before lora_A) or on U V (in dx). A gradient of an adapter sums over all rows into a small matrix: there the sum
is split, each part goes to its own place, and torch adds the parts in a fixed order. What an adapter and a bias need of
dy, dy lora_B, dyᵀ h and the sum of its rows, is one pass over it; the projections of one x share one product with it
forward (with every lora_A) and one backward (for the gradient of every lora_A), each with a dropout mask of its own.
"""

import torch
import triton
import triton.language as tl

from pyfast.kernels import launch
from pyfast.kernels.activation import activation_of
from pyfast.kernels.philox import kept, threshold


@triton.jit
def low_rank_product(
    U,
    V,
    row,
    column,
    m,
    n,
    rank,
    u_stride_m,
    v_stride_r,
    v_stride_n,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The tile of rows (M, 1) and columns (1, N) of U (m, rank), of unit stride in rank, times V (rank, n)."""
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, rank, BLOCK_R):
        across = start + tl.arange(0, BLOCK_R)[None, :]
        down = start + tl.arange(0, BLOCK_R)[:, None]
        u = tl.load(U + row * u_stride_m + across, mask=(row < m) & (across < rank), other=0.0)
        v = tl.load(V + down * v_stride_r + column * v_stride_n, mask=(down < rank) & (column < n), other=0.0)
        product = tl.dot(u.to(DTYPE), v.to(DTYPE), product, input_precision="ieee")
    return product


@triton.jit
def matmul_kernel(
    A,
    B,
    C,
    ADD,
    BIAS,
    U,
    V,
    SEED,
    LIMIT,
    m,
    n,
    k,
    rank,
    k_per_split,
    a_stride_m,
    a_stride_k,
    b_stride_k,
    b_stride_n,
    c_stride_split,
    c_stride_m,
    u_stride_m,
    v_stride_r,
    v_stride_n,
    alpha,
    scale,
    seed_stride,
    dropout_threshold,
    dropout_stride_m,
    dropout_stride_k,
    DROP_A: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A (m, k), B (k, n), U (m, rank), V (rank, n); C and ADD (m, n) have unit strides in n. The index of an element
    for dropout is row * dropout_stride_m + column * dropout_stride_k, of A with DROP_A, else of C; the tiles of columns
    have seeds seed_stride apart. Rows from LIMIT on are not computed."""
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    split, program = tl.program_id(0) // (tiles_m * tiles_n), tl.program_id(0) % (tiles_m * tiles_n)
    # GROUP tiles of rows at a time, so that programs that run together read the same parts of A and B
    group = program // (GROUP * tiles_n)
    group_rows = tl.minimum(GROUP, tiles_m - group * GROUP)
    tile_m = group * GROUP + program % (GROUP * tiles_n) % group_rows
    tile_n = program % (GROUP * tiles_n) // group_rows
    if LIMIT is not None:  # noqa: SIM102  (the compiler decides this one, the GPU the next)
        if tile_m * BLOCK_M >= tl.load(LIMIT):
            return
    row = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
    column = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]).to(tl.int64)
    end = tl.minimum(k, (split + 1) * k_per_split)
    if SEED is not None:
        seed = tl.load(SEED + tile_n * seed_stride)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(split * k_per_split, end, BLOCK_K):
        across = (start + tl.arange(0, BLOCK_K)[None, :]).to(tl.int64)
        down = (start + tl.arange(0, BLOCK_K)[:, None]).to(tl.int64)
        a = tl.load(A + row * a_stride_m + across * a_stride_k, mask=(row < m) & (across < end), other=0.0)
        b = tl.load(B + down * b_stride_k + column * b_stride_n, mask=(down < end) & (column < n), other=0.0)
        if DROP_A:
            index = row * dropout_stride_m + across * dropout_stride_k
            a = tl.where(kept(seed, index, dropout_threshold), a, 0.0)
        acc = tl.dot(a, b.to(a.dtype), acc, input_precision="ieee")
    acc *= alpha
    inside = (row < m) & (column < n)
    if BIAS is not None:
        acc += tl.load(BIAS + column, mask=column < n, other=0.0).to(tl.float32)
    if U is not None:
        product = low_rank_product(
            U, V, row, column, m, n, rank, u_stride_m, v_stride_r, v_stride_n, A.dtype.element_ty,
            BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        product *= scale
        if SEED is not None and not DROP_A:
            index = row * dropout_stride_m + column * dropout_stride_k
            product = tl.where(kept(seed, index, dropout_threshold), product, 0.0)
        acc += product
    if ADD is not None:
        acc += tl.load(ADD + row * n + column, mask=inside, other=0.0)
    at = split.to(tl.int64) * c_stride_split + row * c_stride_m + column
    tl.store(C + at, acc.to(C.dtype.element_ty), mask=inside)


def matmul(
    a,
    b,
    dtype,
    *,
    out=None,
    add=None,
    bias=None,
    adapter=None,
    alpha=1.0,
    dropout=None,
    drop_a=False,
    split=False,
    limit=None,
    size=None,
):
    """alpha · a b + bias + scale · u v + add, (m, n) in `dtype`.

    a (m, k), b (k, n): any strides. adapter: (u (m, rank) fp32 of unit stride, v (rank, n), scale). dropout: (seed, or
    one per tile of columns, p, strides of the logical index by row and column), of a with drop_a, else of the adapter's
    product; the kept elements are scaled by 1 / (1 - p). split: whether the sum over k may be cut into parts. limit: a
    0-dim tensor; tiles of rows from there on are left as they were. size: the problem's in the tile table, n otherwise.
    """
    (m, k), n = a.shape, b.shape[1]
    u, v, scale = adapter or (None, None, 0.0)
    seed, p, strides = dropout or (None, 0.0, (0, 0))
    rank = 0 if u is None else u.shape[1]
    tile = dict(launch.tile(matmul_kernel, a.device, size or n, "with dropout" if dropout else ""))
    most_splits = tile.pop("SPLITS")
    splits = min(most_splits, max(1, launch.cdiv(k, tile["BLOCK_K"]))) if split else 1
    k_per_split = launch.cdiv(launch.cdiv(k, splits), tile["BLOCK_K"]) * tile["BLOCK_K"]
    if out is None:
        out = a.new_empty((m, n), dtype=dtype)
    make = a.new_empty if limit is None else a.new_zeros  # parts of what is not computed are zero
    c = out if splits == 1 else make((splits, m, n), dtype=torch.float32)
    kept_scale = 1 / (1 - p)
    launch.run(
        matmul_kernel,
        launch.cdiv(m, tile["BLOCK_M"]) * launch.cdiv(n, tile["BLOCK_N"]) * splits,
        a,
        b,
        c,
        add,
        None if bias is None else bias.contiguous(),
        u,
        v,
        seed,
        limit,
        m,
        n,
        k,
        rank,
        k_per_split,
        *a.stride(),
        *b.stride(),
        0 if splits == 1 else c.stride(0),
        c.stride(-2),
        0 if u is None else u.stride(0),
        *((0, 0) if v is None else v.stride()),
        float(alpha * (kept_scale if drop_a else 1)),
        float(scale * (1 if drop_a else kept_scale)),
        int(seed is not None and seed.dim() > 0),
        threshold(p),
        *strides,
        DROP_A=drop_a and seed is not None,
        BLOCK_R=min(64, max(16, launch.power_of_two(rank))),
        **tile,
    )
    if splits == 1:
        return out
    return torch.sum(c, 0, out=out) if out.dtype == c.dtype else out.copy_(c.sum(0))


@triton.jit
def adapter_gradients_kernel(
    D,
    LORA_B,
    H,
    LOW,
    DB,
    DBIAS,
    rows,
    columns,
    rank,
    columns_per_split,
    d_stride_m,
    d_stride_n,
    b_stride_n,
    b_stride_r,
    h_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A program reads a strip of rows of D (rows, columns) in its part of the columns, once. LOW (splits, rows, rank):
    D LORA_B over the part; DB (strips, columns, rank) and DBIAS (strips, columns): Dᵀ H and the sum of D over the
    strip."""
    strips = tl.cdiv(rows, BLOCK_M)
    strip, split = (tl.program_id(0) % strips).to(tl.int64), (tl.program_id(0) // strips).to(tl.int64)
    row = strip * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    r = tl.arange(0, BLOCK_R)[None, :]
    low = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    if DB is not None:
        h = tl.load(H + row * h_stride + r, mask=(row < rows) & (r < rank), other=0.0).to(D.dtype.element_ty)
    end = tl.minimum(columns, (split + 1) * columns_per_split)
    for start in range(split * columns_per_split, end, BLOCK_N):
        across, down = start + tl.arange(0, BLOCK_N)[None, :], start + tl.arange(0, BLOCK_N)[:, None]
        d = tl.load(D + row * d_stride_m + across * d_stride_n, mask=(row < rows) & (across < end), other=0.0)
        if LOW is not None:
            b = tl.load(LORA_B + down * b_stride_n + r * b_stride_r, mask=(down < end) & (r < rank), other=0.0)
            low = tl.dot(d, b.to(d.dtype), low, input_precision="ieee")
        if DB is not None:
            db = tl.dot(tl.trans(d), h, input_precision="ieee")
            tl.store(DB + (strip * columns + down) * rank + r, db, mask=(down < end) & (r < rank))
        if DBIAS is not None:
            dbias = tl.sum(d.to(tl.float32), 0, keep_dims=True)
            tl.store(DBIAS + strip * columns + across, dbias, mask=across < end)
    if LOW is not None:
        tl.store(LOW + (split * rows + row) * rank + r, low, mask=(row < rows) & (r < rank))


#: a program holds all of an adapter's rank; a larger one takes products of its own
MOST_RANK = 128


def adapter_gradients(d, lora_B, h, *, low=False, db=False, dbias=False):
    """(d lora_B (rows, rank), dᵀ h (columns, rank), the sum of d's rows (columns,)) of d (rows, columns), fp32, in one
    pass over d; None for what is not asked for. h (rows, rank) fp32 has unit stride in rank."""
    if not (low or db or dbias) or lora_B is None or lora_B.shape[1] > MOST_RANK or d.numel() == 0:
        return (
            matmul(d, lora_B, torch.float32) if low else None,
            matmul(d.T, h, torch.float32, split=True) if db else None,
            d.sum(0, dtype=torch.float32) if dbias else None,
        )
    (rows, columns), rank = d.shape, lora_B.shape[1]
    tile = dict(launch.tile(adapter_gradients_kernel, d.device, rank))
    splits = max(1, min(tile.pop("SPLITS"), launch.cdiv(columns, tile["BLOCK_N"])))
    columns_per_split = launch.cdiv(launch.cdiv(columns, splits), tile["BLOCK_N"]) * tile["BLOCK_N"]
    strips = launch.cdiv(rows, tile["BLOCK_M"])
    shapes = ((splits, rows, rank), (strips, columns, rank), (strips, columns))
    parts = [
        d.new_empty(shape, dtype=torch.float32) if asked else None
        for shape, asked in zip(shapes, (low, db, dbias), strict=True)
    ]
    launch.run(
        adapter_gradients_kernel,
        strips * splits,
        d,
        lora_B,
        h,
        *parts,
        rows,
        columns,
        rank,
        columns_per_split,
        *d.stride(),
        *lora_B.stride(),
        0 if h is None else h.stride(0),
        BLOCK_R=max(16, launch.power_of_two(rank)),
        **tile,
    )
    return tuple(part if part is None else part[0] if len(part) == 1 else part.sum(0) for part in parts)


def _projections(weight, lora_A, lora_B, scaling, bias, seed):
    return list(zip(weight, lora_A, lora_B, scaling, bias, seed, strict=True))


def _joint_product(a, parts, dropout_p, seeds, strides, split=False):
    """a (m, k) times each of the parts (k, r), side by side in fp32, in one pass over a, which has a dropout mask of
    its own in each; strides: of the logical index of a's elements."""
    widths = [part.shape[1] for part in parts]
    if dropout_p == 0:
        return matmul(a, parts[0] if len(parts) == 1 else torch.cat(parts, 1), torch.float32, split=split)
    # whole tiles of columns for every part: a tile has one seed
    block = launch.tile(matmul_kernel, a.device, max(widths), "with dropout")["BLOCK_N"]
    tiles = [launch.cdiv(width, block) for width in widths]
    padded = [torch.nn.functional.pad(p, (0, t * block - p.shape[1])) for p, t in zip(parts, tiles, strict=True)]
    seed = torch.stack([seed for seed, t in zip(seeds, tiles, strict=True) for _ in range(t)])
    options = {"dropout": (seed, dropout_p, strides), "drop_a": True, "split": split, "size": max(widths)}
    product = matmul(a, torch.cat(padded, 1), torch.float32, **options).split([t * block for t in tiles], 1)
    return torch.cat([part[:, :width] for part, width in zip(product, widths, strict=True)], 1)


def _forward(x, projections, dropout_p):
    """(results, h) of lora_linears."""
    adapters = [p for p in projections if p[1] is not None]
    h = x.new_empty((len(x), 0), dtype=torch.float32)
    if adapters:
        h = _joint_product(x, [p[1].T for p in adapters], dropout_p, [p[-1] for p in adapters], (x.shape[1], 1))
    parts, results = h.split([0 if p[1] is None else len(p[1]) for p in projections], 1), []
    for (weight, lora_A, lora_B, scaling, bias, _), part in zip(projections, parts, strict=True):
        adapter = None if lora_A is None else (part, lora_B.T, scaling)
        results.append(matmul(x, weight.T, x.dtype, bias=bias, adapter=adapter))
    return results, h


def _gradients_of_A(x, lows, projections, dropout_p, needed):
    """Of each projection, xᵀ dy lora_B (K, r) fp32 from `lows`, its dy lora_B; None where not needed."""
    if not any(needed):
        return [None] * len(needed)
    chosen = [i for i, need in enumerate(needed) if need]
    parts, seeds = [lows[i] for i in chosen], [projections[i][-1] for i in chosen]
    joint = _joint_product(x.T, parts, dropout_p, seeds, (1, x.shape[1]), split=True)
    found = iter(joint.split([part.shape[1] for part in parts], 1))
    return [next(found) if need else None for need in needed]


def _scaled(x, scale, dtype):
    """scale · x in `dtype`, contiguous."""
    return torch.mul(x, scale, out=x.new_empty(x.shape, dtype=dtype))


def _backward(dy, x, h, projections, dropout_p, wanted):
    """The wanted gradients, of x and then of each projection's weight, lora_A, lora_B and bias."""
    ranks = [0 if p[1] is None else len(p[1]) for p in projections]
    parts = [None] * len(ranks) if h is None else h.split(ranks, 1)
    need_weight, need_A, need_B, need_bias = (wanted[1 + kind :: 4] for kind in range(4))
    lows, dB, dbias = zip(
        *(
            adapter_gradients(
                d, p[2], part, low=p[1] is not None and (wanted[0] or need_A[i]), db=need_B[i], dbias=need_bias[i]
            )
            for i, (d, p, part) in enumerate(zip(dy, projections, parts, strict=True))
        ),
        strict=True,
    )
    dA = _gradients_of_A(x, lows, projections, dropout_p, need_A)
    dx, gradients = None, []
    for i, (weight, lora_A, lora_B, scaling, bias, seed) in enumerate(projections):
        if wanted[0]:
            last, adapter = i == len(projections) - 1, None if lora_A is None else (lows[i], lora_A, scaling)
            dropout = (seed, dropout_p, (weight.shape[1], 1)) if dropout_p > 0 and lora_A is not None else None
            dx = matmul(dy[i], weight, dy[i].dtype if last else torch.float32, add=dx, adapter=adapter, dropout=dropout)
        if need_weight[i]:
            gradients.append(matmul(dy[i].T, x, weight.dtype))
        if need_A[i]:
            gradients.append(_scaled(dA[i].T, scaling, lora_A.dtype))
        if need_B[i]:
            gradients.append(_scaled(dB[i], scaling, lora_B.dtype))
        if need_bias[i]:
            gradients.append(dbias[i].to(bias.dtype))
    return [dx, *gradients] if wanted[0] else gradients


@launch.launcher
def lora_linears(x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed):
    return _forward(x, _projections(weight, lora_A, lora_B, scaling, bias, seed), dropout_p)


@launch.launcher
def lora_linears_backward(dy, x, h, weight, lora_A, lora_B, scaling, bias, dropout_p, seed, wanted):
    return _backward(dy, x, h, _projections(weight, lora_A, lora_B, scaling, bias, seed), dropout_p, wanted)


@launch.launcher
def lora_mlp(x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed, activation):
    *first, down = _projections(weight, lora_A, lora_B, scaling, bias, seed)
    hidden, h = _forward(x, first, dropout_p)
    (y,), h_down = _forward(activation_of(hidden, activation), [down], dropout_p)
    return y, hidden, h, h_down


@launch.launcher
def lora_mlp_backward(
    dy, x, hidden, h, h_down, weight, lora_A, lora_B, scaling, bias, dropout_p, seed, activation, wanted
):
    *first, down = _projections(weight, lora_A, lora_B, scaling, bias, seed)
    wanted_first, wanted_down = wanted[: 1 + 4 * len(first)], wanted[1 + 4 * len(first) :]
    below = any(wanted_first)
    inner = activation_of(hidden, activation) if wanted_down[0] or wanted_down[1] else None
    found = _backward([dy], inner, h_down, [down], dropout_p, [below, *wanted_down])
    if not below:
        return found
    dinner, *gradients = found
    dhidden = activation_of(hidden, activation, dinner)
    return [*_backward(dhidden, x, h, first, dropout_p, wanted_first), *gradients]
