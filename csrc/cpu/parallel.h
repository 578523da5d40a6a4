// torch's own thread pool, through the C shim (torch/csrc/stable/c/shim.h), so that kernels include no torch header.
#pragma once
#include <xmmintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                                      void* context);
extern "C" int32_t torch_get_num_threads(uint32_t* threads);

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

// body(i) for i in [0, count), each on a thread of its own if there are so many
template <class F>
inline void on_threads(int64_t count, const F& body) {
  torch_parallel_for(
      0, count, 1,
      [](int64_t begin, int64_t end, void* f) {
        FlushSubnormals scope;
        for (int64_t i = begin; i < end; ++i) (*static_cast<const F*>(f))(i);
      },
      const_cast<F*>(&body));
}

inline int64_t num_threads() {
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  return threads;
}

// body(begin, end) over disjoint ranges of at least `grain` iterations, but for the last of a share; returns after all
// of them. The body must not throw.
//
// Each thread has a share, the same one in every call of the same size, whose data may still lie in its cache; it takes
// a quarter of what is left at a time, and when it is done, quarters of the others': a core that is slower, or has
// other work too, does not hold the rest up.
template <class F>
inline void parallel_for(int64_t count, int64_t grain, const F& body) {
  constexpr int64_t kMost = 64, kPieces = 4;
  if (count <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t tasks = (count + grain - 1) / grain;  // of `grain` iterations
  const int64_t shares = std::min({num_threads(), tasks, kMost});
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  Share all[kMost];
  for (int64_t i = 0; i < shares; ++i) {
    all[i].next.store(tasks * i / shares, std::memory_order_relaxed);
    all[i].end = tasks * (i + 1) / shares;
  }
  on_threads(shares, [&](int64_t own) {
    for (int64_t i = 0; i < shares; ++i) {
      Share& share = all[(own + i) % shares];
      for (int64_t begin = share.next.load(std::memory_order_relaxed); begin < share.end;) {
        const int64_t end = begin + std::max<int64_t>((share.end - begin) / kPieces, 1);
        if (!share.next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
        body(begin * grain, std::min(end * grain, count));
        begin = share.next.load(std::memory_order_relaxed);
      }
    }
  });
}

}  // namespace
}  // namespace pyfast
