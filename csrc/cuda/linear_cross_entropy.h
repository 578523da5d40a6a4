// The plain C interface of the head and its loss: no torch, no CUDA header. The terms are those of
// pyfast.ops.linear_cross_entropy.
#pragma once
#include <cstdint>

#include "common/types.h"

namespace pyfast::cuda {

struct Matrix {
  const void* data;
  int64_t row, column;  // strides, in elements
};

// Memory of a call's own, of at least so many bytes each as pyfast_cuda_linear_cross_entropy_memory says
enum class Memory : int { index, counted, x, kept, d, states, below, target_logit, rows, h, dh, parts, count };
constexpr int kMemories = int(Memory::count);

struct LinearCrossEntropy {
  DType dtype;
  int64_t rows, features, classes, rank;
  const void* input;  // (rows, features), contiguous
  Matrix weight;      // (classes, features)
  const void* bias;   // (classes,) or null
  int64_t bias_stride;
  Matrix lora_A, lora_B;      // (rank, features), (classes, rank); rank 0: none
  const int64_t* target;      // (rows,)
  const float* class_weight;  // (classes,) or null
  const double* upstream;     // (rows, 2): gradients of loss and of lse^2; or null
  int64_t ignore_index;
  double label_smoothing;
  float scaling, softcap, logit_scale;  // softcap 0: none
  double *loss, *lse;                   // (rows,)

  // gradients for upstream, null where none is needed; those of input in its dtype, zero where rows are ignored
  void* dinput;
  float *dweight, *dbias, *dA, *dB;  // contiguous

  int64_t logits_bytes;  // what rows go through the memory at a time may take
  void* memory[kMemories];
};

}  // namespace pyfast::cuda

extern "C" {
// 0, or a code for pyfast_cuda_error
int pyfast_cuda_linear_cross_entropy_memory(const pyfast::cuda::LinearCrossEntropy* arguments,
                                            int64_t (&bytes)[pyfast::cuda::kMemories]);
int pyfast_cuda_linear_cross_entropy(const pyfast::cuda::LinearCrossEntropy* arguments, void* stream);
}
