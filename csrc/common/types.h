// Element types that kernels see: raw 16-bit storage, converted to fp32 on load (vec.h).
#pragma once
#include <cstdint>

namespace pyfast {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// What a binding passes for a tensor's dtype, and what PYFAST_DISPATCH in a kernel turns back into a type.
enum class DType : int { fp32, bf16, fp16 };
inline int64_t size_of(DType t) { return t == DType::fp32 ? 4 : 2; }

// Rows of contiguous elements, `stride` elements from one row's start to the next.
struct Rows {
  const void* data;
  int64_t stride;
};
struct MutableRows {
  void* data;
  int64_t stride;
};

}  // namespace pyfast
