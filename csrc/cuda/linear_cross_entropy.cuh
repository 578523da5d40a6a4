// A language model's head and its loss, without its logits z = softcap((x W^T + bias + s (x A^T) B^T) scale).
//
// Rows that count are listed first, in order; their number stays on the GPU. Then, for as many rows at a time as the
// memory holds (logits_bytes, 168 MB):
//   1. h = s x A^T                          where the head has an adapter, which is `rank` more terms of the next sum
//   2. x W^T + h B^T, rows gathered         its epilogue leaves of each row, in each tile of classes, the largest logit
//                                           m_t and sum exp(z - m_t), the target's logit, and e = exp(z - m_t) in T
//   3. a row's tiles become its loss, and factors of its gradient
//   4. d = gradient of x W^T, in e's place: f exp(m_t - m) e - smoothing, and another value at the target
//   5. dh = s d B, dx = d W + dh A (rows scattered), dW += d^T x, dbias += sum d, dA += dh^T x, dB += d^T h:
//      what is needed of them
// Without gradients 2 leaves no e, and 4 and 5 fall away; a frozen head needs two products, 2 and dx. Exponentials in
// the epilogue are QuACK's idea, the gradient in the forward Liger-Kernel's. With softcap, whose slope needs them, the
// logits themselves are kept, in fp32. Nothing is added atomically: the same inputs give the same bits.
//
// The products are our own because cuBLAS cannot stop at a number that only the GPU knows. On sm_90a the two large ones
// of a frozen head are gemm90.cuh's where TMA can copy W (and B and A), x's rows having been gathered by a copy; dW is
// gemm.cuh's. Tiling and shared memory are theirs; the other kernels need 8 KB or less.
// Bound: two products, 4 rows V K FLOP. 8,192 rows of K = 4,096 and V = 128,256 are 17 TFLOP: 22 ms at the 800 TFLOP/s
// of an H100's wgmma, 43 ms at the 400 that mma.sync may reach there, 86 ms at 200 on an A100. 3 and 4 read e and write
// d in its place, 4 rows V bytes (4.2 GB, 1.4 ms at 3.0 TB/s): 1.06, 1.03 and 1.03 times the two products (A100: 1.5
// TB/s). A chunk of 512 rows there makes 2,004 tiles of logits (15.2 for each of 132 processors) and 64 of dx (14 of
// 896 features), whose sums are split, so that blocks are 128 (126): another 1.04, and 11 us of a chunk's 1.4 ms to add
// them. A trained head adds a product, and 8 V K bytes for each chunk. These are bounds on paper.
#pragma once
#include "cuda/gemm90.cuh"
#include "cuda/linear_cross_entropy.h"
#include "cuda/math.cuh"

namespace pyfast::cuda {

constexpr int kHeadThreads = 256;  // of all but the products
constexpr int kRowsOfBlock = 8;    // in step 3
constexpr int kBlocksOfDx = 128;   // that a chunk's dx has about, where its sums must be split for it

// What a row's gradient needs: d = factor exp(z - max) - soft w, and `target` at the target; the logits' scale in them
struct alignas(16) LogitGradient {
  float max, factor, soft, target;
};
struct alignas(8) TileState {
  float max, sum;  // the sum of exp(z - max)
};
struct alignas(8) TileSmoothing {
  float below, weights;  // the sums of w (z - max) and of w
};

// How memory is laid out, and what the kernels share
struct HeadLaunch {
  LinearCrossEntropy a;
  int64_t chunk, begin;           // rows at a time; the first that is in the memory now, among those that count
  int64_t tiles, ld, ld_h, ld_x;  // tiles of classes; elements from one row of e and d to the next, of h and of x
  int class_tile, splits;
  bool hopper;  // the logits by wgmma, for which rows of x are gathered by a kernel of its own

  template <class T>
  static int make(HeadLaunch& l, const LinearCrossEntropy& a) {
    using G = Gemm<T, false, false>;
    using G90 = Gemm90<bf16, false>;
    Device device;
    if (int e = get_device(device)) return e;
    l = HeadLaunch{a, 0, 0, 0, 0, 0, 0, 0, 1, false};
    const auto serves = [](const Matrix& m, int64_t columns) {
      return box_serves(Operand(static_cast<const T*>(m.data), m.row, m.column), columns);
    };
    l.hopper = sizeof(T) == 2 && device.architecture == 90 && a.features > 0 && serves(a.weight, a.features) &&
               (a.rank == 0 || serves(a.lora_B, a.rank));
    l.class_tile = l.hopper ? G90::kPart : G::kPart;
    l.tiles = (a.classes + l.class_tile - 1) / l.class_tile;
    l.ld = (a.classes + 7) / 8 * 8, l.ld_h = (a.rank + 7) / 8 * 8, l.ld_x = (a.features + 7) / 8 * 8;
    int64_t row_bytes = 16 * l.tiles;
    if (a.upstream) row_bytes += l.ld * (l.kept_size() + (l.in_place() ? 0 : int64_t(sizeof(T))));
    l.chunk = a.logits_bytes / row_bytes;
    const int64_t block = l.hopper ? G90::kBlock : G::kBlock;
    if (l.chunk > block) l.chunk = l.chunk / block * block;
    if (l.chunk < 16) l.chunk = 16;
    if (l.chunk > a.rows) l.chunk = a.rows;
    return 0;
  }
  // The sums of a narrow product are split, so that it has blocks enough
  template <class T>
  static int splits_of(int64_t depth) {
    const int64_t steps = (depth + Gemm<T, false, false>::kDepth - 1) / Gemm<T, false, false>::kDepth;
    return steps > 512 ? 64 : steps < 1 ? 1 : int((steps + 7) / 8);
  }
  // So is that of dx, which has few blocks where a chunk or the features are few. The number is that of no GPU, so that
  // the same sums give the same bits on all.
  template <class T>
  int splits_of_dx() const {
    const int64_t rows = hopper ? Gemm90<bf16, true>::kBlock : Gemm<T, false, false>::kBlock;
    const int64_t columns = hopper ? Gemm90<bf16, true>::kColumnsOfBlock : rows;
    const int64_t blocks = (chunk + rows - 1) / rows * ((a.features + columns - 1) / columns);
    const int64_t most = splits_of<T>(a.classes), splits = kBlocksOfDx / (blocks ? blocks : 1);
    return splits < 1 ? 1 : int(splits < most ? splits : most);
  }
  template <class T>
  void sizes(int64_t (&bytes)[kMemories]) const {
    const bool gradient = a.upstream;
    const int64_t longest = gradient && a.classes > a.features ? a.classes : a.features;
    const auto set = [&](Memory m, int64_t size) { bytes[int(m)] = size; };
    set(Memory::index, a.rows * 8);
    set(Memory::counted, 8);
    set(Memory::x, hopper ? chunk * ld_x * int64_t(sizeof(T)) : 0);
    set(Memory::kept, gradient ? chunk * ld * kept_size() : 0);
    set(Memory::d, gradient && !in_place() ? chunk * ld * int64_t(sizeof(T)) : 0);
    set(Memory::states, chunk * tiles * int64_t(sizeof(TileState)));
    set(Memory::below, a.label_smoothing > 0.0 ? chunk * tiles * int64_t(sizeof(TileSmoothing)) : 0);
    set(Memory::target_logit, chunk * 4);
    set(Memory::rows, gradient ? chunk * int64_t(sizeof(LogitGradient)) : 0);
    set(Memory::h, chunk * ld_h * int64_t(sizeof(T)));
    set(Memory::dh, gradient ? chunk * ld_h * int64_t(sizeof(T)) : 0);
    const int64_t narrow = splits_of<T>(longest) * chunk * a.rank * 4;
    const int64_t of_dx = a.dinput && splits_of_dx<T>() > 1 ? splits_of_dx<T>() * chunk * a.features * 4 : 0;
    set(Memory::parts, narrow < of_dx ? of_dx : narrow);
  }
  int64_t kept_size() const { return a.softcap > 0.f || a.dtype == DType::fp32 ? 4 : 2; }
  bool in_place() const { return a.softcap == 0.f || a.dtype == DType::fp32; }

  template <class To>
  __host__ __device__ To* at(Memory m) const {
    return static_cast<To*>(a.memory[int(m)]);
  }
  __host__ __device__ const int64_t* index() const { return at<int64_t>(Memory::index) + begin; }
  template <class T>
  __host__ __device__ T* d() const {
    return at<T>(a.softcap == 0.f || sizeof(T) == 4 ? Memory::kept : Memory::d);
  }
  __device__ int64_t here() const {
    const int64_t left = *at<int64_t>(Memory::counted) - begin;
    return left < 0 ? 0 : left < chunk ? left : chunk;
  }
};

// ---- step 2

struct LogitsLaunch {
  Product p;
  HeadLaunch l;
};

// What becomes of a thread's part of x W^T + h B^T
template <class T, bool kGeneral, class G>
__device__ __forceinline__ void finish_logits(const G& gemm, typename G::Sums& z, const HeadLaunch& l) {
  const LinearCrossEntropy& a = l.a;
  // of this thread's columns, first + 8 j + e: `left` of them are classes, and for `room` there is memory
  const int64_t first = gemm.column_of(0, 0);
  const auto up_to = [&](int64_t end) { return end - first < G::kPart ? int(end - first) : G::kPart; };
  const int left = up_to(a.classes), room = up_to(l.ld);
#pragma unroll
  for (int j = 0; j < G::kColumns; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const bool inside = 8 * j + e < left;
      float bias = 0.f;
      if (a.bias && inside) bias = to_float(static_cast<const T*>(a.bias)[(first + 8 * j + e) * a.bias_stride]);
#pragma unroll
      for (int i = 0; i < 2 * G::kRows; ++i) {
        float& x = z[i / 2][j][i % 2 * 2 + e];
        x = (x + bias) * a.logit_scale;
        if (kGeneral && a.softcap > 0.f) x = a.softcap * called_tanh(x / a.softcap);
        if (!inside) x = -INFINITY;
      }
    }

  const int64_t tile = (gemm.column + gemm.warp_column) / G::kPart;
#pragma unroll
  for (int i = 0; i < G::kRows; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t r = gemm.row_of(i, 2 * h);
      const bool counts = r < gemm.m;
      const int64_t from_first = counts ? a.target[l.index()[r]] - first : -1;
      const int target = from_first >= 0 && from_first < left ? int(from_first) : -1;
      float largest = -INFINITY;
#pragma unroll
      for (int j = 0; j < G::kColumns; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          largest = fmaxf(largest, z[i][j][2 * h + e]);
          if (8 * j + e == target) l.at<float>(Memory::target_logit)[r] = z[i][j][2 * h + e];
        }
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
      const float shift = largest == -INFINITY ? 0.f : largest;
      TileState state{largest, 0.f};
      TileSmoothing smoothing{0.f, 0.f};
      const bool logits = kGeneral && a.softcap > 0.f;
      const int64_t to = r * l.ld + first;
#pragma unroll
      for (int j = 0; j < G::kColumns; ++j) {
        float kept[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float x = z[i][j][2 * h + e];
          kept[e] = exponential<T>(x - shift);
          state.sum += kept[e];
          if (logits) kept[e] = x;
          if (kGeneral && a.label_smoothing > 0.0 && 8 * j + e < left) {
            const float w = a.class_weight ? a.class_weight[first + 8 * j + e] : 1.f;
            smoothing.weights += w;
            if (w != 0.f) smoothing.below += w * (x - shift);
          }
        }
        if (!a.upstream || !counts || 8 * j >= room) continue;
        if (sizeof(T) == 4 || logits) {
          *reinterpret_cast<Pair*>(l.at<float>(Memory::kept) + to + 8 * j) = {kept[0], kept[1]};
        } else if constexpr (sizeof(T) == 2) {
          *reinterpret_cast<uint32_t*>(l.at<T>(Memory::kept) + to + 8 * j) = pack<T>(kept[0], kept[1]);
        }
      }
#pragma unroll
      for (int by = 1; by <= 2; by *= 2) {
        state.sum += __shfl_xor_sync(~0u, state.sum, by);
        if (kGeneral) {
          smoothing.below += __shfl_xor_sync(~0u, smoothing.below, by);
          smoothing.weights += __shfl_xor_sync(~0u, smoothing.weights, by);
        }
      }
      if (gemm.lane % 4 == 0 && counts && tile < l.tiles) {
        l.at<TileState>(Memory::states)[tile * l.chunk + r] = state;
        if (kGeneral && a.label_smoothing > 0.0) l.at<TileSmoothing>(Memory::below)[tile * l.chunk + r] = smoothing;
      }
    }
}

template <class T, bool kBDeep, bool kGeneral>
__global__ void __launch_bounds__(Gemm<T, false, kBDeep>::kThreads)
    logits_kernel(const __grid_constant__ LogitsLaunch l) {
  PYFAST_SHARED(shared);
  using G = Gemm<T, false, kBDeep>;
  const G gemm(l.p);
  if (gemm.empty()) return;
  typename G::Sums z = {};
  gemm.run(l.p, shared, z);
  finish_logits<T, kGeneral>(gemm, z, l.l);
}

struct Logits90Launch {
  Boxes boxes;
  LogitsLaunch logits;
};
template <class T, bool kGeneral>
__global__ void __launch_bounds__(Gemm90<T, false>::kThreads, 1)
    logits90_kernel(const __grid_constant__ Logits90Launch l) {
#if defined(PYFAST_EMULATOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  PYFAST_SHARED(shared);
  using G = Gemm90<T, false>;
  const G gemm(l.logits.p);
  if (gemm.empty()) return;
  gemm.start(shared);
  if (G::produces()) return gemm.produce(l.logits.p, l.boxes, shared);
  typename G::Sums z = {};
  gemm.multiply(shared, z);
  finish_logits<T, kGeneral>(gemm, z, l.logits.l);
#endif
}

// Rows of x that count, one after the other
template <class T>
__global__ void __launch_bounds__(kHeadThreads) gather_kernel(const __grid_constant__ HeadLaunch l) {
  const int64_t r = blockIdx.x, columns = l.a.features;
  if (r >= l.here()) return;
  const T* const from = static_cast<const T*>(l.a.input) + l.index()[r] * columns;
  T* const to = l.at<T>(Memory::x) + r * l.ld_x;
  if (columns % 8 == 0 && reinterpret_cast<uintptr_t>(l.a.input) % 16 == 0) {
    for (int64_t c = threadIdx.x * 8; c < columns; c += kHeadThreads * 8) {
      const Vector v = load_global(from + c);
      memcpy(to + c, &v, sizeof v);
    }
  } else {
    for (int64_t c = threadIdx.x; c < columns; c += kHeadThreads) to[c] = from[c];
  }
}

// ---- step 4: a thread has 8 logits

template <class T>
__global__ void __launch_bounds__(kHeadThreads) logits_gradient_kernel(const __grid_constant__ HeadLaunch l) {
  const LinearCrossEntropy& a = l.a;
  const int64_t blocks_per_row = (l.ld / 8 + kHeadThreads - 1) / kHeadThreads;
  const int64_t r = blockIdx.x / blocks_per_row;
  const int64_t first = (blockIdx.x % blocks_per_row * kHeadThreads + threadIdx.x) * 8;
  if (r >= l.here() || first >= l.ld) return;
  const LogitGradient g = l.at<LogitGradient>(Memory::rows)[r];
  const int64_t target = a.target[l.index()[r]];
  const bool capped = a.softcap > 0.f;
  T* const to = l.d<T>() + r * l.ld + first;
  float kept[8], d[8];
  if (capped || sizeof(T) == 4) {
    memcpy(kept, reinterpret_cast<const Vector*>(l.at<float>(Memory::kept) + r * l.ld + first), sizeof kept);
  } else {
    T elements[8];
    const Vector v = *reinterpret_cast<const Vector*>(to);
    memcpy(elements, &v, sizeof v);
#pragma unroll
    for (int i = 0; i < 8; ++i) kept[i] = to_float(elements[i]);
  }
  float factor = g.factor;
  if (!capped) factor *= expf(l.at<TileState>(Memory::states)[first / l.class_tile * l.chunk + r].max - g.max);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float slope = 1.f, e = kept[i];
    if (capped) {
      const float t = e / a.softcap;
      slope = (1.f - t) * (1.f + t);
      e = exponential<T>(e - g.max);
    }
    d[i] = factor * e;
    if (a.label_smoothing > 0.0 && first + i < a.classes)
      d[i] -= a.class_weight ? g.soft * a.class_weight[first + i] : g.soft;
    if (first + i == target) d[i] = g.target;
    d[i] *= slope;
  }
  constexpr int kVectors = sizeof(T) / 2;
  T elements[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) elements[i] = from_float<T>(d[i]);
  Vector v[kVectors];
  memcpy(v, elements, sizeof v);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) reinterpret_cast<Vector*>(to)[i] = v[i];
}

// ---- step 5: the sums of d's columns, 8 columns to a thread; a warp takes every 8th row

template <class T>
__global__ void __launch_bounds__(kHeadThreads) head_bias_kernel(const __grid_constant__ HeadLaunch l) {
  PYFAST_SHARED(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first = (blockIdx.x * int64_t(32) + lane) * 8, rows = l.here();
  float sum[8] = {};
  if (first < l.ld)
    for (int64_t r = warp; r < rows; r += kHeadThreads / 32) {
      T elements[8];
      memcpy(elements, reinterpret_cast<const Vector*>(l.d<T>() + r * l.ld + first), sizeof elements);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] += to_float(elements[i]);
    }
  float* const sums = reinterpret_cast<float*>(shared);  // (warps, 256 columns)
#pragma unroll
  for (int i = 0; i < 8; ++i) sums[warp * 256 + lane * 8 + i] = sum[i];
  __syncthreads();
  const int64_t c = blockIdx.x * int64_t(256) + threadIdx.x;
  if (c >= l.a.classes) return;
  float total = l.begin ? l.a.dbias[c] : 0.f;
  for (int w = 0; w < kHeadThreads / 32; ++w) total += sums[w * 256 + threadIdx.x];
  l.a.dbias[c] = total;
}

// The parts of a product (splits, chunk, columns) added, times scale, to T
struct JoinLaunch {
  HeadLaunch l;
  int64_t columns;
  float scale;
  Output to;
};
template <class T>
__global__ void __launch_bounds__(kHeadThreads) join_kernel(const __grid_constant__ JoinLaunch j) {
  const HeadLaunch& l = j.l;
  const int64_t at = int64_t(blockIdx.x) * kHeadThreads + threadIdx.x, r = at / j.columns;
  if (r >= l.here()) return;
  float sum = 0.f;
  for (int s = 0; s < l.splits; ++s) sum += l.at<float>(Memory::parts)[s * l.chunk * j.columns + at];
  const int64_t line = (j.to.index ? j.to.index[r] : r) * j.to.stride;
  static_cast<T*>(j.to.data)[line + at % j.columns] = from_float<T>(sum * j.scale);
}

// in linear_cross_entropy.cu
int launch_counting(const HeadLaunch& l, void* stream);
int launch_losses(const HeadLaunch& l, void* stream);

template <class T>
int launch_logits(const LogitsLaunch& l, bool weight_by_rows, void* stream) {
  const bool general = l.l.a.softcap > 0.f || l.l.a.label_smoothing > 0.0;
  if constexpr (sizeof(T) == 2) {
    using G = Gemm90<T, false>;
    if (l.l.hopper) {
      Logits90Launch l90{{}, l};
      if (int e = make_boxes<T, false>(l90.boxes, l.p)) return e;
      return launch(general ? logits90_kernel<T, true> : logits90_kernel<T, false>,
                    Shape{G::blocks(l.p), G::kThreads, G::kSharedBytes}, l90, stream);
    }
  }
  using G = Gemm<T, false, false>;
  const int bytes = weight_by_rows ? G::kSharedBytes : Gemm<T, false, true>::kSharedBytes;
  const auto kernel = weight_by_rows ? (general ? logits_kernel<T, false, true> : logits_kernel<T, false, false>)
                                     : (general ? logits_kernel<T, true, true> : logits_kernel<T, true, false>);
  return launch(kernel, Shape{G::blocks(l.p), G::kThreads, bytes}, l, stream);
}

template <class T>
int launch_dx(const Product& p, const Output& out, bool weight_by_rows, bool hopper, void* stream) {
  if constexpr (sizeof(T) == 2)
    if (hopper && boxes_serve(p)) return launch_gemm90<T, true>(p, out, stream);
  return weight_by_rows ? launch_gemm<T, false, true>(p, out, stream) : launch_gemm<T, false, false>(p, out, stream);
}

template <class T>
int launch_head(const LinearCrossEntropy& a, void* stream) {
  HeadLaunch l;
  if (int e = HeadLaunch::make<T>(l, a)) return e;
  if (int e = launch_counting(l, stream)) return e;

  const auto data = [](const Matrix& m) { return static_cast<const T*>(m.data); };
  const auto as_rows = [&](const Matrix& m) { return Operand(data(m), m.row, m.column); };
  const auto transposed = [&](const Matrix& m) { return Operand(data(m), m.column, m.row); };
  // tiles of W, and of what stands beside it, take its rows as theirs, or its columns where those are contiguous
  const bool weight_by_rows = a.weight.column == 1 || a.weight.row != 1;
  const auto parameter = [&](const Matrix& m) { return weight_by_rows ? as_rows(m) : transposed(m); };
  const int64_t *const counted = l.at<int64_t>(Memory::counted), chunk = l.chunk;
  const Matrix h{l.at<T>(Memory::h), l.ld_h, 1}, dh{l.at<T>(Memory::dh), l.ld_h, 1};

  for (; l.begin < a.rows; l.begin += chunk) {
    const Operand x = l.hopper ? Operand(l.at<const T>(Memory::x), l.ld_x, 1)
                               : Operand(static_cast<const T*>(a.input), a.features, 1, l.index());
    if (l.hopper)
      if (int e = launch(gather_kernel<T>, Shape{chunk, kHeadThreads, 0}, l, stream)) return e;
    const auto product = [&](int64_t m, int64_t n, Term first, Term second = {}, int splits = 1) {
      return Product{m, n, {first, second}, splits, counted, l.begin};
    };
    const auto parts_of = [&](int64_t columns) {
      return Output{l.at<float>(Memory::parts), columns, nullptr, chunk * columns, true, false};
    };
    const auto join = [&](const Product& p, float scale, const Output& to) {
      l.splits = p.splits;
      const Shape shape{(chunk * p.n + kHeadThreads - 1) / kHeadThreads, kHeadThreads, 0};
      return launch(join_kernel<T>, shape, JoinLaunch{l, p.n, scale, to}, stream);
    };
    const auto narrow = [&](const Product& p, bool deep, const Matrix& to) -> int {
      const Output parts = parts_of(a.rank);
      if (int e = deep ? launch_gemm<T, false, true>(p, parts, stream) : launch_gemm<T, false, false>(p, parts, stream))
        return e;
      return join(p, a.scaling, Output{const_cast<void*>(to.data), l.ld_h, nullptr, 0, false, false});
    };
    if (a.rank)
      if (int e = narrow(
              product(chunk, a.rank, {x, as_rows(a.lora_A), a.features}, {}, HeadLaunch::splits_of<T>(a.features)),
              false, h))
        return e;

    const LogitsLaunch logits{
        product(chunk, a.classes, {x, parameter(a.weight), a.features}, {as_rows(h), parameter(a.lora_B), a.rank}), l};
    if (int e = launch_logits<T>(logits, weight_by_rows, stream)) return e;
    if (int e = launch_losses(l, stream)) return e;
    if (!a.upstream) continue;

    const int64_t blocks_per_row = (l.ld / 8 + kHeadThreads - 1) / kHeadThreads;
    if (int e = launch(logits_gradient_kernel<T>, Shape{chunk * blocks_per_row, kHeadThreads, 0}, l, stream)) return e;
    const Operand d(l.d<T>(), l.ld, 1);
    const bool later = l.begin > 0;
    if (a.rank && (a.dinput || a.dA))
      if (int e =
              narrow(product(chunk, a.rank, {d, as_rows(a.lora_B), a.classes}, {}, HeadLaunch::splits_of<T>(a.classes)),
                     true, dh))
        return e;
    if (a.dinput) {
      const Product p = product(chunk, a.features, {d, parameter(a.weight), a.classes},
                                {as_rows(dh), parameter(a.lora_A), a.rank}, l.splits_of_dx<T>());
      const Output out{a.dinput, a.features, l.index(), 0, false, false};
      if (int e = launch_dx<T>(p, p.splits > 1 ? parts_of(p.n) : out, weight_by_rows, l.hopper, stream)) return e;
      if (p.splits > 1)
        if (int e = join(p, 1.f, out)) return e;
    }
    const auto add = [&](float* to, int64_t m, int64_t n, const Operand& left, const Operand& right) -> int {
      if (!to) return 0;
      return launch_gemm<T, true, true>(product(m, n, {left, right, chunk}), Output{to, n, nullptr, 0, true, later},
                                        stream);
    };
    if (int e = add(a.dweight, a.classes, a.features, d, x)) return e;
    if (int e = add(a.dA, a.rank, a.features, as_rows(dh), x)) return e;
    if (int e = add(a.dB, a.classes, a.rank, d, as_rows(h))) return e;
    if (a.dbias)
      if (int e = launch(head_bias_kernel<T>, Shape{(a.classes + 255) / 256, kHeadThreads, kHeadThreads / 32 * 256 * 4},
                         l, stream))
        return e;
  }
  return 0;
}

// one per element type, each in a file of its own: they take longest to compile
int head_fp32(const LinearCrossEntropy& a, void* stream);
int head_bf16(const LinearCrossEntropy& a, void* stream);
int head_fp16(const LinearCrossEntropy& a, void* stream);

}  // namespace pyfast::cuda
