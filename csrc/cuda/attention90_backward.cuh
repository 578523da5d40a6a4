// The backward of attention.cuh on sm_90a, for what attention90.cuh serves: first dq (and delta), then dk and dv, each
// pass by itself, so that nothing is added atomically and the same inputs give the same bits.
//
// A block has 128 rows, 64 to a warp group, of two tensors in shared memory (queries and dout, or keys and values), and
// tiles of 64 rows of the other two come by TMA in a ring of two stages; a third warp group copies. Scores and the
// probabilities' gradients are wgmmas from shared memory, 64 x 64 to a warp group. In registers they become the
// gradients of scores (and probabilities), operands of the sums: dq += ds k, or dk += ds^T q and dv += p^T dout, where
// rows of the tile in shared memory are depths. For D = 128 a tile's sums of dq are in flight under the next tile's
// scores.
//
// Shared memory: (2 x 128 + 4 x 64) x D elements, 128 KB for D = 128. Registers of a thread: D / 2 sums (dk and dv: D),
// 64 for scores and gradients, 32 for operands, of 240.
//
// Bound: tensor cores, 14 D FLOP per pair of query and key: per 64 x 64 pairs a processor takes 6 D cycles for dq and
// 8 D for dk and dv (768 and 1,024 for D = 128), its special function units 256 for the exponentials in each. 10 D
// would do in one pass, with atomics. These are bounds on paper: it has not run on a GPU.
#pragma once
#include "cuda/attention90.cuh"

namespace pyfast::cuda {

// What both passes share: a block's two tiles of rows, and the ring of pairs of inner tiles
template <class T, int kDim>
struct Backward90 {
  static constexpr int kGroups = 2, kRows = 64 * kGroups, kInner = 64, kStages = 2;
  static constexpr int kConsumers = 128 * kGroups, kThreads = kConsumers + 128;
  static constexpr int kHalves = kDim / 64, kOuterHalf = kRows * 128, kInnerHalf = kInner * 128;  // of 64 columns
  static constexpr int kOuterBytes = kHalves * kOuterHalf, kInnerBytes = kHalves * kInnerHalf;
  static constexpr int kBarriers = 2 * kOuterBytes + 2 * kStages * kInnerBytes;
  static constexpr int kSharedBytes = kBarriers + 8 + Ring<kStages>::kBytes;

  unsigned char* shared;

  __device__ __forceinline__ unsigned char* outer(int which) const { return shared + which * kOuterBytes; }
  __device__ __forceinline__ unsigned char* inner(int which, int n) const {
    return shared + 2 * kOuterBytes + (n % kStages * 2 + which) * kInnerBytes;
  }
  __device__ __forceinline__ uint64_t* rows_there() const { return reinterpret_cast<uint64_t*>(shared + kBarriers); }
  __device__ __forceinline__ Ring<kStages> ring() const { return {rows_there() + 1}; }

  __device__ __forceinline__ void begin() const {
    if (threadIdx.x == 0) {
      mbarrier_init(rows_there(), 1);
      ring().begin(kConsumers / 32);
      fence_mbarrier_init();
    }
    __syncthreads();
  }

  // ---- by the producer
  __device__ __forceinline__ void load_rows(const TensorMap& x, const TensorMap& y, int row, int head,
                                            int batch) const {
    mbarrier_arrive_expect(rows_there(), 2 * kOuterBytes);
    for (int h = 0; h < kHalves; ++h) {
      tma_load<4>(outer(0) + h * kOuterHalf, &x, rows_there(), {64 * h, row, head, batch});
      tma_load<4>(outer(1) + h * kOuterHalf, &y, rows_there(), {64 * h, row, head, batch});
    }
  }
  __device__ __forceinline__ void load(int n, const TensorMap& x, const TensorMap& y, int row, int head,
                                       int batch) const {
    uint64_t* const there = ring().fill(n, 2 * kInnerBytes);
    for (int h = 0; h < kHalves; ++h) {
      tma_load<4>(inner(0, n) + h * kInnerHalf, &x, there, {64 * h, row, head, batch});
      tma_load<4>(inner(1, n) + h * kInnerHalf, &y, there, {64 * h, row, head, batch});
    }
  }

  // ---- by the consumers
  // Until tile n is there; of its rows the first `count` are this sequence's, where sequences are packed. The next
  // one's are zeros here, for they may hold what 0 times is not 0.
  __device__ __forceinline__ void wait(int n, bool packed, int count) const {
    ring().wait(n);
    if (!packed || count >= kInner) return;
    for (int i = count * 8 + threadIdx.x; i < kInner * 8; i += kConsumers)
      for (int h = 0; h < 2 * kHalves; ++h)
        *reinterpret_cast<Vector*>(inner(0, n) + h * kInnerHalf + i * 16) = Vector{};
    fence_async();
    named_barrier(1, kConsumers);
  }
  // Begins s (64 x 64) = this warp group's rows of outer tile `which` times the rows of the inner one
  __device__ __forceinline__ void begin_products(float (&s)[32], int which, int n) const {
    const unsigned char *const a = outer(which) + threadIdx.x / 128 * 64 * 128, *const b = inner(which, n);
    hold(s);
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
      const uint64_t left = wgmma_descriptor(a + d / 4 * kOuterHalf + d % 4 * 32);
      const uint64_t right = wgmma_descriptor(b + d / 4 * kInnerHalf + d % 4 * 32);
      if (d == 0)
        wgmma<T, false, false>(s, left, right);
      else
        wgmma<T>(s, left, right);
    }
    wgmma_commit();
  }
  // Begins sums (64 x kDim) += x (64 x 64) times the inner tile `which`
  __device__ __forceinline__ void begin_sums(float (&sums)[kDim / 2], uint32_t (&x)[kInner / 16][4], int which,
                                             int n) const {
    const unsigned char* const b = inner(which, n);
    hold(reinterpret_cast<uint32_t (&)[kInner / 4]>(x));
    hold(sums);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kInner / 16; ++k) wgmma<T, true>(sums, x[k], wgmma_descriptor(b + k * 16 * 128, kInnerHalf));
    wgmma_commit();
  }
  // A product's result as the operand of the next
  __device__ __forceinline__ static void make_operand(uint32_t (&x)[kInner / 16][4], const float (&s)[32]) {
#pragma unroll
    for (int k = 0; k < kInner / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) x[k][i] = pack<T>(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
  }
  // Leaves 0 where a lane's two rows have no part in columns `at` on
  __device__ __forceinline__ static void mask(float (&p)[32], int at, const Keys (&seen)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int column = at + threadIdx.x % 4 * 2 - seen[h].first;
#pragma unroll
      for (int j = 0; j < kInner / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (uint32_t(column + 8 * j + e) >= uint32_t(seen[h].count)) p[4 * j + 2 * h + e] = 0.f;
    }
  }
};

// The logarithm, to base 2, of what a query's exponentials are divided by
__device__ __forceinline__ float log2_of_sum(const Attention& a, int64_t row) {
  const float maximum = a.maximum[row];
  return maximum == -INFINITY ? 0.f : (maximum + a.log_sum[row]) * 1.44269504f;
}

// x, y: what the block keeps; z, w: what it walks over
struct Backward90Launch {
  TensorMap x, y, z, w;
  AttentionLaunch l;
};

template <class T, int kDim>
__global__ void __launch_bounds__(Backward90<T, kDim>::kThreads, 1)
    attention_dq90_kernel(const __grid_constant__ Backward90Launch l90) {
#if defined(PYFAST_EMULATOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  PYFAST_SHARED(shared);
  using B = Backward90<T, kDim>;
  const AttentionLaunch& l = l90.l;
  const Attention& a = l.a;
  const B block{shared};
  const Place p = locate(l, a.heads, a.cu_q, a.cu_k, a.sq, a.sk, B::kRows, true);
  if (p.first >= p.length) return;
  const int keys = p.other_length;
  const Range range(first_key(a, p, keys), behind_keys(a, p, keys, B::kRows), B::kInner);
  const int begin = range.begin, tiles = range.tiles;
  block.begin();
  if (threadIdx.x >= B::kConsumers) {
    give_registers<24>();
    if (threadIdx.x != B::kConsumers || tiles == 0) return;
    const int kv_head = p.head / int(a.heads / a.kv_heads);
    block.load_rows(l90.x, l90.y, p.begin + p.first, p.head, p.batch);
    for (int n = 0; n < tiles; ++n)
      block.load(n, l90.z, l90.w, p.other_begin + begin + n * B::kInner, kv_head, p.batch);
    return;
  }

  take_registers<240>();
  const int first = p.first + threadIdx.x / 128 * 64, warp_row = first + threadIdx.x / 32 % 4 * 16;
  const int row = warp_row + threadIdx.x % 32 / 4;
  const Scores<false> scores(a, p.batch, p.head, p.begin, p.length, keys);
  const float to_log2 = a.scale * 1.44269504f;
  float delta[2], sum[2] = {0.f, 0.f};
  make_deltas<T>(a, p, scores.row, warp_row, delta);
#pragma unroll
  for (int h = 0; h < 2; ++h)
    if (row + 8 * h < p.length) sum[h] = log2_of_sum(a, scores.row + row + 8 * h);
  const Keys seen[2] = {scores.seen_by(row), scores.seen_by(row + 8)};

  float s[32], dp[32], acc[kDim / 8][4] = {};
  float (&sums)[kDim / 2] = reinterpret_cast<float (&)[kDim / 2]>(acc);
  uint32_t ds[B::kInner / 16][4];
  if (tiles > 0) mbarrier_wait(block.rows_there(), 0);
#pragma unroll 1
  for (int n = 0; n < tiles; ++n) {
    const int at = begin + n * B::kInner;
    block.wait(n, a.cu_k, keys - at);
    block.begin_products(s, 0, n);
    block.begin_products(dp, 1, n);
    wgmma_wait<1>();
    hold(s);
    hold(sums);
    if (n > 0) block.ring().release(n - 1);
    float probability[32];
#pragma unroll
    for (int i = 0; i < 32; ++i) probability[i] = exp2_approx(fmaf(s[i], to_log2, -sum[i / 2 % 2]));
    wgmma_wait<0>();
    hold(dp);
    if (!scores.all_visible(first, first + 64, at, at + B::kInner)) B::mask(probability, at, seen);
#pragma unroll
    for (int i = 0; i < 32; ++i) probability[i] *= dp[i] - delta[i / 2 % 2];
    B::make_operand(ds, probability);
    block.begin_sums(sums, ds, 0, n);
    if constexpr (kDim == 64) wgmma_wait<0>();  // else ptxas (13.0) lets no two products of this loop run at once
  }
  wgmma_wait<0>();
  hold(sums);
  const float factor[2] = {a.scale, a.scale};
  store_rows(acc, factor, row_of<T>(a.dq, p.batch, p.head, p.begin), a.dq.row, warp_row, p.length, 0, a.dim,
             a.dq.aligned);
#endif
}

// Rows of the products are keys here, columns queries
template <class T, int kDim>
__global__ void __launch_bounds__(Backward90<T, kDim>::kThreads, 1)
    attention_dkv90_kernel(const __grid_constant__ Backward90Launch l90) {
#if defined(PYFAST_EMULATOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  PYFAST_SHARED(shared);
  using B = Backward90<T, kDim>;
  const AttentionLaunch& l = l90.l;
  const Attention& a = l.a;
  const B block{shared};
  const Place p = locate(l, a.kv_heads, a.cu_k, a.cu_q, a.sk, a.sq, B::kRows, false);
  if (p.first >= p.length) return;
  const int queries = p.other_length, group = int(a.heads / a.kv_heads);
  const Range range(first_query(a, p, queries), behind_queries(a, p, queries, B::kRows), B::kInner);  // of each head
  const int begin = range.begin, end = range.end, tiles = range.tiles;
  block.begin();
  if (threadIdx.x >= B::kConsumers) {
    give_registers<24>();
    if (threadIdx.x != B::kConsumers || tiles == 0) return;
    block.load_rows(l90.x, l90.y, p.begin + p.first, p.head, p.batch);
    for (int head = 0, n = 0; head < group; ++head)
      for (int at = begin; at < end; at += B::kInner, ++n)
        block.load(n, l90.z, l90.w, p.other_begin + at, p.head * group + head, p.batch);
    return;
  }

  take_registers<240>();
  const int first = p.first + threadIdx.x / 128 * 64, warp_row = first + threadIdx.x / 32 % 4 * 16;
  const int row = warp_row + threadIdx.x % 32 / 4;  // this lane's first key
  const float to_log2 = a.scale * 1.44269504f;
  float s[32], dp[32], dk[kDim / 8][4] = {}, dv[kDim / 8][4] = {};
  float (&dk_sums)[kDim / 2] = reinterpret_cast<float (&)[kDim / 2]>(dk);
  float (&dv_sums)[kDim / 2] = reinterpret_cast<float (&)[kDim / 2]>(dv);
  uint32_t operand[B::kInner / 16][4], ds[B::kInner / 16][4];
  if (tiles > 0) mbarrier_wait(block.rows_there(), 0);
  for (int head = 0, n = 0; head < group; ++head) {
    const Scores<false> scores(a, p.batch, p.head * group + head, p.other_begin, queries, p.length);
    for (int at = begin; at < end; at += B::kInner, ++n) {
      block.wait(n, a.cu_k, queries - at);
      block.begin_products(s, 0, n);
      block.begin_products(dp, 1, n);
      wgmma_wait<1>();
      hold(s);
      float probability[32];
#pragma unroll
      for (int j = 0; j < B::kInner / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int i = at + 8 * j + threadIdx.x % 4 * 2 + e;
          const float sum = i < queries ? log2_of_sum(a, scores.row + i) : 0.f;
#pragma unroll
          for (int h = 0; h < 4; h += 2) {
            const int x = 4 * j + h + e;
            probability[x] = exp2_approx(fmaf(s[x], to_log2, -sum));
          }
        }
      if (!scores.all_visible(at, at + B::kInner, first, first + 64)) {
        const Keys seeing[2] = {scores.seeing(row), scores.seeing(row + 8)};
        B::mask(probability, at, seeing);
      }
      B::make_operand(operand, probability);
      block.begin_sums(dv_sums, operand, 1, n);
      wgmma_wait<1>();
      hold(dp);
#pragma unroll
      for (int j = 0; j < B::kInner / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int i = at + 8 * j + threadIdx.x % 4 * 2 + e;
          const float delta = i < queries ? a.delta[scores.row + i] : 0.f;
#pragma unroll
          for (int h = 0; h < 4; h += 2) probability[4 * j + h + e] *= dp[4 * j + h + e] - delta;
        }
      B::make_operand(ds, probability);
      block.begin_sums(dk_sums, ds, 0, n);
      wgmma_wait<0>();
      hold(dv_sums);
      hold(dk_sums);
      block.ring().release(n);
    }
  }
  const float one[2] = {1.f, 1.f}, scale[2] = {a.scale, a.scale};
  store_rows(dk, scale, row_of<T>(a.dk, p.batch, p.head, p.begin), a.dk.row, warp_row, p.length, 0, a.dim,
             a.dk.aligned);
  store_rows(dv, one, row_of<T>(a.dv, p.batch, p.head, p.begin), a.dv.row, warp_row, p.length, 0, a.dim, a.dv.aligned);
#endif
}

template <class T, int kDim>
int launch_backward90(const Attention& a, Pass pass, void* stream) {
  using B = Backward90<T, kDim>;
  const bool over_keys = pass == Pass::dq;
  const int64_t length = over_keys ? a.sq : a.sk, heads = over_keys ? a.heads : a.kv_heads;
  const int64_t tiles = a.cu_q ? length / B::kRows + a.sequences + 1 : (length + B::kRows - 1) / B::kRows;
  Backward90Launch l{{}, {}, {}, {}, {a, tiles}};
  const int query_rows = over_keys ? B::kRows : B::kInner, key_rows = over_keys ? B::kInner : B::kRows;
  TensorMap &q = over_keys ? l.x : l.z, &dout = over_keys ? l.y : l.w;
  TensorMap &k = over_keys ? l.z : l.x, &v = over_keys ? l.w : l.y;
  if (int e = make_boxes<T>(q, a, a.q, a.heads, a.sq, query_rows)) return e;
  if (int e = make_boxes<T>(dout, a, a.dout, a.heads, a.sq, query_rows)) return e;
  if (int e = make_boxes<T>(k, a, a.k, a.kv_heads, a.sk, key_rows)) return e;
  if (int e = make_boxes<T>(v, a, a.v, a.kv_heads, a.sk, key_rows)) return e;
  return launch(over_keys ? attention_dq90_kernel<T, kDim> : attention_dkv90_kernel<T, kDim>,
                Shape{tiles * heads * a.batch, B::kThreads, B::kSharedBytes}, l, stream);
}
template <class T>
int launch_backward90(const Attention& a, Pass pass, void* stream) {
  return a.dim <= 64 ? launch_backward90<T, 64>(a, pass, stream) : launch_backward90<T, 128>(a, pass, stream);
}

}  // namespace pyfast::cuda
