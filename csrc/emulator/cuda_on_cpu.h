// The names of CUDA C++ that kernels use, on top of simt.h. `__shared__` is missing on purpose: kernels use dynamic
// shared memory, which the emulator fills with NaN and bounds.
#pragma once
#include <cmath>
#include <type_traits>

#include "emulator/simt.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (::simt::current->thread)
#define blockIdx (::simt::current->block->index)
#define blockDim (::simt::launched->block)
#define gridDim (::simt::launched->grid)

inline void __syncthreads() { simt::barrier(0, 0); }
inline void __syncwarp(uint32_t mask = ~0u) {
  simt::collective<int, int>(mask, 0, [](auto&&, auto&&) {}, "__syncwarp");
}

namespace simt {
enum class Shuffle { index, exclusive_or, up, down };
template <class T>
T shuffle(uint32_t mask, T value, int argument, int width, Shuffle kind) {
  struct In {
    T value;
    int argument;
  };
  return collective<In, T>(
      mask, In{value, argument},
      [=](auto in, auto out) {
        for (int lane = 0; lane < 32; ++lane) {
          if (!(mask >> lane & 1)) continue;
          const int a = in(lane).argument, begin = lane / width * width;
          int from = kind == Shuffle::index          ? begin + a % width
                     : kind == Shuffle::exclusive_or ? (lane ^ a)
                     : kind == Shuffle::up           ? lane - a
                                                     : lane + a;
          if (from < begin || from >= begin + width) from = lane;
          if (!(mask >> from & 1)) fail("a shuffle reads from a lane outside its mask");
          out(lane) = in(from).value;
        }
      },
      "a shuffle");
}
}  // namespace simt
#define SIMT_SHUFFLE(name, kind)                                             \
  template <class T>                                                         \
  T name(uint32_t mask, T value, int argument, int width = 32) {             \
    return simt::shuffle(mask, value, argument, width, simt::Shuffle::kind); \
  }
SIMT_SHUFFLE(__shfl_sync, index)
SIMT_SHUFFLE(__shfl_xor_sync, exclusive_or)
SIMT_SHUFFLE(__shfl_up_sync, up)
SIMT_SHUFFLE(__shfl_down_sync, down)
#undef SIMT_SHUFFLE
inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
  return simt::collective<int, uint32_t>(
      mask, predicate,
      [=](auto in, auto out) {
        uint32_t votes = 0;
        for (int lane = 0; lane < 32; ++lane)
          if (mask >> lane & 1 && in(lane)) votes |= 1u << lane;
        for (int lane = 0; lane < 32; ++lane)
          if (mask >> lane & 1) out(lane) = votes;
      },
      "__ballot_sync");
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// clusters share memory across OS threads: real atomics
template <class T>
T atomicAdd(T* p, T value) {
  if constexpr (std::is_integral_v<T>) {
    return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
  } else {
    T old, sum;
    __atomic_load(p, &old, __ATOMIC_RELAXED);
    do sum = old + value;
    while (!__atomic_compare_exchange(p, &old, &sum, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
  }
}
inline int atomicMax(int* p, int value) {
  int old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (old < value && !__atomic_compare_exchange_n(p, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
