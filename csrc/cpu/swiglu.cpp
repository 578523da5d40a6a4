// y = silu(gate) * up, elementwise: one pass over the inputs forward, one backward; nothing is kept but the inputs.
#include "cpu/swiglu.h"

#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace pyfast::PYFAST_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements per task: below this, threads cost more than they bring

template <class T>
void forward(const T* gate, const T* up, T* y, int64_t n) {
  parallel_for(n, kGrain, [=](int64_t begin, int64_t end) {
    for_lanes(end - begin, [=](int64_t i, int lanes) {
      fvec g = load_any(gate + begin + i, lanes), u = load_any(up + begin + i, lanes);
      store_any(y + begin + i, g * sigmoid(g) * u, lanes);
    });
  });
}

// d/dg silu(g) = s + g s (1 - s), s = sigmoid(g)
template <class T>
void backward(const T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t n) {
  parallel_for(n, kGrain, [=](int64_t begin, int64_t end) {
    for_lanes(end - begin, [=](int64_t i, int lanes) {
      fvec d = load_any(dy + begin + i, lanes);
      fvec g = load_any(gate + begin + i, lanes), u = load_any(up + begin + i, lanes);
      fvec s = sigmoid(g), silu = g * s;
      store_any(dup + begin + i, d * silu, lanes);
      store_any(dgate + begin + i, d * u * (s + silu * (1.f - s)), lanes);
    });
  });
}

}  // namespace

void swiglu(DType t, const void* gate, const void* up, void* y, int64_t n) {
  PYFAST_DISPATCH(t, T, forward((const T*)gate, (const T*)up, (T*)y, n))
}
void swiglu_backward(DType t, const void* dy, const void* gate, const void* up, void* dgate, void* dup, int64_t n) {
  PYFAST_DISPATCH(t, T, backward((const T*)dy, (const T*)gate, (const T*)up, (T*)dgate, (T*)dup, n))
}

}  // namespace pyfast::PYFAST_ISA
