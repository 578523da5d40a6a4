// torch's own thread pool, through the C shim (torch/csrc/stable/c/shim.h), so that kernels include no torch header.
#pragma once
#include <xmmintrin.h>

#include <cstdint>

extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                                      void* context);

namespace pyfast {
namespace {

// While it lives, results below 1.2e-38 are zeros: a subnormal one costs the CPU a hundred cycles, and the tails of
// softmax and GELU are full of them.
class FlushSubnormals {
 public:
  FlushSubnormals() { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~FlushSubnormals() { _mm_setcsr(before_); }
  FlushSubnormals(const FlushSubnormals&) = delete;

 private:
  unsigned before_ = _mm_getcsr();
};

// body(begin, end) over disjoint ranges of at least `grain` iterations; returns after all of them. The body must not
// throw.
template <class F>
inline void parallel_for(int64_t count, int64_t grain, const F& body) {
  if (count <= 0) return;
  torch_parallel_for(
      0, count, grain < 1 ? 1 : grain,
      [](int64_t begin, int64_t end, void* f) {
        FlushSubnormals scope;
        (*static_cast<const F*>(f))(begin, end);
      },
      const_cast<F*>(&body));
}

}  // namespace
}  // namespace pyfast
