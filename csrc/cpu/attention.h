#pragma once
#include <cstdint>

#include "common/types.h"
#include "cpu/isa.h"

namespace pyfast {

// Element strides of a (batch, head, row, D) tensor whose last dimension is contiguous.
struct Strides {
  int64_t batch, head, row;
};

// One attention problem; DESIGN's `attention` in the terms of its docstring. Packed sequences (attention_varlen) have
// bounds_q and bounds_k, where sequence n holds rows bounds[n] to bounds[n + 1] of a single batch.
struct Attention {
  DType dtype;
  int64_t batch, heads, kv_heads, sq, sk, dim;  // packed: batch sequences; sq and sk are total rows
  const int64_t *bounds_q, *bounds_k;           // null where not packed
  const void *q, *k, *v;
  Strides q_strides, k_strides, v_strides;
  float scale, softcap;  // softcap 0: none
  int64_t left, right;   // -1: no limit
  const float* sinks;    // (heads,) or null
  const bool* mask;      // (batch, sk), contiguous, or null
  const void* bias;      // or null
  DType bias_dtype;
  int64_t bias_strides[4];  // of (batch, heads, sq, sk), 0 where broadcast
  double dropout_p;
  int64_t seed;
  int64_t dropout_keys;  // logical index of a probability: its row of maximum times dropout_keys, plus its key
  void* out;
  Strides out_strides;
  // Per query, (batch, heads, sq), packed (heads, sq): the largest score (-inf: no key) and the logarithm of the sum of
  // the exponentials above it. Apart, because their sum, lse, would lose the second where the first is large.
  float *maximum, *log_sum;

  // backward only
  const void* dout;
  Strides dout_strides;
  const float* dlse;   // like maximum, or null
  void *dq, *dk, *dv;  // written whole
  Strides dq_strides, dkv_strides;
  float* dsinks;             // (heads,) where sinks are given
  float* dbias;              // contiguous, its sizes those of bias before broadcasting; null where not wanted
  int64_t dbias_strides[4];  // of (batch, heads, sq, sk) in it, 0 where broadcast
  int64_t dbias_count;
};

PYFAST_KERNEL(void, attention_forward, (const Attention& a), (a))
PYFAST_KERNEL(void, attention_backward, (const Attention& a, int64_t threads), (a, threads))

}  // namespace pyfast
