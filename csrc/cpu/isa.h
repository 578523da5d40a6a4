// Declares a kernel once per instruction set and calls the best one that the CPU has.
//
//   PYFAST_KERNEL(void, gated, (const void* gate, ..., int64_t n), (gate, ..., n))
//
// declares avx2::gated and avx512::gated, and pyfast::gated, which picks one at each call.
#pragma once

namespace pyfast {

enum class Isa : int { none, avx2, avx512, amx };

Isa best_isa();     // what this CPU and its operating system allow
Isa current_isa();  // what kernels use: best_isa(), or less inside `use_backend("cpu", arch=...)`
bool set_isa(Isa);  // false where this CPU lacks it

#define PYFAST_KERNEL(result, name, parameters, arguments) \
  namespace avx2 {                                         \
  result name parameters;                                  \
  }                                                        \
  namespace avx512 {                                       \
  result name parameters;                                  \
  }                                                        \
  inline result name parameters { return current_isa() == Isa::avx2 ? avx2::name arguments : avx512::name arguments; }

// Runs a block with T bound to the element type: PYFAST_DISPATCH(dtype, T, kernel<T>((const T*)x, ...))
#define PYFAST_DISPATCH(dtype, T, ...) \
  switch (dtype) {                     \
    case DType::fp32: {                \
      using T = float;                 \
      __VA_ARGS__;                     \
      break;                           \
    }                                  \
    case DType::bf16: {                \
      using T = bf16;                  \
      __VA_ARGS__;                     \
      break;                           \
    }                                  \
    case DType::fp16: {                \
      using T = fp16;                  \
      __VA_ARGS__;                     \
      break;                           \
    }                                  \
  }

}  // namespace pyfast
