// Softmax cross-entropy of rows of logits, and its gradient: each row is read once and its gradient written once.
//
//   loss = (1 - e) w_y (lse - z_y) + e / V sum_c w_c (lse - z_c)
//   dz_c = (a ((1 - e) w_y + e / V sum w) + 2 b lse) p_c - a e / V w_c - a (1 - e) w_y [c = y]
//
// with smoothing e, class weights w, target y, and upstream gradients a of the loss and b of lse^2.
//
// Tiling: a row per block, or per cluster of blocks. A thread takes every n-th chunk of 16 bytes, four loads in flight,
// and keeps a running maximum m and sum of exp(x - m) (Milakov and Gimelshein 2018, "Online normalizer calculation for
// softmax"); warps and blocks join theirs. Rows that do not begin at a multiple of 16 bytes have a first chunk that is
// not whole. For the gradient the chunks stay in shared memory, where only the thread that put them there reads them.
//
// Shared memory: the block's part of the row, and 560 bytes. A row that fits in no block is split over a cluster of up
// to 8 (sm_90: 227 KB each, so 900,000 16-bit logits); before sm_90 it is read a second time, mostly from L2.
//
// Bound: memory. 2 bytes read and 2 written per 16-bit logit; with them go two exp2 and some 15 FMA, an eighth of what
// an H100 does in that time at 3.0 TB/s. Aim: 95 % of the bandwidth of a copy. Without a GPU this is a bound on paper.
#pragma once
#include "cuda/cross_entropy.h"
#include "cuda/ptx.cuh"

namespace pyfast::cuda {

constexpr int kLossThreads = 512;  // at most
constexpr int kLossUnroll = 4;     // loads in flight per thread

struct CrossEntropyLaunch {
  CrossEntropy a;
  int64_t chunks_per_block;
  int cluster;
  bool resident;  // the block's part of the row stays in shared memory
};

// What is known of some of a row's logits x: their largest m, the sum of exp(x - m), the sum of w (x - m) and of w
struct alignas(16) Softmax {
  float max, sum, below, weights;

  static __device__ __forceinline__ Softmax none() { return {-INFINITY, 0.f, 0.f, 0.f}; }

  // Makes `larger` what sum and below are relative to; returns it, or 0 where every logit so far is -inf
  template <class Exp>
  __device__ __forceinline__ float raise(float larger, Exp exp) {
    const float shift = larger == -INFINITY ? 0.f : larger;
    sum *= exp(max - shift);
    if (weights != 0.f) below += weights * (max - shift);
    max = larger;
    return shift;
  }
  template <class Exp>
  __device__ __forceinline__ void join(Softmax other, Exp exp) {
    const float larger = fmaxf(max, other.max);
    raise(larger, exp);
    other.raise(larger, exp);
    sum += other.sum, below += other.below, weights += other.weights;
  }
};

// What the gradient of a row needs: dx = factor exp(x - max) - soft w, and target at the target
struct alignas(16) RowGradient {
  float max, factor, soft, target;
};

// The logits of a row, in chunks of 16 bytes: chunk c holds elements first(c) to first(c) + kCount - 1, some of which
// may lie before the row's begin or after its end.
template <class T>
struct Row {
  static constexpr int kCount = 16 / sizeof(T);
  const T* x;
  int64_t classes;
  int lead;  // elements from the last multiple of 16 bytes to the row's begin

  __device__ Row(const void* data, int64_t at, int64_t classes)
      : x(static_cast<const T*>(data) + at),
        classes(classes),
        lead(int(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T))) {}
  __device__ int64_t chunks() const { return (classes + lead + kCount - 1) / kCount; }
  __device__ int64_t first(int64_t chunk) const { return chunk * kCount - lead; }
  __device__ bool whole(int64_t first) const { return first >= 0 && first + kCount <= classes; }

  __device__ __forceinline__ Vector load(int64_t chunk) const {
    const int64_t begin = first(chunk);
    if (whole(begin)) return load_global(x + begin);
    T elements[kCount];
    for (int i = 0; i < kCount; ++i)
      elements[i] = begin + i >= 0 && begin + i < classes ? x[begin + i] : from_float<T>(-INFINITY);
    Vector v;
    memcpy(&v, elements, 16);
    return v;
  }
};

template <class T, bool kGeneral, bool kGradient>
__global__ void __launch_bounds__(kLossThreads) cross_entropy_kernel(const __grid_constant__ CrossEntropyLaunch l) {
  PYFAST_SHARED(shared);
  // exp of the difference to a row's maximum; for fp32 to the last bits
  const auto exp = [](float x) {
    if constexpr (sizeof(T) == 4) return expf(x);
    return exp2_approx(x * 1.44269504f);
  };
  const auto capped = [&](float x) { return kGeneral && l.a.softcap > 0.f ? l.a.softcap * tanhf(x / l.a.softcap) : x; };
  const CrossEntropy& a = l.a;
  const int tid = threadIdx.x, threads = blockDim.x, lane = tid % 32, warp = tid / 32, warps = threads / 32;
  const int64_t row = blockIdx.x / l.cluster;
  const int rank = blockIdx.x % l.cluster;
  const Row<T> x(a.input, row * a.stride, a.classes);
  T* const dx = static_cast<T*>(a.dinput) + row * a.classes;
  const bool aligned_alike = reinterpret_cast<uintptr_t>(dx) % 16 == x.lead * sizeof(T);
  const int64_t begin = rank * l.chunks_per_block, rest = x.chunks() - begin;
  const int64_t end = begin + (rest < l.chunks_per_block ? rest : l.chunks_per_block);
  constexpr int N = Row<T>::kCount;

  const auto store = [&](int64_t chunk, const float (&values)[N]) {
    T elements[N];
#pragma unroll
    for (int i = 0; i < N; ++i) elements[i] = from_float<T>(values[i]);
    const int64_t first = x.first(chunk);
    if (aligned_alike && x.whole(first)) {
      Vector v;
      memcpy(&v, elements, 16);
      store_global(dx + first, v);
      return;
    }
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (first + i >= 0 && first + i < a.classes) dx[first + i] = elements[i];
  };

  const int64_t target = a.target[row];
  if (target == a.ignore_index) {
    if (tid == 0 && rank == 0) a.loss[row] = a.lse[row] = 0.0;
    if constexpr (kGradient) {
      const float zeros[N] = {};
      for (int64_t c = begin + tid; c < end; c += threads) store(c, zeros);
    }
    return;
  }

  auto* const states = reinterpret_cast<Softmax*>(shared);  // of the warps, then of the block, then its gradient
  auto* const block_state = states + kLossThreads / 32;
  auto* const gradient = reinterpret_cast<RowGradient*>(block_state + 1);
  auto* const kept = reinterpret_cast<Vector*>(gradient + 1);

  Softmax state = Softmax::none();
  for (int64_t c = begin + tid; c < end; c += int64_t(threads) * kLossUnroll) {
    Vector v[kLossUnroll];
#pragma unroll
    for (int u = 0; u < kLossUnroll; ++u)
      if (c + u * threads < end) v[u] = x.load(c + u * threads);
#pragma unroll
    for (int u = 0; u < kLossUnroll; ++u) {
      const int64_t chunk = c + u * threads;
      if (chunk >= end) break;
      if (kGradient && l.resident) kept[chunk - begin] = v[u];
      T elements[N];
      memcpy(elements, &v[u], 16);
      float z[N], largest = state.max;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        z[i] = capped(to_float(elements[i]));
        if (kGeneral && (x.first(chunk) + i < 0 || x.first(chunk) + i >= a.classes)) z[i] = -INFINITY;
        largest = fmaxf(largest, z[i]);
      }
      const float shift = state.raise(largest, exp);
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < N; ++i) sum += exp(z[i] - shift);
      state.sum += sum;
      if (kGeneral && a.label_smoothing > 0.0) {
        for (int i = 0; i < N; ++i) {
          const int64_t at = x.first(chunk) + i;
          if (at < 0 || at >= a.classes) continue;
          const float w = a.weight ? a.weight[at] : 1.f;
          state.below += w * (z[i] - shift);
          state.weights += w;
        }
      }
    }
  }

  const auto join_lanes = [&] {
#pragma unroll
    for (int by = 16; by; by /= 2) {
      Softmax other;
      other.max = __shfl_xor_sync(~0u, state.max, by);
      other.sum = __shfl_xor_sync(~0u, state.sum, by);
      other.below = __shfl_xor_sync(~0u, state.below, by);
      other.weights = __shfl_xor_sync(~0u, state.weights, by);
      state.join(other, exp);
    }
  };
  join_lanes();
  if (lane == 0) states[warp] = state;
  __syncthreads();
  state = lane < warps ? states[lane] : Softmax::none();
  join_lanes();
#if defined(PYFAST_CLUSTERS)
  if (l.cluster > 1) {
    if (tid == 0) *block_state = state;
    cluster_barrier();
    state = Softmax::none();
    for (int r = 0; r < l.cluster; ++r) {
      const Vector v = load_cluster(block_state, r);
      Softmax other;
      memcpy(&other, &v, 16);
      state.join(other, exp);
    }
    cluster_barrier();  // no block exits while another reads its memory
  }
#endif

  if (tid == 0) {  // a row's own few scalars are doubles
    const bool inside = target >= 0 && target < a.classes;
    const float x_target = inside ? capped(to_float(x.x[target])) : NAN;
    const double e = a.label_smoothing, w = a.weight && inside ? a.weight[target] : 1.0;
    const float shift = state.max == -INFINITY ? 0.f : state.max;
    // the two terms of lse = max + log_sum are kept apart: lse - x keeps its digits under a large max
    const double log_sum = log(double(state.sum)), lse = state.max + log_sum;
    const double below_target = double(state.max) - x_target;
    double loss = (1.0 - e) * w * (below_target + log_sum);
    if (kGeneral && e > 0.0) loss += e / double(a.classes) * (state.weights * log_sum - state.below);
    if (rank == 0) {
      a.loss[row] = loss;
      a.lse[row] = lse;
    }
    if constexpr (kGradient) {
      const double da = a.upstream[2 * row], hard = da * (1.0 - e) * w, soft = da * (e / double(a.classes));
      double square = 2.0 * a.upstream[2 * row + 1] * lse + 0.0 * x_target;  // NaN for a target out of range
      const double p = ::exp(double(x_target) - shift) / state.sum;
      gradient->max = shift;
      gradient->factor = float((hard + soft * state.weights + square) / state.sum);
      gradient->soft = float(soft);
      gradient->target = float(hard * (p - 1.0) + square * p + soft * (state.weights * p - w));
    }
  }
  if constexpr (kGradient) {
    __syncthreads();
    const RowGradient g = *gradient;
    for (int64_t c = begin + tid; c < end; c += threads) {
      const Vector v = l.resident ? kept[c - begin] : x.load(c);
      T elements[N];
      memcpy(elements, &v, 16);
      float d[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int64_t at = x.first(c) + i;
        float z = to_float(elements[i]), slope = 1.f;
        if (kGeneral && a.softcap > 0.f) {
          const float t = tanhf(z / a.softcap);
          slope = (1.f - t) * (1.f + t);
          z = a.softcap * t;
        }
        d[i] = g.factor * exp(z - g.max);
        if (kGeneral && a.label_smoothing > 0.0 && at >= 0 && at < a.classes)
          d[i] -= a.weight ? g.soft * a.weight[at] : g.soft;
        if (at == target) d[i] = g.target;
        if (kGeneral) d[i] *= slope;
      }
      store(c, d);
    }
  }
}

template <class T>
int launch_cross_entropy(const CrossEntropy& a, void* stream) {
  if (a.rows == 0) return 0;
  Device device;
  if (int e = get_device(device)) return e;
  constexpr int kFixed = (kLossThreads / 32 + 2) * 16;
  constexpr int kCount = 16 / sizeof(T);
  const int64_t chunks = (a.classes + 2 * kCount - 2) / kCount, room = (device.shared_bytes - kFixed) / 16;
  CrossEntropyLaunch l{a, chunks, 1, true};
  Shape shape{a.rows, kLossThreads, kFixed};
  if (a.upstream) {
    // beyond 64 KB a block's part of a row leaves too few blocks per processor to hide the loads' latency
    while (device.architecture >= 90 && l.cluster < 8 && l.chunks_per_block > (64 << 10) / 16) {
      l.cluster *= 2;
      l.chunks_per_block = (chunks + l.cluster - 1) / l.cluster;
    }
    l.resident = l.chunks_per_block <= room;
    if (!l.resident) l.cluster = 1, l.chunks_per_block = chunks;
    if (l.resident) shape.shared_bytes += int(l.chunks_per_block) * 16;
  }
  const int64_t wanted = (l.chunks_per_block + kLossUnroll - 1) / kLossUnroll;
  if (wanted < kLossThreads) shape.threads = int(wanted + 31) / 32 * 32;
  shape.blocks = a.rows * l.cluster, shape.cluster = l.cluster;
  const bool general = a.softcap > 0.f || a.label_smoothing > 0.0;
  const auto kernel = general
                          ? (a.upstream ? cross_entropy_kernel<T, true, true> : cross_entropy_kernel<T, true, false>)
                          : (a.upstream ? cross_entropy_kernel<T, false, true> : cross_entropy_kernel<T, false, false>);
  return launch(kernel, shape, l, stream);
}

}  // namespace pyfast::cuda
