// The plain C interface of the attention kernels: no torch, no CUDA header. The terms are those of
// pyfast.ops.attention.
#pragma once
#include <cstdint>

#include "common/types.h"

namespace pyfast::cuda {

// Elements (batch, head, row, :) of a tensor whose last dimension is contiguous
struct Heads {
  const void* data;
  int64_t batch, head, row;  // strides, in elements
  bool aligned;              // every row begins at a multiple of 16 bytes
};

struct Attention {
  DType dtype;
  int64_t batch, heads, kv_heads, sq, sk;  // packed: batch 1; sq and sk are total rows
  int dim;
  // packed sequences: (sequences + 1,) each, int32 or int64, on the device; their values are not trusted
  const void *cu_q, *cu_k;
  bool cu_wide;
  int64_t sequences;
  Heads q, k, v;
  float scale, softcap;  // softcap 0: none
  int left, right;       // -1: no limit; at most sq + sk
  const float* sinks;    // (heads,) or null
  const bool* mask;      // (batch, sk), contiguous, or null
  const void* bias;      // or null
  DType bias_dtype;
  int64_t bias_strides[4];  // of (batch, heads, sq, sk), 0 where broadcast
  const int64_t* seed;      // on the device; null without dropout
  double dropout_p;
  int64_t dropout_keys;      // logical index of a probability: its row of maximum times dropout_keys, plus its key
  Heads out;                 // written by the forward
  float *maximum, *log_sum;  // (batch, heads, sq), packed (heads, sq)

  // backward only; dq lies in memory as out does, dk and dv as each other
  Heads dout;
  const float* dlse;  // or null
  float* delta;       // (batch, heads, sq): written by the dq pass, read by the others
  Heads dq, dk, dv;
  float* dscores;  // (batch, heads, sq, sk), or null
  float* dsinks;   // (heads,) where sinks are given
  float* dbias;    // contiguous, of these sizes, the sum of dscores over the others; may be dscores itself
  int64_t dbias_sizes[4];
};

}  // namespace pyfast::cuda

extern "C" {
// 0, or a code for pyfast_cuda_error
int pyfast_cuda_attention(const pyfast::cuda::Attention* arguments, void* stream);
int pyfast_cuda_attention_backward(const pyfast::cuda::Attention* arguments, void* stream);
}
