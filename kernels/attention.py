"""Attention in Triton, forward and backward, that never holds its scores (Dao 2023, "FlashAttention-2").

A program of the forward and of the dq pass takes one tile of queries of one head and walks over the keys that it may
see; one of the dk/dv pass takes one tile of keys of one key/value head and walks over the queries, of all its query
heads, that may see it. A bias's gradient is a pass of its own over the tiles of the bias, which sums over the batches,
heads, queries or keys that share an element. Nothing is added atomically: the same inputs give the same bits.

Packed sequences (cu_seqlens): tile t belongs to the sequence n for which start(n) <= t < start(n + 1), where
start(n) = cu_seqlens[n] // BLOCK + n. That leaves each sequence enough tiles (a few have no rows) without a count that
only the GPU knows. Rows after the last sequence are a sequence of their own that sees nothing.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from pyfast.kernels import launch
from pyfast.kernels.philox import kept, threshold


class Heads(NamedTuple):
    """A tensor by batch, head and row, of unit stride within a row."""

    data: Any
    stride_b: int
    stride_h: int
    stride_m: int


class Problem(NamedTuple):
    """What every pass is given. None stands for an option that is not used."""

    q: Heads
    k: Heads
    v: Heads
    mask: Any  # (B, Sk) uint8
    bias: Any
    bias_strides: tuple[int, int, int, int]
    seed: Any
    cu_q: Any
    cu_k: Any
    heads: int
    group: int  # query heads of a key/value head
    sequences: int
    queries: int  # rows that there are, of all packed sequences together
    keys: int
    dropout_keys: int
    scale: float
    softcap: float | None
    left: int | None
    right: int | None
    dropout_threshold: int
    dropout_scale: float


class Saved(NamedTuple):
    """What the backward is given besides."""

    dout: Heads
    maximum: Any  # fp32 by batch, head and query, as log_sum
    log_sum: Any


@triton.jit
def bound(CU, n, sequences, rows):
    """Where sequence n begins; within the rows that there are whatever cu_seqlens holds."""
    begin = tl.load(CU + n, mask=n <= sequences, other=rows).to(tl.int64)
    return tl.minimum(tl.maximum(begin, 0), rows)


@triton.jit
def locate(tile, batch, CU, CU_OTHER, sequences, rows, rows_other, BLOCK: tl.constexpr):
    """Of a tile: (batch, its first row within the sequence, the sequence's begin and length here, and on the other
    side)."""
    if CU is None:
        return batch, tile * BLOCK, batch * 0, rows, batch * 0, rows_other
    else:
        n = 0
        last = sequences
        while n < last:
            middle = (n + last + 1) // 2
            here = tl.load(CU + middle) // BLOCK + middle <= tile
            n = tl.where(here, middle, n)
            last = tl.where(here, last, middle - 1)
        begin, end = bound(CU, n, sequences, rows), bound(CU, n + 1, sequences, rows)
        other = bound(CU_OTHER, n, sequences, rows_other)
        length_other = tl.where(n < sequences, bound(CU_OTHER, n + 1, sequences, rows_other) - other, 0)
        first = (tile - (tl.load(CU + n) // BLOCK + n)) * BLOCK
        return batch * 0, first.to(tl.int32), begin, (end - begin).to(tl.int32), other, length_other.to(tl.int32)


@triton.jit
def query_tile(p, tiles, BLOCK_M: tl.constexpr):
    """Of a program with a tile of queries: (batch, head, the tile's first row, its rows i (BLOCK_M, 1), where its
    sequence's queries begin and how many they are, the same of its keys)."""
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles  # with a causal mask the last tiles see most: they start first
    head = (program // tiles % p.heads).to(tl.int64)
    batch, first, q_begin, queries, k_begin, keys = locate(
        tile, (program // tiles // p.heads).to(tl.int64), p.cu_q, p.cu_k, p.sequences, p.queries, p.keys, BLOCK_M
    )
    i = first + tl.arange(0, BLOCK_M)[:, None]
    return batch, head, first, i, q_begin, queries, k_begin, keys


@triton.jit
def visible_range(first, shift, length, before, after, BLOCK: tl.constexpr):
    """From where to where, on the other side, rows first to first + BLOCK may see: row i stands at i + shift there, and
    sees from `before` rows before it to `after` rows after it."""
    begin, end = 0, length
    if before is not None:
        begin = tl.maximum(0, first + shift - before)
    if after is not None:
        end = tl.minimum(length, first + BLOCK + shift + after)
    return begin, end


@triton.jit
def load_rows(x, batch, head, begin, row, inside, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows (N, 1) of a sequence that begins at `begin`, as (N, BLOCK_D); zeros where not inside."""
    d = tl.arange(0, BLOCK_D)[None, :]
    at = x.data + batch * x.stride_b + head * x.stride_h + begin * x.stride_m
    return tl.load(at + row.to(tl.int64) * x.stride_m + d, mask=inside & (d < DIM), other=0.0)


@triton.jit
def store_rows(x, value, batch, head, begin, row, rows, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)[None, :]
    at = x.data + batch * x.stride_b + head * x.stride_h + (begin + row) * x.stride_m + d
    tl.store(at, value.to(x.data.dtype.element_ty), mask=(row < rows) & (d < DIM))


@triton.jit
def load_keys(p, batch, head, k_begin, j, keys, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """(which keys j (1, N) of a sequence count, their k and their v (N, BLOCK_D)): others are never read."""
    found = j < keys
    if p.mask is not None:
        found &= tl.load(p.mask + batch * p.keys + j, mask=found, other=0) != 0
    row, inside = j.trans(), found.trans()
    k = load_rows(p.k, batch, head // p.group, k_begin, row, inside, DIM, BLOCK_D)
    v = load_rows(p.v, batch, head // p.group, k_begin, row, inside, DIM, BLOCK_D)
    return found, k, v


@triton.jit
def load_queries(p, saved, batch, head, q_begin, i, queries, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of queries i (M, 1) of a sequence, for the backward: (q and dout (M, BLOCK_D), the largest score, the logarithm
    of the sum, where these stand)."""
    row = (batch * p.heads + head) * p.queries + q_begin + i
    q = load_rows(p.q, batch, head, q_begin, i, i < queries, DIM, BLOCK_D)
    dout = load_rows(saved.dout, batch, head, q_begin, i, i < queries, DIM, BLOCK_D)
    m = tl.load(saved.maximum + row, mask=i < queries, other=0.0)
    m = tl.where(m == -float("inf"), 0.0, m)
    log_sum = tl.load(saved.log_sum + row, mask=i < queries, other=0.0)
    return q, dout, m, log_sum, row


@triton.jit
def scores(p, q, k, batch, head, i, j, queries, keys, found):
    """(scores, -inf where query i may not see key j; their derivative by scale * q kᵀ) of a tile (M, N)."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * p.scale
    slope = 1.0
    if p.softcap is not None:
        t = libdevice.tanh(s / p.softcap)
        s = p.softcap * t
        slope = (1 - t) * (1 + t)
    visible = (i < queries) & found
    offset = j - (i + (keys - queries))
    if p.left is not None:
        visible &= offset >= -p.left
    if p.right is not None:
        visible &= offset <= p.right
    if p.bias is not None:
        stride_b, stride_h, stride_m, stride_n = p.bias_strides
        bias = p.bias + batch * stride_b + head * stride_h + i.to(tl.int64) * stride_m + j.to(tl.int64) * stride_n
        s += tl.load(bias, mask=(i < queries) & (j < keys), other=0.0).to(tl.float32)
    return tl.where(visible, s, -float("inf")), slope


@triton.jit
def probabilities(p, q, k, v, dout, m, log_sum, row, batch, head, i, j, queries, keys, found):
    """Of a tile (M, N), for the backward: the probabilities, the same after dropout, their gradient, and the slope of
    the scores."""
    s, slope = scores(p, q, k, batch, head, i, j, queries, keys, found)
    prob = tl.exp((s - m) - log_sum)
    used = prob
    dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
    if p.seed is not None:
        keep = kept(tl.load(p.seed), row * p.dropout_keys + j, p.dropout_threshold)
        used = tl.where(keep, prob * p.dropout_scale, 0.0)
        dp = tl.where(keep, dp * p.dropout_scale, 0.0)
    return prob, used, dp, slope


@triton.jit
def attention_kernel(
    p,
    tiles,
    SINKS,
    OUT,
    MAXIMUM,
    LOG_SUM,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """OUT, and of each query the largest score and the logarithm of the sum of the exponentials above it."""
    batch, head, first, i, q_begin, queries, k_begin, keys = query_tile(p, tiles, BLOCK_M)
    if first >= queries:
        return
    row = (batch * p.heads + head) * p.queries + q_begin + i  # of the maxima, and for dropout
    q = load_rows(p.q, batch, head, q_begin, i, i < queries, DIM, BLOCK_D)

    m = tl.full([BLOCK_M, 1], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M, 1], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin, end = visible_range(first, keys - queries, keys, p.left, p.right, BLOCK_M)
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)[None, :]
        found, k, v = load_keys(p, batch, head, k_begin, j, keys, DIM, BLOCK_D)
        s, _ = scores(p, q, k, batch, head, i, j, queries, keys, found)
        larger = tl.maximum(m, tl.max(s, 1, keep_dims=True))
        shift = tl.where(larger == -float("inf"), 0.0, larger)
        prob = tl.exp(s - shift)
        rescale = tl.exp(m - shift)
        total = total * rescale + tl.sum(prob, 1, keep_dims=True)
        if p.seed is not None:
            keep = kept(tl.load(p.seed), row * p.dropout_keys + j, p.dropout_threshold)
            prob = tl.where(keep, prob * p.dropout_scale, 0.0)
        acc = tl.dot(prob.to(v.dtype), v, acc * rescale, input_precision="ieee")
        m = larger
    if SINKS is not None:
        sink = tl.load(SINKS + head)
        larger = tl.maximum(m, sink)
        rescale = tl.exp(m - larger)
        total = total * rescale + tl.exp(sink - larger)
        acc *= rescale
        m = larger
    tl.store(MAXIMUM + row, m, mask=i < queries)
    tl.store(LOG_SUM + row, tl.where(total == 0, 0.0, tl.log(total)), mask=i < queries)
    out = tl.where(total == 0, 0.0, acc / total)
    store_rows(OUT, out, batch, head, q_begin, i, queries, DIM, BLOCK_D)


@triton.jit
def attention_dq_kernel(
    p,
    tiles,
    saved,
    OUT,
    DLSE,
    DELTA,
    DQ,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr,
):
    """dq, and DELTA, the sum of p dp of each query less the gradient of its lse."""
    batch, head, first, i, q_begin, queries, k_begin, keys = query_tile(p, tiles, BLOCK_M)
    if first >= queries:
        return
    q, dout, m, log_sum, row = load_queries(p, saved, batch, head, q_begin, i, queries, DIM, BLOCK_D)
    begin, end = visible_range(first, keys - queries, keys, p.left, p.right, BLOCK_M)

    # from out as it was rounded, delta would not cancel where there are few keys, nor in the long sums of a bias that
    # is broadcast: there it is summed from the probabilities themselves
    exact_end = end if BIAS_GRADIENT else tl.where(end - begin <= BLOCK_N, end, begin)
    delta = tl.zeros([BLOCK_M, 1], tl.float32)
    for start in range(begin, exact_end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)[None, :]
        found, k, v = load_keys(p, batch, head, k_begin, j, keys, DIM, BLOCK_D)
        prob, _, dp, _ = probabilities(p, q, k, v, dout, m, log_sum, row, batch, head, i, j, queries, keys, found)
        delta += tl.sum(prob * dp, 1, keep_dims=True)
    if exact_end < end:
        out = load_rows(OUT, batch, head, q_begin, i, i < queries, DIM, BLOCK_D)
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1, keep_dims=True)
    if DLSE is not None:
        delta -= tl.load(DLSE + row, mask=i < queries, other=0.0)
    tl.store(DELTA + row, delta, mask=i < queries)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)[None, :]
        found, k, v = load_keys(p, batch, head, k_begin, j, keys, DIM, BLOCK_D)
        prob, _, dp, slope = probabilities(p, q, k, v, dout, m, log_sum, row, batch, head, i, j, queries, keys, found)
        ds = (prob * (dp - delta) * slope).to(k.dtype)
        acc = tl.dot(ds, k, acc, input_precision="ieee")
    store_rows(DQ, acc * p.scale, batch, head, q_begin, i, queries, DIM, BLOCK_D)


@triton.jit
def attention_dkv_kernel(
    p,
    tiles,
    saved,
    DELTA,
    DK,
    DV,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program, kv_heads = tl.program_id(0), p.heads // p.group
    kv_head = (program // tiles % kv_heads).to(tl.int64)
    batch, first, k_begin, keys, q_begin, queries = locate(
        program % tiles, (program // tiles // kv_heads).to(tl.int64), p.cu_k, p.cu_q, p.sequences, p.keys, p.queries,
        BLOCK_N,
    )  # fmt: skip
    if first >= keys:
        return
    j = first + tl.arange(0, BLOCK_N)[None, :]
    found, k, v = load_keys(p, batch, kv_head * p.group, k_begin, j, keys, DIM, BLOCK_D)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    begin, end = visible_range(first, queries - keys, queries, p.right, p.left, BLOCK_N)
    for member in range(0, p.group):
        head = kv_head * p.group + member
        for start in range(begin, end, BLOCK_M):
            i = start + tl.arange(0, BLOCK_M)[:, None]
            q, dout, m, log_sum, row = load_queries(p, saved, batch, head, q_begin, i, queries, DIM, BLOCK_D)
            delta = tl.load(DELTA + row, mask=i < queries, other=0.0)
            prob, used, dp, slope = probabilities(
                p, q, k, v, dout, m, log_sum, row, batch, head, i, j, queries, keys, found
            )
            dv = tl.dot(tl.trans(used.to(dout.dtype)), dout, dv, input_precision="ieee")
            ds = (prob * (dp - delta) * slope).to(q.dtype)
            dk = tl.dot(tl.trans(ds), q, dk, input_precision="ieee")
    at = first + tl.arange(0, BLOCK_N)[:, None]
    store_rows(DK, dk * p.scale, batch, kv_head, k_begin, at, keys, DIM, BLOCK_D)
    store_rows(DV, dv, batch, kv_head, k_begin, at, keys, DIM, BLOCK_D)


@triton.jit
def attention_dbias_kernel(
    p,
    saved,
    DELTA,
    DBIAS,
    bias_batches,
    bias_heads,
    bias_queries,
    bias_keys,
    members,
    head_members,
    members_per_split,
    SHARED_QUERIES: tl.constexpr,
    SHARED_KEYS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """DBIAS (splits, bias_batches, bias_heads, bias_queries, bias_keys): the gradient of a tile of the bias, over the
    split's part of the `members`, the (batch, head) that share it. SHARED_QUERIES, SHARED_KEYS: over all of these
    too."""
    tiles_m, tiles_n = tl.cdiv(bias_queries, BLOCK_M), tl.cdiv(bias_keys, BLOCK_N)
    tile_n, rest = tl.program_id(0) % tiles_n, tl.program_id(0) // tiles_n
    tile_m, rest = rest % tiles_m, rest // tiles_m
    bias_head, rest = rest % bias_heads, rest // bias_heads
    bias_batch, split = rest % bias_batches, rest // bias_batches
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for member in range(split * members_per_split, tl.minimum(members, (split + 1) * members_per_split)):
        head = (bias_head + member % head_members).to(tl.int64)
        batch = (bias_batch + member // head_members).to(tl.int64)
        first_m, last_m = tile_m * BLOCK_M, tile_m * BLOCK_M + 1
        if SHARED_QUERIES:
            last_m = p.queries
        for start_m in range(first_m, last_m, BLOCK_M):
            i = start_m + tl.arange(0, BLOCK_M)[:, None]
            q, dout, m, log_sum, row = load_queries(p, saved, batch, head, 0, i, p.queries, DIM, BLOCK_D)
            delta = tl.load(DELTA + row, mask=i < p.queries, other=0.0)
            first_n, last_n = tile_n * BLOCK_N, tile_n * BLOCK_N + 1
            if SHARED_KEYS:
                last_n = p.keys
            for start_n in range(first_n, last_n, BLOCK_N):
                j = start_n + tl.arange(0, BLOCK_N)[None, :]
                found, k, v = load_keys(p, batch, head, 0, j, p.keys, DIM, BLOCK_D)
                prob, _, dp, _ = probabilities(
                    p, q, k, v, dout, m, log_sum, row, batch, head, i, j, p.queries, p.keys, found
                )
                acc += prob * (dp - delta)
    i, j = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None], tile_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    if SHARED_QUERIES:
        acc = tl.sum(acc, 0, keep_dims=True)
        i = tl.zeros([1, 1], tl.int32)
    if SHARED_KEYS:
        acc = tl.sum(acc, 1, keep_dims=True)
        j = tl.zeros([1, 1], tl.int32)
    matrix = ((split * bias_batches + bias_batch) * bias_heads + bias_head).to(tl.int64)
    at = (matrix * bias_queries + i) * bias_keys + j
    tl.store(DBIAS + at, acc, mask=(i < bias_queries) & (j < bias_keys))


def _rows_first(like):
    """Empty, of like's shape, in memory as (B, S, H, D) or (T, H, D)."""
    return torch.empty_like(like.transpose(1, -2), memory_format=torch.contiguous_format).transpose(1, -2)


def _heads(x, packed: bool) -> Heads:
    return Heads(x, 0, x.stride(1), x.stride(0)) if packed else Heads(x, *x.stride()[:3])


class _Call:
    """The arguments that the kernels of one call share."""

    def __init__(
        self, q, k, v, attention_mask, attn_bias, seed, cu_seqlens_q, cu_seqlens_k,
        max_seqlen_k, scale, softcap, left, right, dropout_p,
    ):  # fmt: skip
        self.packed = cu_seqlens_q is not None
        self.batch = 1 if self.packed else q.shape[0]
        self.kv_heads = k.shape[1]
        queries, keys = (x.shape[0 if self.packed else 2] for x in (q, k))
        bias_strides = (0, 0, 0, 0)
        if attn_bias is not None:
            bias_strides = (0 if n == 1 else s for n, s in zip(attn_bias.shape, attn_bias.stride(), strict=True))
        # a window beyond everything is none: the kernels' positions are int32
        left, right = (None if n < 0 or n >= queries + keys else n for n in (left, right))
        self.problem = Problem(
            *(_heads(x, self.packed) for x in (q, k, v)),
            mask=None if attention_mask is None else attention_mask.view(torch.uint8),
            bias=attn_bias,
            bias_strides=tuple(bias_strides),
            seed=seed,
            cu_q=cu_seqlens_q,
            cu_k=cu_seqlens_k,
            heads=q.shape[1],
            group=q.shape[1] // self.kv_heads,
            sequences=len(cu_seqlens_q) - 1 if self.packed else 0,
            queries=queries,
            keys=keys,
            dropout_keys=max_seqlen_k if self.packed else keys,
            scale=scale,
            softcap=softcap if softcap > 0 else None,
            left=left,
            right=right,
            dropout_threshold=threshold(dropout_p),
            dropout_scale=1 / (1 - dropout_p),
        )
        self.device, self.dim = q.device, q.shape[-1]
        self.constants = {"DIM": self.dim, "BLOCK_D": max(16, launch.power_of_two(self.dim))}

    def tile(self, kernel) -> dict:
        return launch.tile(kernel, self.device, self.constants["BLOCK_D"])

    def run(self, kernel, heads: int, rows: int, block: str, *arguments, **constants) -> None:
        """A kernel whose programs take a tile of rows, of the length that the tile table names `block`, of a head."""
        tile = self.tile(kernel)
        tiles = launch.cdiv(rows, tile[block])
        if self.packed:
            tiles = rows // tile[block] + self.problem.sequences + 1
        programs = tiles * heads * self.batch if rows * self.dim else 0
        launch.run(kernel, programs, self.problem, tiles, *arguments, **self.constants, **constants, **tile)


@launch.launcher
def attention(q, k, v, sinks, *options):
    call = _Call(q, k, v, *options)
    out = _rows_first(q)
    rows = (q.shape[1], q.shape[0]) if call.packed else q.shape[:-1]
    maximum, log_sum = (q.new_empty(rows, dtype=torch.float32) for _ in range(2))
    results = sinks, _heads(out, call.packed), maximum, log_sum
    call.run(attention_kernel, call.problem.heads, call.problem.queries, "BLOCK_M", *results)
    return out, maximum, log_sum


@launch.launcher
def attention_backward(dout, dlse, q, k, v, out, maximum, log_sum, sinks, *options):
    *options, bias_gradient = options
    call = _Call(q, k, v, *options)
    p, saved = call.problem, Saved(_heads(dout, call.packed), maximum, log_sum)
    dq, dk, dv = _rows_first(q), _rows_first(k), _rows_first(k)
    delta = torch.empty_like(maximum)
    of_out, of_dq, of_dk, of_dv = (_heads(x, call.packed) for x in (out, dq, dk, dv))
    call.run(
        attention_dq_kernel, p.heads, p.queries, "BLOCK_M", saved, of_out, dlse, delta, of_dq,
        BIAS_GRADIENT=bias_gradient,
    )  # fmt: skip
    call.run(attention_dkv_kernel, call.kv_heads, p.keys, "BLOCK_N", saved, delta, of_dk, of_dv)
    dsinks = q.new_empty(0, dtype=torch.float32)
    if sinks is not None:
        per_head = sinks.view(-1, 1)
        prob = torch.exp((per_head - maximum) - log_sum)
        dsinks = -(prob * delta).sum(1 if call.packed else (0, 2))
    dbias = _bias_gradient(call, saved, delta) if bias_gradient else q.new_empty(0, dtype=torch.float32)
    return dq, dk, dv, dsinks, dbias


#: programs that a GPU has room for: a small bias, which many heads share, is summed by more than its tiles
_PROGRAMS = 512


def _bias_gradient(call, saved, delta):
    """fp32, of attn_bias's shape."""
    p, tile = call.problem, call.tile(attention_dbias_kernel)
    batches, heads, queries, keys = p.bias.shape
    if p.q.data.numel() == 0 or p.k.data.numel() == 0:
        return torch.zeros_like(p.bias, dtype=torch.float32, memory_format=torch.contiguous_format)
    programs = batches * heads * launch.cdiv(queries, tile["BLOCK_M"]) * launch.cdiv(keys, tile["BLOCK_N"])
    head_members = p.heads // heads
    members = call.batch // batches * head_members
    members_per_split = launch.cdiv(members, min(members, max(1, _PROGRAMS // programs)))
    splits = launch.cdiv(members, members_per_split)
    dbias = delta.new_empty((splits, *p.bias.shape))
    launch.run(
        attention_dbias_kernel,
        programs * splits,
        p,
        saved,
        delta,
        dbias,
        *p.bias.shape,
        members,
        head_members,
        members_per_split,
        SHARED_QUERIES=queries < p.queries,
        SHARED_KEYS=keys < p.keys,
        **call.constants,
        **tile,
    )
    return dbias.sum(0)
