// What a loss makes of the products x Wᵀ before the softmax, on vectors: the logit, and its slope.
#pragma once
#include "cpu/vec.h"

namespace pyfast::PYFAST_ISA {
namespace {

struct Plain {
  static constexpr bool sloped = false;
  PF_INLINE fvec logit(fvec x) const { return x; }
  PF_INLINE fvec slope(fvec) const { return splat(1.f); }
};

struct Scaled {
  static constexpr bool sloped = true;
  float scale, softcap;  // softcap 0 for none
  PF_INLINE fvec logit(fvec x) const {
    x *= scale;
    return softcap > 0.f ? softcap * tanh(x / softcap) : x;
  }
  PF_INLINE fvec slope(fvec z) const {
    fvec t = z / softcap;
    return softcap > 0.f ? scale * (1.f - t) * (1.f + t) : splat(scale);
  }
};

// v with `fill` in its lanes from n on
PF_INLINE fvec first(fvec v, int n, float fill) {
  if (n == VL) return v;
  float lanes[VL];
  store(lanes, v);
  return load_n(lanes, n, fill);
}

}  // namespace
}  // namespace pyfast::PYFAST_ISA
