// The forward of attention.cuh on sm_90a, 16-bit, D <= 128, where TMA can copy q, k and v: the scheme of
// FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608).
//
// A block takes 128 queries of one head (192 where D <= 64): warp groups of 64 queries multiply, and one more copies
// and gives them its registers. Tiles of 128 keys and of their values come by TMA, each kind in a ring of two stages
// with an mbarrier that its bytes end and one that the consumers' warps end; TMA pads D to 64 or 128 with zeros. Scores
// are a wgmma from shared memory, and the probabilities are the next one's operand in registers. The scores of the next
// tile and the sums of values of this one are in flight together, under the exponentials; and the warp groups issue
// their products in turns, so that one's exponentials run under the others' products.
//
// Shared memory: (128 + 4 x 128) x 128 elements, 160 KB (D <= 64: (192 + 4 x 128) x 64, 88 KB), one block to a
// processor. Registers of a thread: 64 scores, 32 of probabilities and D / 2 sums, of 240 (D <= 64: of 160).
//
// Bound: per 64 x 128 scores a processor's tensor cores take 8 D cycles (1,024 for D = 128), its special function units
// 512 for the exponentials, and each scheduler issues some 560 instructions (counted in SASS). D = 128 is bound by
// tensor cores as long as all of it overlaps, D = 64 by all three alike. Tiles of k and v ask L2 for 32 bytes a cycle
// (D <= 64: 21), which is what a block has so many queries for. Aim: 600 TFLOP/s, causal, D = 128, 16k. These are
// bounds on paper: it has not run on a GPU.
#pragma once
#include "cuda/attention.cuh"
#include "cuda/ring90.cuh"

namespace pyfast::cuda {

template <class T, int kDim>
struct Attention90 {
  static constexpr int kKeys = 128, kStages = 2, kGroups = kDim == 64 ? 3 : 2, kRows = 64 * kGroups;
  static constexpr int kConsumers = 128 * kGroups, kThreads = kConsumers + 128;
  static constexpr int kProducerRegisters = kGroups == 2 ? 24 : 32, kConsumerRegisters = kGroups == 2 ? 240 : 160;
  // rows of 128 bytes, 64 elements: D = 128 in two halves after each other
  static constexpr int kHalves = kDim / 64, kQueryHalf = kRows * 128, kKeyHalf = kKeys * 128;
  static constexpr int kQueryBytes = kHalves * kQueryHalf, kTileBytes = kHalves * kKeyHalf;
  using Tiles = Ring<kStages>;
  static constexpr int kBarriers = kQueryBytes + 2 * kStages * kTileBytes;
  static constexpr int kSharedBytes = kBarriers + 8 + 2 * Tiles::kBytes;
  static constexpr int kTurns = 1, kZeros = kTurns + kGroups;  // named barriers, of which 0 is the block's

  unsigned char* shared;

  __device__ __forceinline__ unsigned char* tile(int which, int n) const {  // 0: of keys, 1: of values
    return shared + kQueryBytes + (which * kStages + n % kStages) * kTileBytes;
  }
  __device__ __forceinline__ uint64_t* queries() const { return reinterpret_cast<uint64_t*>(shared + kBarriers); }
  __device__ __forceinline__ Tiles ring(int which) const { return {queries() + 1 + which * 2 * kStages}; }
};

// Boxes of rows and of 64 columns, in 4 dimensions: column, row, head, batch
struct Attention90Launch {
  TensorMap q, k, v;
  AttentionLaunch l;
};

template <class T, int kDim>
__global__ void __launch_bounds__(Attention90<T, kDim>::kThreads, 1)
    attention90_kernel(const __grid_constant__ Attention90Launch l90) {
#if defined(PYFAST_EMULATOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  PYFAST_SHARED(shared);
  using A = Attention90<T, kDim>;
  const AttentionLaunch& l = l90.l;
  const Attention& a = l.a;
  const A memory{shared};
  const Place p = locate(l, a.heads, a.cu_q, a.cu_k, a.sq, a.sk, A::kRows, true);
  if (p.first >= p.length) return;
  const int keys = p.other_length;
  const Range range(first_key(a, p, keys), behind_keys(a, p, keys, A::kRows), A::kKeys);
  const int begin = range.begin, tiles = range.tiles;
  const typename A::Tiles ring[2] = {memory.ring(0), memory.ring(1)};

  if (threadIdx.x == 0) {
    mbarrier_init(memory.queries(), 1);
    for (int which = 0; which < 2; ++which) ring[which].begin(A::kConsumers / 32);
    fence_mbarrier_init();
  }
  __syncthreads();

  if (threadIdx.x >= A::kConsumers) {
    give_registers<A::kProducerRegisters>();
    if (threadIdx.x != A::kConsumers || tiles == 0) return;
    const int kv_head = p.head / int(a.heads / a.kv_heads);
    const auto load = [&](const TensorMap& map, int which, int n) {
      uint64_t* const there = ring[which].fill(n, A::kTileBytes);
      const int row = p.other_begin + begin + n * A::kKeys;
      for (int h = 0; h < A::kHalves; ++h)
        tma_load<4>(memory.tile(which, n) + h * A::kKeyHalf, &map, there, {64 * h, row, kv_head, p.batch});
    };
    mbarrier_arrive_expect(memory.queries(), A::kQueryBytes);
    for (int h = 0; h < A::kHalves; ++h)
      tma_load<4>(shared + h * A::kQueryHalf, &l90.q, memory.queries(), {64 * h, p.begin + p.first, p.head, p.batch});
    load(l90.k, 0, 0);
    for (int n = 0; n < tiles; ++n) {
      if (n + 1 < tiles) load(l90.k, 0, n + 1);
      load(l90.v, 1, n);
    }
    return;
  }

  take_registers<A::kConsumerRegisters>();
  const int lane = threadIdx.x % 32, group = threadIdx.x / 128;
  const int first = p.first + 64 * group, warp_row = first + threadIdx.x / 32 % 4 * 16, row = warp_row + lane / 4;
  const Scores<false> scores(a, p.batch, p.head, p.begin, p.length, keys);
  const float to_log2 = a.scale * 1.44269504f;
  float maximum[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f};  // of products q k
  float s[A::kKeys / 8][4], acc[kDim / 8][4] = {};
  uint32_t probabilities[A::kKeys / 16][4];
  float (&s_registers)[A::kKeys / 2] = reinterpret_cast<float (&)[A::kKeys / 2]>(s);
  float (&acc_registers)[kDim / 2] = reinterpret_cast<float (&)[kDim / 2]>(acc);

  // Begins s = q k^T of tile n; keys there
  const auto begin_scores = [&](int n) {
    const unsigned char *const q = shared + group * 64 * 128, *const k = memory.tile(0, n);
    hold(s_registers);
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
      const uint64_t left = wgmma_descriptor(q + d / 4 * A::kQueryHalf + d % 4 * 32);
      const uint64_t right = wgmma_descriptor(k + d / 4 * A::kKeyHalf + d % 4 * 32);
      if (d == 0)
        wgmma<T, false, false>(s_registers, left, right);
      else
        wgmma<T>(s_registers, left, right);
    }
    wgmma_commit();
  };
  // Begins acc += p v of tile n
  const auto begin_values = [&](int n) {
    const unsigned char* const v = memory.tile(1, n);
    hold(reinterpret_cast<uint32_t (&)[A::kKeys / 4]>(probabilities));
    hold(acc_registers);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < A::kKeys / 16; ++k)
      wgmma<T, true>(acc_registers, probabilities[k], wgmma_descriptor(v + k * 16 * 128, A::kKeyHalf));
    wgmma_commit();
  };
  // s becomes exp(score - maximum); what came before it is to be multiplied with `rescale`
  const auto exponentials = [&](int n, float (&rescale)[2]) {
    const int at = begin + n * A::kKeys;
    if (!scores.all_visible(first, first + 64, at, at + A::kKeys))
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Keys seen = scores.seen_by(row + 8 * h);
        const int column = at + lane % 4 * 2 - seen.first;
#pragma unroll
        for (int j = 0; j < A::kKeys / 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (uint32_t(column + 8 * j + e) >= uint32_t(seen.count)) s[j][2 * h + e] = -INFINITY;
      }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float largest = maximum[h];
#pragma unroll
      for (int j = 0; j < A::kKeys / 8; ++j) largest = fmaxf(largest, fmaxf(s[j][2 * h], s[j][2 * h + 1]));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
      const float base = largest == -INFINITY ? 0.f : largest * to_log2;
      rescale[h] = exp2_approx(fmaf(maximum[h], to_log2, -base));
      maximum[h] = largest;
      total[h] *= rescale[h];
#pragma unroll
      for (int j = 0; j < A::kKeys / 8; ++j)
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) {
          s[j][e] = exp2_approx(fmaf(s[j][e], to_log2, -base));
          total[h] += s[j][e];
        }
    }
  };
  const auto make_operand = [&] {
#pragma unroll
    for (int k = 0; k < A::kKeys / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        probabilities[k][i] = pack<T>(s[2 * k + i / 2][i % 2 * 2], s[2 * k + i / 2][i % 2 * 2 + 1]);
  };

  if (tiles > 0) {
    float rescale[2];
    mbarrier_wait(memory.queries(), 0);
    ring[0].wait(0);
    begin_scores(0);
    wgmma_wait<0>();
    hold(s_registers);
    ring[0].release(0);
    exponentials(0, rescale);
    make_operand();
    for (int n = 1; n < tiles; ++n) {
      ring[0].wait(n);
      ring[1].wait(n - 1);
      if (group > 0 || n > 1) named_barrier(A::kTurns + group, 256);
      begin_scores(n);
      begin_values(n - 1);
      if (group < A::kGroups - 1 || n < tiles - 1) named_barrier_arrive(A::kTurns + (group + 1) % A::kGroups, 256);
      wgmma_wait<1>();
      hold(s_registers);
      ring[0].release(n);
      exponentials(n, rescale);
      wgmma_wait<0>();
      hold(acc_registers);
      ring[1].release(n - 1);
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[j][e] *= rescale[e / 2];
      make_operand();
    }
    ring[1].wait(tiles - 1);
    if (const int left = keys - begin - (tiles - 1) * A::kKeys; a.cu_k && left < A::kKeys) {
      // The rows of the next sequence are nobody's here: their probabilities are 0, but they may hold what 0 times is
      // not 0.
      unsigned char* const v = memory.tile(1, tiles - 1);
      for (int i = left * 8 + threadIdx.x; i < A::kKeys * 8; i += A::kConsumers)
        for (int h = 0; h < A::kHalves; ++h) *reinterpret_cast<Vector*>(v + h * A::kKeyHalf + i * 16) = Vector{};
      fence_async();
      named_barrier(A::kZeros, A::kConsumers);
    }
    begin_values(tiles - 1);
    wgmma_wait<0>();
    hold(acc_registers);
  }

#pragma unroll
  for (int h = 0; h < 2; ++h) maximum[h] *= a.scale;
  float factor[2];
  end_rows<T>(a, p, scores.row, row, maximum, total, factor);
  store_rows(acc, factor, row_of<T>(a.out, p.batch, p.head, p.begin), a.out.row, warp_row, p.length, 0, a.dim,
             a.out.aligned);
#endif
}

// Whether the kernels for sm_90a can compute what is asked for. They mask raw products, so that the scale is positive.
inline bool attention90_serves(const Attention& a, Pass pass) {
  const auto boxes_serve = [&](const Heads& x, int64_t heads, int64_t rows) {
    const auto apart = [&](int64_t size, int64_t stride) { return size == 1 || stride >= a.dim; };
    return x.aligned && apart(a.batch, x.batch) && apart(heads, x.head) && apart(rows, x.row);
  };
  return a.dtype != DType::fp32 && a.dim <= 128 && a.scale > 1e-30f && a.softcap == 0.f && !a.mask && !a.bias &&
         !a.seed && a.batch > 0 && a.sq > 0 && a.sk > 0 && boxes_serve(a.q, a.heads, a.sq) &&
         boxes_serve(a.k, a.kv_heads, a.sk) && boxes_serve(a.v, a.kv_heads, a.sk) &&
         (pass == Pass::forward || boxes_serve(a.dout, a.heads, a.sq));
}

template <class T>
int make_boxes(TensorMap& map, const Attention& a, const Heads& x, int64_t heads, int64_t rows, int box_rows) {
  // a dimension of one element may have any stride: the driver gets one that suits it
  const auto pitch = [&](int64_t size, int64_t stride) { return size == 1 ? int64_t(a.dim + 7) / 8 * 16 : stride * 2; };
  return make_tensor_map<4>(map, a.dtype, x.data, {a.dim, rows, heads, a.batch},
                            {2, pitch(rows, x.row), pitch(heads, x.head), pitch(a.batch, x.batch)},
                            {64, box_rows, 1, 1});
}
template <class T, int kDim>
int launch_attention90(const Attention& a, void* stream) {
  using A = Attention90<T, kDim>;
  const int64_t tiles = a.cu_q ? a.sq / A::kRows + a.sequences + 1 : (a.sq + A::kRows - 1) / A::kRows;
  Attention90Launch l{{}, {}, {}, {a, tiles}};
  if (int e = make_boxes<T>(l.q, a, a.q, a.heads, a.sq, A::kRows)) return e;
  if (int e = make_boxes<T>(l.k, a, a.k, a.kv_heads, a.sk, A::kKeys)) return e;
  if (int e = make_boxes<T>(l.v, a, a.v, a.kv_heads, a.sk, A::kKeys)) return e;
  return launch(attention90_kernel<T, kDim>, Shape{tiles * a.heads * a.batch, A::kThreads, A::kSharedBytes}, l, stream);
}
template <class T>
int launch_attention90(const Attention& a, void* stream) {
  return a.dim <= 64 ? launch_attention90<T, 64>(a, stream) : launch_attention90<T, 128>(a, stream);
}

int attention90_bf16(const Attention& a, Pass pass, void* stream);
int attention90_fp16(const Attention& a, Pass pass, void* stream);

}  // namespace pyfast::cuda
