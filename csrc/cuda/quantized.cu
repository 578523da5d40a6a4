// A frozen weight in nf4 (Dettmers et al. 2023, QLoRA; bitsandbytes' packed format), int8 or fp8, back in the dtype
// that a matrix product takes: a table lookup and one product per element, rounded once.
//
// Tiling: a thread takes 8 elements: 4 or 8 bytes of codes, and 16 or 32 of the result. The levels stand in shared
// memory, 1 KB: of nf4's 16 each has a bank of its own. The scale is looked up where a block of it begins.
//
// Bound: memory. nf4 reads 0.56 bytes an element (0.5, and 4 for each block of 64) and writes 2: at an H100's 3.0 TB/s
// 14 us for 4096 x 4096, once per layer and pass; the frozen product of 8,192 tokens takes 340 us. Without a GPU this
// is a bound on paper.
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
