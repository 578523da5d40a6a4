"""Attention in Triton, forward and backward, that never holds its scores (Dao 2023, "FlashAttention-2").

A program of the forward and of the dq pass takes one tile of queries of one head and walks over the keys that it may
see; one of the dk/dv pass takes one tile of keys of one key/value head and walks over the queries, of all its query
heads, that may see it. A bias's gradient is a pass of its own over the tiles of the bias, which sums over the batches,
heads, queries or keys that share an element. Nothing is added atomically: the same inputs give the same bits.

Packed sequences (cu_seqlens): tile t belongs to the sequence n for which start(n) <= t < start(n + 1), where
start(n) = cu_seqlens[n] // BLOCK + n. That leaves each sequence enough tiles (a few have no rows) without a count that
only the GPU knows. Rows after the last sequence are a sequence of their own that sees nothing.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from pyfast.kernels import launch
from pyfast.kernels.philox import kept, threshold


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
def visible_range(first, shift, length, before, after, BEFORE: tl.constexpr, AFTER: tl.constexpr, BLOCK: tl.constexpr):
    """From where to where, on the other side, rows first to first + BLOCK may see: row i stands at i + shift there, and
    sees from `before` rows before it to `after` rows after it."""
    begin, end = 0, length
    if BEFORE:
        begin = tl.maximum(0, first + shift - before)
    if AFTER:
        end = tl.minimum(length, first + BLOCK + shift + after)
    return begin, end


@triton.jit
def scores(
    q,
    k,
    i,
    j,
    queries,
    keys,
    key_exists,
    BIAS,
    bias_stride_m,
    bias_stride_n,
    scale,
    softcap,
    left,
    right,
    SOFTCAP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
):
    """(scores, -inf where query i may not see key j; their derivative by scale * q kᵀ) of a tile (M, N)."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    slope = 1.0
    if SOFTCAP:
        t = libdevice.tanh(s / softcap)
        s = softcap * t
        slope = (1 - t) * (1 + t)
    visible = (i < queries) & key_exists
    offset = j - (i + (keys - queries))
    if LEFT:
        visible &= offset >= -left
    if RIGHT:
        visible &= offset <= right
    if BIAS is not None:
        bias = BIAS + i.to(tl.int64) * bias_stride_m + j.to(tl.int64) * bias_stride_n
        s += tl.load(bias, mask=(i < queries) & (j < keys), other=0.0).to(tl.float32)
    return tl.where(visible, s, -float("inf")), slope


@triton.jit
def probabilities(
    q,
    k,
    v,
    dout,
    m,
    log_sum,
    row,
    i,
    j,
    queries,
    keys,
    key_exists,
    BIAS,
    bias_stride_m,
    bias_stride_n,
    SEED,
    dropout_keys,
    dropout_threshold,
    dropout_scale,
    scale,
    softcap,
    left,
    right,
    SOFTCAP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
):
    """Of a tile (M, N), for the backward: the probabilities, the same after dropout, their gradient, and the slope of
    the scores."""
    s, slope = scores(
        q, k, i, j, queries, keys, key_exists, BIAS, bias_stride_m, bias_stride_n, scale, softcap, left, right,
        SOFTCAP, LEFT, RIGHT,
    )  # fmt: skip
    p = tl.exp((s - m) - log_sum)
    used = p
    dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
    if SEED is not None:
        keep = kept(tl.load(SEED), row * dropout_keys + j, dropout_threshold)
        used = tl.where(keep, p * dropout_scale, 0.0)
        dp = tl.where(keep, dp * dropout_scale, 0.0)
    return p, used, dp, slope


@triton.jit
def keys_and_values(K, V, MASK, j, keys, k_stride_n, v_stride_n, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """(which keys j (1, N) of a sequence count, their k and their v (N, BLOCK_D)): others are never read."""
    found = j < keys
    if MASK is not None:
        found &= tl.load(MASK + j, mask=found, other=0) != 0
    at, d = j.trans().to(tl.int64), tl.arange(0, BLOCK_D)[None, :]
    inside = found.trans() & (d < DIM)
    k = tl.load(K + at * k_stride_n + d, mask=inside, other=0.0)
    v = tl.load(V + at * v_stride_n + d, mask=inside, other=0.0)
    return found, k, v


@triton.jit
def attention_kernel(
    Q,
    K,
    V,
    SINKS,
    MASK,
    BIAS,
    SEED,
    CU_Q,
    CU_K,
    OUT,
    MAXIMUM,
    LOG_SUM,
    tiles,
    heads,
    group,
    sequences,
    total_q,
    total_k,
    dropout_keys,
    q_stride_b,
    q_stride_h,
    q_stride_m,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    bias_stride_b,
    bias_stride_h,
    bias_stride_m,
    bias_stride_n,
    out_stride_b,
    out_stride_h,
    out_stride_m,
    scale,
    softcap,
    left,
    right,
    dropout_threshold,
    dropout_scale,
    DIM: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles  # with a causal mask the last tiles see most: they start first
    head = (program // tiles % heads).to(tl.int64)
    batch, first, q_begin, queries, k_begin, keys = locate(
        tile, (program // tiles // heads).to(tl.int64), CU_Q, CU_K, sequences, total_q, total_k, BLOCK_M
    )
    if first >= queries:
        return
    i = first + tl.arange(0, BLOCK_M)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    Q += batch * q_stride_b + head * q_stride_h + q_begin * q_stride_m
    K += batch * k_stride_b + head // group * k_stride_h + k_begin * k_stride_n
    V += batch * v_stride_b + head // group * v_stride_h + k_begin * v_stride_n
    OUT += batch * out_stride_b + head * out_stride_h + q_begin * out_stride_m
    if MASK is not None:
        MASK += batch * total_k
    if BIAS is not None:
        BIAS += batch * bias_stride_b + head * bias_stride_h
    row = (batch * heads + head) * total_q + q_begin + i  # of the maxima, and for dropout
    q = tl.load(Q + i.to(tl.int64) * q_stride_m + d, mask=(i < queries) & (d < DIM), other=0.0)

    m = tl.full([BLOCK_M, 1], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M, 1], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin, end = visible_range(first, keys - queries, keys, left, right, LEFT, RIGHT, BLOCK_M)
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)[None, :]
        key_exists, k, v = keys_and_values(K, V, MASK, j, keys, k_stride_n, v_stride_n, DIM, BLOCK_D)
        s, _ = scores(
            q, k, i, j, queries, keys, key_exists, BIAS, bias_stride_m, bias_stride_n, scale, softcap, left, right,
            SOFTCAP, LEFT, RIGHT,
        )  # fmt: skip
        larger = tl.maximum(m, tl.max(s, 1, keep_dims=True))
        shift = tl.where(larger == -float("inf"), 0.0, larger)
        p = tl.exp(s - shift)
        rescale = tl.exp(m - shift)
        total = total * rescale + tl.sum(p, 1, keep_dims=True)
        if SEED is not None:
            p = tl.where(kept(tl.load(SEED), row * dropout_keys + j, dropout_threshold), p * dropout_scale, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale, input_precision="ieee")
        m = larger
    if SINKS is not None:
        sink = tl.load(SINKS + head)
        larger = tl.maximum(m, sink)
        rescale = tl.exp(m - larger)
        total = total * rescale + tl.exp(sink - larger)
        acc *= rescale
        m = larger
    out = tl.where(total == 0, 0.0, acc / total)
    log_sum = tl.where(total == 0, 0.0, tl.log(total))
    tl.store(MAXIMUM + row, m, mask=i < queries)
    tl.store(LOG_SUM + row, log_sum, mask=i < queries)
    OUT += i.to(tl.int64) * out_stride_m + d
    tl.store(OUT, out.to(OUT.dtype.element_ty), mask=(i < queries) & (d < DIM))


@triton.jit
def attention_dq_kernel(
    Q,
    K,
    V,
    MASK,
    BIAS,
    SEED,
    CU_Q,
    CU_K,
    OUT,
    DOUT,
    MAXIMUM,
    LOG_SUM,
    DLSE,
    DELTA,
    DQ,
    tiles,
    heads,
    group,
    sequences,
    total_q,
    total_k,
    dropout_keys,
    q_stride_b,
    q_stride_h,
    q_stride_m,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    bias_stride_b,
    bias_stride_h,
    bias_stride_m,
    bias_stride_n,
    out_stride_b,
    out_stride_h,
    out_stride_m,
    dout_stride_b,
    dout_stride_h,
    dout_stride_m,
    scale,
    softcap,
    left,
    right,
    dropout_threshold,
    dropout_scale,
    BIAS_GRADIENT: tl.constexpr,
    DIM: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq, which has out's layout, and DELTA, the sum of p dp of each query less the gradient of its lse."""
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles
    head = (program // tiles % heads).to(tl.int64)
    batch, first, q_begin, queries, k_begin, keys = locate(
        tile, (program // tiles // heads).to(tl.int64), CU_Q, CU_K, sequences, total_q, total_k, BLOCK_M
    )
    if first >= queries:
        return
    i = first + tl.arange(0, BLOCK_M)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    Q += batch * q_stride_b + head * q_stride_h + q_begin * q_stride_m
    K += batch * k_stride_b + head // group * k_stride_h + k_begin * k_stride_n
    V += batch * v_stride_b + head // group * v_stride_h + k_begin * v_stride_n
    out_at = batch * out_stride_b + head * out_stride_h + (q_begin + i) * out_stride_m + d
    DOUT += batch * dout_stride_b + head * dout_stride_h + q_begin * dout_stride_m
    if MASK is not None:
        MASK += batch * total_k
    if BIAS is not None:
        BIAS += batch * bias_stride_b + head * bias_stride_h
    row = (batch * heads + head) * total_q + q_begin + i
    inside = (i < queries) & (d < DIM)
    q = tl.load(Q + i.to(tl.int64) * q_stride_m + d, mask=inside, other=0.0)
    dout = tl.load(DOUT + i.to(tl.int64) * dout_stride_m + d, mask=inside, other=0.0)
    m = tl.load(MAXIMUM + row, mask=i < queries, other=0.0)
    m = tl.where(m == -float("inf"), 0.0, m)
    log_sum = tl.load(LOG_SUM + row, mask=i < queries, other=0.0)
    begin, end = visible_range(first, keys - queries, keys, left, right, LEFT, RIGHT, BLOCK_M)

    # from out as it was rounded, delta would not cancel where there are few keys, nor in the long sums of a bias that
    # is broadcast: there it is summed from the probabilities themselves
    exact_end = end if BIAS_GRADIENT else tl.where(end - begin <= BLOCK_N, end, begin)
    delta = tl.zeros([BLOCK_M, 1], tl.float32)
    for start in range(begin, exact_end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)[None, :]
        key_exists, k, v = keys_and_values(K, V, MASK, j, keys, k_stride_n, v_stride_n, DIM, BLOCK_D)
        p, _, dp, _ = probabilities(
            q, k, v, dout, m, log_sum, row, i, j, queries, keys, key_exists, BIAS, bias_stride_m, bias_stride_n,
            SEED, dropout_keys, dropout_threshold, dropout_scale, scale, softcap, left, right, SOFTCAP, LEFT, RIGHT,
        )  # fmt: skip
        delta += tl.sum(p * dp, 1, keep_dims=True)
    if exact_end < end:
        out = tl.load(OUT + out_at, mask=inside, other=0.0)
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1, keep_dims=True)
    if DLSE is not None:
        delta -= tl.load(DLSE + row, mask=i < queries, other=0.0)
    tl.store(DELTA + row, delta, mask=i < queries)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)[None, :]
        key_exists, k, v = keys_and_values(K, V, MASK, j, keys, k_stride_n, v_stride_n, DIM, BLOCK_D)
        p, _, dp, slope = probabilities(
            q, k, v, dout, m, log_sum, row, i, j, queries, keys, key_exists, BIAS, bias_stride_m, bias_stride_n,
            SEED, dropout_keys, dropout_threshold, dropout_scale, scale, softcap, left, right, SOFTCAP, LEFT, RIGHT,
        )  # fmt: skip
        ds = (p * (dp - delta) * slope).to(k.dtype)
        acc = tl.dot(ds, k, acc, input_precision="ieee")
    tl.store(DQ + out_at, (acc * scale).to(DQ.dtype.element_ty), mask=(i < queries) & (d < DIM))


@triton.jit
def attention_dkv_kernel(
    Q,
    K,
    V,
    MASK,
    BIAS,
    SEED,
    CU_Q,
    CU_K,
    DOUT,
    MAXIMUM,
    LOG_SUM,
    DELTA,
    DK,
    DV,
    tiles,
    kv_heads,
    group,
    sequences,
    total_q,
    total_k,
    dropout_keys,
    q_stride_b,
    q_stride_h,
    q_stride_m,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    bias_stride_b,
    bias_stride_h,
    bias_stride_m,
    bias_stride_n,
    dk_stride_b,
    dk_stride_h,
    dk_stride_n,
    dout_stride_b,
    dout_stride_h,
    dout_stride_m,
    scale,
    softcap,
    left,
    right,
    dropout_threshold,
    dropout_scale,
    DIM: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv, which share one layout."""
    program = tl.program_id(0)
    kv_head = (program // tiles % kv_heads).to(tl.int64)
    batch, first, k_begin, keys, q_begin, queries = locate(
        program % tiles, (program // tiles // kv_heads).to(tl.int64), CU_K, CU_Q, sequences, total_k, total_q, BLOCK_N
    )
    if first >= keys:
        return
    j = first + tl.arange(0, BLOCK_N)[None, :]
    d = tl.arange(0, BLOCK_D)[None, :]
    K += batch * k_stride_b + kv_head * k_stride_h + k_begin * k_stride_n
    V += batch * v_stride_b + kv_head * v_stride_h + k_begin * v_stride_n
    if MASK is not None:
        MASK += batch * total_k
    key_exists, k, v = keys_and_values(K, V, MASK, j, keys, k_stride_n, v_stride_n, DIM, BLOCK_D)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    begin, end = visible_range(first, queries - keys, queries, right, left, RIGHT, LEFT, BLOCK_N)
    for member in range(0, group):
        head = kv_head * group + member
        q_at = Q + batch * q_stride_b + head * q_stride_h + q_begin * q_stride_m
        dout_at = DOUT + batch * dout_stride_b + head * dout_stride_h + q_begin * dout_stride_m
        if BIAS is not None:
            bias = BIAS + batch * bias_stride_b + head * bias_stride_h
        else:
            bias = BIAS
        for start in range(begin, end, BLOCK_M):
            i = start + tl.arange(0, BLOCK_M)[:, None]
            row = (batch * (kv_heads * group) + head) * total_q + q_begin + i
            inside = (i < queries) & (d < DIM)
            q = tl.load(q_at + i.to(tl.int64) * q_stride_m + d, mask=inside, other=0.0)
            dout = tl.load(dout_at + i.to(tl.int64) * dout_stride_m + d, mask=inside, other=0.0)
            m = tl.load(MAXIMUM + row, mask=i < queries, other=0.0)
            m = tl.where(m == -float("inf"), 0.0, m)
            log_sum = tl.load(LOG_SUM + row, mask=i < queries, other=0.0)
            delta = tl.load(DELTA + row, mask=i < queries, other=0.0)
            p, used, dp, slope = probabilities(
                q, k, v, dout, m, log_sum, row, i, j, queries, keys, key_exists, bias, bias_stride_m, bias_stride_n,
                SEED, dropout_keys, dropout_threshold, dropout_scale, scale, softcap, left, right, SOFTCAP, LEFT, RIGHT,
            )  # fmt: skip
            dv = tl.dot(tl.trans(used.to(dout.dtype)), dout, dv, input_precision="ieee")
            ds = (p * (dp - delta) * slope).to(q.dtype)
            dk = tl.dot(tl.trans(ds), q, dk, input_precision="ieee")
    at = first + tl.arange(0, BLOCK_N)[:, None]
    dk_at = batch * dk_stride_b + kv_head * dk_stride_h + (k_begin + at) * dk_stride_n + d
    inside = (at < keys) & (d < DIM)
    tl.store(DK + dk_at, (dk * scale).to(DK.dtype.element_ty), mask=inside)
    tl.store(DV + dk_at, dv.to(DV.dtype.element_ty), mask=inside)


@triton.jit
def attention_dbias_kernel(
    Q,
    K,
    V,
    MASK,
    BIAS,
    SEED,
    DOUT,
    MAXIMUM,
    LOG_SUM,
    DELTA,
    DBIAS,
    heads,
    group,
    queries,
    keys,
    q_stride_b,
    q_stride_h,
    q_stride_m,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    bias_stride_b,
    bias_stride_h,
    bias_stride_m,
    bias_stride_n,
    dout_stride_b,
    dout_stride_h,
    dout_stride_m,
    bias_batches,
    bias_heads,
    bias_queries,
    bias_keys,
    members,
    head_members,
    members_per_split,
    scale,
    softcap,
    left,
    right,
    dropout_threshold,
    dropout_scale,
    SHARED_QUERIES: tl.constexpr,
    SHARED_KEYS: tl.constexpr,
    DIM: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
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
    d = tl.arange(0, BLOCK_D)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for member in range(split * members_per_split, tl.minimum(members, (split + 1) * members_per_split)):
        head = (bias_head + member % head_members).to(tl.int64)
        batch = (bias_batch + member // head_members).to(tl.int64)
        q_at = Q + batch * q_stride_b + head * q_stride_h
        k_at = K + batch * k_stride_b + head // group * k_stride_h
        v_at = V + batch * v_stride_b + head // group * v_stride_h
        dout_at = DOUT + batch * dout_stride_b + head * dout_stride_h
        bias = BIAS + batch * bias_stride_b + head * bias_stride_h
        if MASK is not None:
            mask = MASK + batch * keys
        else:
            mask = MASK
        first_m, last_m = tile_m * BLOCK_M, tile_m * BLOCK_M + 1
        if SHARED_QUERIES:
            last_m = queries
        for start_m in range(first_m, last_m, BLOCK_M):
            i = start_m + tl.arange(0, BLOCK_M)[:, None]
            row = (batch * heads + head) * queries + i
            inside = (i < queries) & (d < DIM)
            q = tl.load(q_at + i.to(tl.int64) * q_stride_m + d, mask=inside, other=0.0)
            dout = tl.load(dout_at + i.to(tl.int64) * dout_stride_m + d, mask=inside, other=0.0)
            m = tl.load(MAXIMUM + row, mask=i < queries, other=0.0)
            m = tl.where(m == -float("inf"), 0.0, m)
            log_sum = tl.load(LOG_SUM + row, mask=i < queries, other=0.0)
            delta = tl.load(DELTA + row, mask=i < queries, other=0.0)
            first_n, last_n = tile_n * BLOCK_N, tile_n * BLOCK_N + 1
            if SHARED_KEYS:
                last_n = keys
            for start_n in range(first_n, last_n, BLOCK_N):
                j = start_n + tl.arange(0, BLOCK_N)[None, :]
                key_exists, k, v = keys_and_values(k_at, v_at, mask, j, keys, k_stride_n, v_stride_n, DIM, BLOCK_D)
                p, _, dp, _ = probabilities(
                    q, k, v, dout, m, log_sum, row, i, j, queries, keys, key_exists, bias, bias_stride_m, bias_stride_n,
                    SEED, keys, dropout_threshold, dropout_scale, scale, softcap, left, right, SOFTCAP, LEFT, RIGHT,
                )  # fmt: skip
                acc += p * (dp - delta)
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


def _strides(x, packed: bool) -> tuple[int, int, int]:
    """By batch, head and row."""
    return (0, x.stride(1), x.stride(0)) if packed else x.stride()[:3]


class _Shape:
    """Of one call: sizes, and the arguments that its kernels share."""

    def __init__(self, q, k, v, attn_bias, cu_seqlens_q, max_seqlen_k, scale, softcap, left, right, dropout_p):
        self.packed = cu_seqlens_q is not None
        self.batch = 1 if self.packed else q.shape[0]
        self.sequences = len(cu_seqlens_q) - 1 if self.packed else 0
        self.queries, self.keys = (x.shape[0 if self.packed else 2] for x in (q, k))
        self.heads, self.kv_heads, self.dim = q.shape[1], k.shape[1], q.shape[-1]
        group = self.heads // self.kv_heads
        dropout_keys = max_seqlen_k if self.packed else self.keys
        self.sizes = (group, self.sequences, self.queries, self.keys, dropout_keys)
        bias_strides = (0, 0, 0, 0)
        if attn_bias is not None:
            bias_strides = (0 if n == 1 else s for n, s in zip(attn_bias.shape, attn_bias.stride(), strict=True))
        self.strides = (*(s for x in (q, k, v) for s in _strides(x, self.packed)), *bias_strides)
        # a window beyond everything is none: the kernels' positions are int32
        left, right = (-1 if n >= self.queries + self.keys else n for n in (left, right))
        self.options = (scale, float(softcap or 1), left, right, threshold(dropout_p), 1 / (1 - dropout_p))
        self.constants = {
            "DIM": self.dim,
            "SOFTCAP": softcap > 0,
            "LEFT": left >= 0,
            "RIGHT": right >= 0,
            "BLOCK_D": max(16, triton.next_power_of_2(self.dim)),
        }

    def tiles(self, rows: int, block: int) -> int:
        return rows // block + self.sequences + 1 if self.packed else triton.cdiv(rows, block)


def _mask_bytes(attention_mask):
    return None if attention_mask is None else attention_mask.view(torch.uint8)


@launch.launcher
def attention(
    q, k, v, sinks, attention_mask, attn_bias, seed, cu_seqlens_q, cu_seqlens_k,
    max_seqlen_k, scale, softcap, left, right, dropout_p,
):  # fmt: skip
    shape = _Shape(q, k, v, attn_bias, cu_seqlens_q, max_seqlen_k, scale, softcap, left, right, dropout_p)
    out = _rows_first(q)
    rows = q.shape[:-1] if q.dim() == 4 else (q.shape[1], q.shape[0])
    maximum, log_sum = (q.new_empty(rows, dtype=torch.float32) for _ in range(2))
    tile = launch.tile(attention_kernel, q.device, shape.constants["BLOCK_D"])
    tiles = shape.tiles(shape.queries, tile["BLOCK_M"])
    launch.run(
        attention_kernel,
        tiles * shape.heads * shape.batch if q.numel() else 0,
        q,
        k,
        v,
        sinks,
        _mask_bytes(attention_mask),
        attn_bias,
        seed,
        cu_seqlens_q,
        cu_seqlens_k,
        out,
        maximum,
        log_sum,
        tiles,
        shape.heads,
        *shape.sizes,
        *shape.strides,
        *_strides(out, shape.packed),
        *shape.options,
        **shape.constants,
        **tile,
    )
    return out, maximum, log_sum


@launch.launcher
def attention_backward(
    dout, dlse, q, k, v, out, maximum, log_sum, sinks, attention_mask, attn_bias, seed, cu_seqlens_q, cu_seqlens_k,
    max_seqlen_k, scale, softcap, left, right, dropout_p, bias_gradient,
):  # fmt: skip
    shape = _Shape(q, k, v, attn_bias, cu_seqlens_q, max_seqlen_k, scale, softcap, left, right, dropout_p)
    dq, dk, dv = _rows_first(q), _rows_first(k), _rows_first(k)
    delta, mask = torch.empty_like(maximum), _mask_bytes(attention_mask)
    tile = launch.tile(attention_dq_kernel, q.device, shape.constants["BLOCK_D"])
    tiles = shape.tiles(shape.queries, tile["BLOCK_M"])
    launch.run(
        attention_dq_kernel,
        tiles * shape.heads * shape.batch if q.numel() else 0,
        q,
        k,
        v,
        mask,
        attn_bias,
        seed,
        cu_seqlens_q,
        cu_seqlens_k,
        out,
        dout,
        maximum,
        log_sum,
        dlse,
        delta,
        dq,
        tiles,
        shape.heads,
        *shape.sizes,
        *shape.strides,
        *_strides(out, shape.packed),
        *_strides(dout, shape.packed),
        *shape.options,
        BIAS_GRADIENT=bias_gradient,
        **shape.constants,
        **tile,
    )
    tile = launch.tile(attention_dkv_kernel, q.device, shape.constants["BLOCK_D"])
    tiles = shape.tiles(shape.keys, tile["BLOCK_N"])
    launch.run(
        attention_dkv_kernel,
        tiles * shape.kv_heads * shape.batch if k.numel() else 0,
        q,
        k,
        v,
        mask,
        attn_bias,
        seed,
        cu_seqlens_q,
        cu_seqlens_k,
        dout,
        maximum,
        log_sum,
        delta,
        dk,
        dv,
        tiles,
        shape.kv_heads,
        *shape.sizes,
        *shape.strides,
        *_strides(dk, shape.packed),
        *_strides(dout, shape.packed),
        *shape.options,
        **shape.constants,
        **tile,
    )
    dsinks = q.new_empty(0, dtype=torch.float32)
    if sinks is not None:
        per_head = sinks.view(-1, 1)
        p = torch.exp((per_head - maximum) - log_sum)
        dsinks = -(p * delta).sum(1 if shape.packed else (0, 2))
    dbias = q.new_empty(0, dtype=torch.float32)
    if bias_gradient:
        dbias = _bias_gradient(shape, q, k, v, mask, attn_bias, seed, dout, maximum, log_sum, delta)
    return dq, dk, dv, dsinks, dbias


#: programs that a GPU has room for: a small bias, which many heads share, is summed by more than its tiles
_PROGRAMS = 512


def _bias_gradient(shape, q, k, v, mask, attn_bias, seed, dout, maximum, log_sum, delta):
    """fp32, of attn_bias's shape."""
    batches, heads, queries, keys = attn_bias.shape
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(attn_bias, dtype=torch.float32, memory_format=torch.contiguous_format)
    tile = launch.tile(attention_dbias_kernel, q.device, shape.constants["BLOCK_D"])
    programs = batches * heads * triton.cdiv(queries, tile["BLOCK_M"]) * triton.cdiv(keys, tile["BLOCK_N"])
    head_members = shape.heads // heads
    members = shape.batch // batches * head_members
    members_per_split = triton.cdiv(members, min(members, max(1, _PROGRAMS // programs)))
    splits = triton.cdiv(members, members_per_split)
    dbias = q.new_empty((splits, *attn_bias.shape), dtype=torch.float32)
    launch.run(
        attention_dbias_kernel,
        programs * splits,
        q,
        k,
        v,
        mask,
        attn_bias,
        seed,
        dout,
        maximum,
        log_sum,
        delta,
        dbias,
        shape.heads,
        shape.heads // shape.kv_heads,
        shape.queries,
        shape.keys,
        *shape.strides,
        *_strides(dout, shape.packed),
        *attn_bias.shape,
        members,
        head_members,
        members_per_split,
        *shape.options,
        SHARED_QUERIES=queries < shape.queries,
        SHARED_KEYS=keys < shape.keys,
        **shape.constants,
        **tile,
    )
    return dbias.sum(0)
