// A frozen weight in nf4 (Dettmers et al. 2023, QLoRA; bitsandbytes' packed format), int8 or fp8: written out in the
// dtype that a matrix product takes, or, where rows are few, dequantised in the operand load of an own product. An
// element is a table lookup and one product, rounded once, either way.
//
// dequantize. Tiling: a thread takes 8 elements: 4 or 8 bytes of codes, and 16 or 32 of the result. The levels stand in
// shared memory, 1 KB: of nf4's 16 each has a bank of its own. The scale is looked up where a block of it begins.
// Bound: memory. nf4 reads 0.56 bytes an element (0.5, and 4 for each block of 64) and writes 2: at an H100's 3.0 TB/s
// 14 us for 4096 x 4096, once per layer and pass; the frozen product of 8,192 tokens takes 340 us.
//
// quantized_linear, of up to 32 rows of x. Tiling: a block makes 16 columns of y; its 8 warps share the sum over the
// weight's columns, each taking 16 bytes of codes per lane and weight row at a time, and add their parts in shared
// memory in a fixed order (1 + 4 to 16 KB). The codes go from global memory to a lane's registers, are dequantised
// there and are operands of mma.sync as they lie: a sum does not ask for its terms' order, so that a lane's 32 (8-bit:
// 16) neighbours serve 8 (4) steps of depth 16, and x is read to match. Bound: memory, 0.56 bytes an element of the
// weight, 3 us for 4096 x 4096, where writing it out and reading it again takes 25; x comes from the L2 cache.
//
// Without a GPU these are bounds on paper.
#include "cuda/ptx.cuh"
#include "cuda/quantized.h"

namespace pyfast::cuda {
namespace {

constexpr int kThreads = 256, kElements = 8;

// Index: as wide as the number of elements asks for, since divisions take most of the time
template <class T, bool kPairs, class Index>
__global__ void dequantize_kernel(const __grid_constant__ Dequantize a) {
  PYFAST_SHARED(shared);
  float* const levels = reinterpret_cast<float*>(shared);
  for (int i = threadIdx.x; i < a.level_count; i += kThreads) levels[i] = a.levels[i];
  __syncthreads();
  const int64_t begin = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kElements, rest = a.n * a.k - begin;
  if (rest <= 0) return;
  const int count = rest < kElements ? int(rest) : kElements;
  constexpr int kBytes = kPairs ? kElements / 2 : kElements;
  alignas(8) uint8_t codes[kBytes];
  const uint8_t* const from = a.codes + begin / (kPairs ? 2 : 1);
  if (count == kElements && reinterpret_cast<uintptr_t>(from) % kBytes == 0) {
    using Word = std::conditional_t<kPairs, uint32_t, uint64_t>;
    const Word word = *reinterpret_cast<const Word*>(from);
    memcpy(codes, &word, kBytes);
  } else {
    for (int i = 0; i < kBytes; ++i) codes[i] = i * (kPairs ? 2 : 1) < count ? from[i] : 0;
  }
  const Index k = Index(a.k), block_rows = Index(a.block_rows), block_columns = Index(a.block_columns);
  const Index across = (k + block_columns - 1) / block_columns;
  Index row = Index(begin) / k, column = Index(begin) % k, block = column / block_columns;
  Index border = (block + 1) * block_columns;  // where the scale's next block, or the next row, begins
  if (border > k) border = k;
  float factor = a.scale[row / block_rows * across + block];
  T elements[kElements];
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    if (i < count && column == border) {
      if (border == k) column = 0, border = 0, ++row;
      border = border + block_columns < k ? border + block_columns : k;
      factor = a.scale[row / block_rows * across + column / block_columns];
    }
    const int code = kPairs ? (i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4) : codes[i];
    elements[i] = from_float<T>(levels[code] * factor);
    ++column;
  }
  T* const out = static_cast<T*>(a.out) + begin;
  if (count == kElements && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
#pragma unroll
    for (int v = 0; v < int(kElements * sizeof(T) / 16); ++v) {
      Vector vector;
      memcpy(&vector, elements + v * 16 / sizeof(T), 16);
      reinterpret_cast<Vector*>(out)[v] = vector;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kElements; ++i)
      if (i < count) out[i] = elements[i];
  }
}

// The scale of the element that is `at` in row-major order
__device__ __forceinline__ float scale_at(const Dequantize& a, int64_t at) {
  const int64_t across = (a.k + a.block_columns - 1) / a.block_columns;
  return a.scale[at / a.k / a.block_rows * across + at % a.k / a.block_columns];
}

struct QuantizedLaunch {
  QuantizedLinear a;
  bool whole;      // 16 bytes of codes are of one row and one block of a scale, and begin at a multiple of 16
  bool x_aligned;  // so do the elements of x that meet them
};

constexpr int kQuantizedWarps = 8;

// kTiles: of 8 rows of x
template <class T, bool kPairs, int kTiles>
__global__ void __launch_bounds__(32 * kQuantizedWarps)
    quantized_linear_kernel(const __grid_constant__ QuantizedLaunch l) {
  PYFAST_SHARED(shared);
  const QuantizedLinear& a = l.a;
  const Dequantize& weight = a.weight;
  float* const levels = reinterpret_cast<float*>(shared);
  float* const parts = levels + 256;                                  // (warps, 16, 8 kTiles)
  constexpr int kElements = kPairs ? 32 : 16, kStep = 4 * kElements;  // in 16 bytes of codes; of a warp
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t first = int64_t(blockIdx.x) * 16;
  for (int i = threadIdx.x; i < weight.level_count; i += blockDim.x) levels[i] = weight.levels[i];
  __syncthreads();

  float acc[kTiles][4] = {};
  for (int64_t at = warp * kStep; at < a.columns; at += kQuantizedWarps * kStep) {
    const int64_t column = at + t * kElements, left = a.columns - column;
    uint32_t w[2][kElements / 2];  // of rows g and g + 8 of the weight
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = first + g + 8 * h, begin = row * a.columns + column;
      const int count = row >= a.n || left <= 0 ? 0 : left < kElements ? int(left) : kElements;
      uint8_t codes[16] = {};
      const uint8_t* const from = weight.codes + begin / (kPairs ? 2 : 1);
      if (l.whole && count) {
        const Vector v = load_global(from);
        memcpy(codes, &v, 16);
      } else {
#pragma unroll
        for (int i = 0; i < 16; ++i)
          if (i * (kPairs ? 2 : 1) < count) codes[i] = from[i];
      }
      float factor = l.whole && count ? scale_at(weight, begin) : 0.f;
#pragma unroll
      for (int i = 0; i < kElements; i += 2) {
        float pair[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int code = kPairs ? (e ? codes[i / 2] & 15 : codes[i / 2] >> 4) : codes[i + e];
          if (!l.whole) factor = i + e < count ? scale_at(weight, begin + i + e) : 0.f;
          pair[e] = levels[code] * factor;
        }
        w[h][i / 2] = pack<T>(pair[0], pair[1]);
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int row = 8 * tile + g;
      const T* const from = static_cast<const T*>(a.x) + row * a.columns + column;
      uint32_t x[kElements / 2] = {};
      if (row < a.rows && left > 0) {
        if (l.x_aligned) {
#pragma unroll
          for (int v = 0; v < kElements / 8; ++v) {
            const Vector vector = load_global(from + 8 * v);
            memcpy(x + 4 * v, &vector, 16);
          }
        } else {
#pragma unroll
          for (int i = 0; i < kElements; ++i)
            if (i < left) x[i / 2] |= uint32_t(from[i].bits) << (i % 2 * 16);
        }
      }
#pragma unroll
      for (int k = 0; k < kElements / 2; k += 2) {
        const uint32_t left_operand[4] = {w[0][k], w[1][k], w[0][k + 1], w[1][k + 1]}, right[2] = {x[k], x[k + 1]};
        mma<T>(acc[tile], left_operand, right);
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      parts[(warp * 16 + g + e / 2 * 8) * 8 * kTiles + 8 * tile + 2 * t + e % 2] = acc[tile][e];
  __syncthreads();
  for (int i = threadIdx.x; i < 16 * 8 * kTiles; i += blockDim.x) {
    const int n = i % 16, row = i / 16;
    if (row >= a.rows || first + n >= a.n) continue;
    float sum = 0.f;
#pragma unroll
    for (int p = 0; p < kQuantizedWarps; ++p) sum += parts[(p * 16 + n) * 8 * kTiles + row];
    const int64_t to = row * a.n + first + n;
    if (a.add) sum += to_float(static_cast<const T*>(a.add)[to]);
    static_cast<T*>(a.y)[to] = from_float<T>(sum);
  }
}

template <class T, bool kPairs>
int run(const QuantizedLinear& a, void* stream) {
  if (a.rows == 0 || a.n == 0) return 0;
  constexpr int64_t kElements = kPairs ? 32 : 16;
  const bool multiple = a.columns % kElements == 0;
  const QuantizedLaunch l{
      a,
      multiple && a.weight.k % a.columns == 0 && a.weight.block_columns % kElements == 0 &&
          reinterpret_cast<uintptr_t>(a.weight.codes) % 16 == 0,
      multiple && reinterpret_cast<uintptr_t>(a.x) % 16 == 0,
  };
  const int tiles = a.rows <= 8 ? 1 : a.rows <= 16 ? 2 : 4;
  const auto kernel = tiles == 1   ? quantized_linear_kernel<T, kPairs, 1>
                      : tiles == 2 ? quantized_linear_kernel<T, kPairs, 2>
                                   : quantized_linear_kernel<T, kPairs, 4>;
  const int shared = int(sizeof a.weight.levels) + kQuantizedWarps * 16 * 8 * tiles * 4;
  return launch(kernel, Shape{(a.n + 15) / 16, 32 * kQuantizedWarps, shared}, l, stream);
}

template <class T>
int run(const QuantizedLinear& a, void* stream) {
  return a.weight.level_count == 16 ? run<T, true>(a, stream) : run<T, false>(a, stream);
}

template <class T, bool kPairs>
int run(const Dequantize& a, void* stream) {
  const int64_t count = a.n * a.k, per_block = kThreads * kElements;
  if (count == 0) return 0;
  const bool narrow = count + a.block_columns + a.block_rows < int64_t(1) << 31;
  const auto kernel = narrow ? dequantize_kernel<T, kPairs, uint32_t> : dequantize_kernel<T, kPairs, uint64_t>;
  return launch(kernel, Shape{(count + per_block - 1) / per_block, kThreads, int(sizeof a.levels)}, a, stream);
}

template <class T>
int run(const Dequantize& a, void* stream) {
  return a.level_count == 16 ? run<T, true>(a, stream) : run<T, false>(a, stream);
}

}  // namespace
}  // namespace pyfast::cuda

using namespace pyfast;

extern "C" int pyfast_cuda_dequantize(const cuda::Dequantize* a, void* stream) {
  return a->dtype == DType::fp32   ? cuda::run<float>(*a, stream)
         : a->dtype == DType::bf16 ? cuda::run<bf16>(*a, stream)
                                   : cuda::run<fp16>(*a, stream);
}

extern "C" int pyfast_cuda_quantized_linear(const cuda::QuantizedLinear* a, void* stream) {
  return a->weight.dtype == DType::bf16 ? cuda::run<bf16>(*a, stream) : cuda::run<fp16>(*a, stream);
}
