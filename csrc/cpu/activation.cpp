// One pass over the inputs forward, one backward; nothing is kept but the inputs.
#include "cpu/activation.h"

#include <type_traits>

#include "cpu/activation_math.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace pyfast::PYFAST_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements per task: below this, threads cost more than they bring

// body(row, first column, count) over a matrix cut into equal shares of elements
template <class F>
void for_pieces(int64_t rows, int64_t cols, const F& body) {
  parallel_for(rows * cols, kGrain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      int64_t row = begin / cols, col = begin % cols, n = end - begin < cols - col ? end - begin : cols - col;
      body(row, col, n);
      begin += n;
    }
  });
}

template <class T>
PF_INLINE const T* at(Rows r, int64_t row, int64_t col = 0) {
  return (const T*)r.data + row * r.stride + col;
}
template <class T>
PF_INLINE T* at(MutableRows r, int64_t row, int64_t col = 0) {
  return (T*)r.data + row * r.stride + col;
}

template <class T, class A>
void gated_forward(Rows gate, Rows up, MutableRows y, int64_t rows, int64_t cols) {
  for_pieces(rows, cols, [=](int64_t row, int64_t col, int64_t n) {
    const T *g = at<T>(gate, row, col), *u = at<T>(up, row, col);
    T* out = at<T>(y, row, col);
    for_lanes(n, [=](int64_t i, int lanes) {
      store_any(out + i, A::template value<T>(load_any(g + i, lanes)) * load_any(u + i, lanes), lanes);
    });
  });
}

template <class T, class A>
void gated_back(Rows dy, Rows gate, Rows up, MutableRows dgate, MutableRows dup, int64_t rows, int64_t cols) {
  for_pieces(rows, cols, [=](int64_t row, int64_t col, int64_t n) {
    const T *g = at<T>(gate, row, col), *u = at<T>(up, row, col), *d = at<T>(dy, row, col);
    T *dg = at<T>(dgate, row, col), *du = at<T>(dup, row, col);
    for_lanes(n, [=](int64_t i, int lanes) {
      fvec dv = load_any(d + i, lanes);
      ValueSlope a = A::template both<T>(load_any(g + i, lanes));
      store_any(dg + i, dv * load_any(u + i, lanes) * a.slope, lanes);
      store_any(du + i, dv * a.value, lanes);
    });
  });
}

template <class T, class A>
void activate_forward(Rows x, const float* bias, MutableRows y, int64_t rows, int64_t cols) {
  for_pieces(rows, cols, [=](int64_t row, int64_t col, int64_t n) {
    const T* in = at<T>(x, row, col);
    const float* b = bias ? bias + col : nullptr;
    T* out = at<T>(y, row, col);
    for_lanes(n, [=](int64_t i, int lanes) {
      fvec v = load_any(in + i, lanes);
      if (b) v += load_any(b + i, lanes);
      store_any(out + i, A::template value<T>(v), lanes);
    });
  });
}

template <class T, class A, bool Sum>
PF_INLINE void activate_back_row(const T* d, const T* x, const float* bias, T* dx, T* value, float* total, int64_t n) {
  for_lanes(n, [=](int64_t i, int lanes) {
    fvec v = load_any(x + i, lanes);
    if (bias) v += load_any(bias + i, lanes);
    ValueSlope both = A::template both<std::conditional_t<Sum, float, T>>(v);  // dbias may be fp32
    fvec g = load_any(d + i, lanes) * both.slope;
    store_any(dx + i, g, lanes);
    if (value) store_any(value + i, both.value, lanes);
    if constexpr (Sum) store_any(total + i, load_any(total + i, lanes) + g, lanes);
  });
}

template <class T, class A>
void activate_back(Rows dy, Rows x, const float* bias, MutableRows dx, MutableRows value, float* partial, bool sum,
                   int64_t rows, int64_t cols) {
  if (!sum) {
    for_pieces(rows, cols, [=](int64_t row, int64_t col, int64_t n) {
      activate_back_row<T, A, false>(at<T>(dy, row, col), at<T>(x, row, col), bias ? bias + col : nullptr,
                                     at<T>(dx, row, col), value.data ? at<T>(value, row, col) : nullptr, nullptr, n);
    });
    return;
  }
  int64_t block = block_rows(rows);
  parallel_for(row_blocks(rows), kGrain / (block * cols + 1), [=](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      float* total = partial + b * cols;
      std::memset(total, 0, cols * sizeof(float));
      for (int64_t row = b * block; row < rows && row < (b + 1) * block; ++row)
        activate_back_row<T, A, true>(at<T>(dy, row), at<T>(x, row), bias, at<T>(dx, row),
                                      value.data ? at<T>(value, row) : nullptr, total, cols);
    }
  });
}

}  // namespace

// contiguous matrices are one long row: no short tails at the end of each row
void gated(DType t, Activation a, Rows gate, Rows up, MutableRows y, int64_t rows, int64_t cols) {
  if (gate.stride == cols && up.stride == cols && y.stride == cols) cols *= rows, rows = 1;
  PYFAST_DISPATCH_ACTIVATION(a, A, PYFAST_DISPATCH(t, T, gated_forward<T, A>(gate, up, y, rows, cols)))
}
void gated_backward(DType t, Activation a, Rows dy, Rows gate, Rows up, MutableRows dgate, MutableRows dup,
                    int64_t rows, int64_t cols) {
  if (dy.stride == cols && gate.stride == cols && up.stride == cols && dgate.stride == cols && dup.stride == cols)
    cols *= rows, rows = 1;
  PYFAST_DISPATCH_ACTIVATION(a, A, PYFAST_DISPATCH(t, T, gated_back<T, A>(dy, gate, up, dgate, dup, rows, cols)))
}
void activate(DType t, Activation a, Rows x, const float* bias, MutableRows y, int64_t rows, int64_t cols) {
  PYFAST_DISPATCH_ACTIVATION(a, A, PYFAST_DISPATCH(t, T, activate_forward<T, A>(x, bias, y, rows, cols)))
}
void activate_backward(DType t, Activation a, Rows dy, Rows x, const float* bias, MutableRows dx, MutableRows value,
                       float* partial, DType dbias_type, void* dbias, int64_t rows, int64_t cols) {
  PYFAST_DISPATCH_ACTIVATION(
      a, A, PYFAST_DISPATCH(t, T, activate_back<T, A>(dy, x, bias, dx, value, partial, dbias != nullptr, rows, cols)))
  if (dbias) PYFAST_ISA::sum_blocks(partial, row_blocks(rows), cols, dbias_type, dbias);
}

}  // namespace pyfast::PYFAST_ISA
