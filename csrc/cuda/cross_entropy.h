// The plain C interface of the cross-entropy kernel: no torch, no CUDA header.
#pragma once
#include <cstdint>

#include "common/types.h"

namespace pyfast::cuda {

struct CrossEntropy {
  const void* input;  // (rows, classes), rows `stride` elements apart
  int64_t rows, classes, stride;
  const int64_t* target;   // (rows,); a value out of range makes its row NaN
  const float* weight;     // (classes,), or null for ones
  const double* upstream;  // (rows, 2): the result's gradient with respect to loss and squared lse; null: no gradient
  int64_t ignore_index;
  double label_smoothing;
  float softcap;       // 0 for none
  double *loss, *lse;  // (rows,)
  void* dinput;        // (rows, classes), contiguous
};

}  // namespace pyfast::cuda

extern "C" {
// 0, or a code for pyfast_cuda_error
int pyfast_cuda_cross_entropy(pyfast::DType dtype, const pyfast::cuda::CrossEntropy* arguments, void* stream);
}
