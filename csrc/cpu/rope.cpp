// One pass. Each element has its own cos and sin, so that any pair of values is served exactly, not only a rotation's.
#include "cpu/rope.h"

#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace pyfast::PYFAST_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements per task: below this, threads cost more than they bring

// y1 = x1 c1 - x2 s1, y2 = x2 c2 + x1 s2; inverse: y1 = x1 c1 + x2 s2, y2 = x2 c2 - x1 s1
template <class T, class C, bool Inverse>
PF_INLINE void turn_halves(const T* x, const C* cos, const C* sin, T* y, int64_t half) {
  for_lanes(half, [=](int64_t i, int lanes) {
    fvec x1 = load_any(x + i, lanes), x2 = load_any(x + half + i, lanes);
    fvec c1 = load_any(cos + i, lanes), c2 = load_any(cos + half + i, lanes);
    fvec s1 = load_any(sin + i, lanes), s2 = load_any(sin + half + i, lanes);
    store_any(y + i, Inverse ? x1 * c1 + x2 * s2 : x1 * c1 - x2 * s1, lanes);
    store_any(y + half + i, Inverse ? x2 * c2 - x1 * s1 : x2 * c2 + x1 * s2, lanes);
  });
}

PF_INLINE fvec swap_pairs(fvec v) {
  ivec index;
  for (int i = 0; i < VL; ++i) index[i] = i ^ 1;
  return __builtin_shuffle(v, index);
}

// The same with pairs side by side: their partner is the neighbouring lane, with a sign that alternates.
template <class T, class C, bool Inverse>
PF_INLINE void turn_pairs(const T* x, const C* cos, const C* sin, T* y, int64_t width) {
  fvec sign;
  for (int i = 0; i < VL; ++i) sign[i] = (i % 2 == 0) == Inverse ? 1.f : -1.f;
  for_lanes(width, [=](int64_t i, int lanes) {
    fvec v = load_any(x + i, lanes), c = load_any(cos + i, lanes), s = load_any(sin + i, lanes);
    fvec turned = Inverse ? swap_pairs(v * s) : swap_pairs(v) * s;
    store_any(y + i, v * c + sign * turned, lanes);
  });
}

template <class T, class C, bool Interleaved, bool Inverse>
void turn(const RopeShape& s, const T* x, const C* cos, const C* sin, T* y) {
  // the inner loop follows memory: over heads where a position's heads lie together, else over positions
  bool heads_inside = s.x_strides[1] <= s.x_strides[2];
  int64_t outer = heads_inside ? s.seq : s.heads, inner = heads_inside ? s.heads : s.seq;
  parallel_for(s.batch * outer, kGrain / (inner * s.dim + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      int64_t b = task / outer, o = task % outer;
      for (int64_t i = 0; i < inner; ++i) {
        int64_t head = heads_inside ? i : o, position = heads_inside ? o : i;
        const T* in = x + b * s.x_strides[0] + head * s.x_strides[1] + position * s.x_strides[2];
        T* out = y + b * s.y_strides[0] + head * s.y_strides[1] + position * s.y_strides[2];
        const C* c = cos + b * s.cos_batch_stride + position * s.width;
        const C* n = sin + b * s.cos_batch_stride + position * s.width;
        if constexpr (Interleaved) {
          turn_pairs<T, C, Inverse>(in, c, n, out, s.width);
        } else {
          turn_halves<T, C, Inverse>(in, c, n, out, s.width / 2);
        }
        if (s.width < s.dim) std::memcpy(out + s.width, in + s.width, (s.dim - s.width) * sizeof(T));
      }
    }
  });
}

template <class T, class C>
void choose(const RopeShape& s, const void* x, const void* cos, const void* sin, void* y) {
  auto kernel = s.interleaved ? s.inverse ? turn<T, C, true, true> : turn<T, C, true, false>
                : s.inverse   ? turn<T, C, false, true>
                              : turn<T, C, false, false>;
  kernel(s, (const T*)x, (const C*)cos, (const C*)sin, (T*)y);
}

}  // namespace

void rope(DType t, DType angle, RopeShape s, const void* x, const void* cos, const void* sin, void* y) {
  PYFAST_DISPATCH(t, T, if (angle == DType::fp32) choose<T, float>(s, x, cos, sin, y);
                  else choose<T, T>(s, x, cos, sin, y))
}

}  // namespace pyfast::PYFAST_ISA
