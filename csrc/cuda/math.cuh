// Functions that several kernels' softmax needs.
#pragma once
#include "cuda/ptx.cuh"

namespace pyfast::cuda {

// e^x: of a 16-bit result within a few ulp of fp32
template <class T>
__device__ __forceinline__ float exponential(float x) {
  if constexpr (sizeof(T) == 4) return expf(x);
  return exp2_approx(x * 1.44269504f);
}

// Called, not inlined at each of a tile's elements: kernels would grow tenfold
__device__ __attribute__((noinline)) inline float called_tanh(float x) { return tanhf(x); }

}  // namespace pyfast::cuda
