// A row is read from memory once and then from the first-level cache: its statistics, then its result. With
// n = (x - mean) * rstd and g = dy * weight, backward gives dx = rstd * (g - mean(g) - n * mean(g * n)); RMSNorm has no
// mean and no mean(g). The sums over rows for weight and bias are reproducible (rows.h).
#include "cpu/norm.h"

#include <utility>

#include "cpu/parallel.h"
#include "cpu/rows.h"
#include "cpu/vec.h"

namespace pyfast::PYFAST_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements per task: below this, threads cost more than they bring

template <class T>
PF_INLINE const T* at(Rows r, int64_t row) {
  return r.data ? (const T*)r.data + row * r.stride : nullptr;
}

// zero beyond the lanes that are there: what a sum over a row needs
PF_INLINE fvec masked(fvec v, int lanes) {
  if (lanes == VL) return v;
  for (int i = lanes; i < VL; ++i) v[i] = 0.f;
  return v;
}

template <class T, bool Center>
void forward(NormShape s, Rows x, Rows residual, const float* weight, const float* bias, double eps, T* y, T* sum,
             float* mean, float* rstd) {
  parallel_for(s.rows, kGrain / s.cols + 1, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T *in = at<T>(x, row), *other = at<T>(residual, row);
      if (other) {
        T* out = sum + row * s.cols;
        for_lanes(s.cols, [=](int64_t i, int lanes) {
          store_any(out + i, load_any(in + i, lanes) + load_any(other + i, lanes), lanes);
        });
        in = out;
      }
      float m = 0.f;
      if constexpr (Center) {
        fvec total{};
        for_lanes(s.cols, [&](int64_t i, int lanes) { total += load_any(in + i, lanes); });
        m = mean[row] = hsum(total) / s.cols;
      }
      fvec squares{}, odd{};  // two chains of additions: one would wait for itself
      for_lanes(s.cols, [&](int64_t i, int lanes) {
        fvec v = masked(load_any(in + i, lanes) - m, lanes);
        squares += v * v;
        std::swap(squares, odd);
      });
      squares += odd;
      float r = rstd[row] = float(1. / std::sqrt(double(hsum(squares)) / s.cols + eps));  // one rounding, not three
      const float* w = weight + row % s.weight_lines * s.cols;
      const float* b = bias ? bias + row % s.bias_lines * s.cols : nullptr;
      T* out = y + row * s.cols;
      for_lanes(s.cols, [=](int64_t i, int lanes) {
        fvec v = (load_any(in + i, lanes) - m) * r * load_any(w + i, lanes);
        if (b) v += load_any(b + i, lanes);
        store_any(out + i, v, lanes);
      });
    }
  });
}

template <class T, bool Center>
void backward(NormShape s, Rows dy, Rows dsum, Rows x, const float* mean, const float* rstd, const float* weight, T* dx,
              float* dweight, float* dbias) {
  int64_t block = block_rows(s.rows), weight_size = s.weight_lines * s.cols, bias_size = s.bias_lines * s.cols;
  parallel_for(row_blocks(s.rows), kGrain / (block * s.cols) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      float *block_dw = dweight + b * weight_size, *block_db = dbias + b * bias_size;
      if (dweight) std::memset(block_dw, 0, weight_size * sizeof(float));
      if (dbias) std::memset(block_db, 0, bias_size * sizeof(float));
      for (int64_t row = b * block; row < s.rows && row < (b + 1) * block; ++row) {
        const T *d = at<T>(dy, row), *in = at<T>(x, row), *extra = at<T>(dsum, row);
        int64_t line = row % s.weight_lines * s.cols;
        const float* w = weight + line;
        float* dw = dweight ? block_dw + line : nullptr;
        float* db = dbias ? block_db + row % s.bias_lines * s.cols : nullptr;
        float m = Center ? mean[row] : 0.f, r = rstd[row];
        fvec sum_g{}, sum_gn{};
        for_lanes(s.cols, [&](int64_t i, int lanes) {
          fvec dv = load_any(d + i, lanes), n = (load_any(in + i, lanes) - m) * r, g = dv * load_any(w + i, lanes);
          if constexpr (Center) sum_g += g;
          sum_gn += g * n;
          if (dw) store_any(dw + i, load_any(dw + i, lanes) + dv * n, lanes);
          if (db) store_any(db + i, load_any(db + i, lanes) + dv, lanes);
        });
        float mean_g = Center ? hsum(sum_g) / s.cols : 0.f, mean_gn = hsum(sum_gn) / s.cols;
        T* out = dx + row * s.cols;
        for_lanes(s.cols, [=](int64_t i, int lanes) {
          fvec n = (load_any(in + i, lanes) - m) * r, g = load_any(d + i, lanes) * load_any(w + i, lanes);
          fvec v = (g - mean_g - n * mean_gn) * r;
          if (extra) v += load_any(extra + i, lanes);
          store_any(out + i, v, lanes);
        });
      }
    }
  });
}

}  // namespace

void norm(DType t, NormShape s, Rows x, Rows residual, const float* weight, const float* bias, double eps, void* y,
          void* sum, float* mean, float* rstd) {
  if (s.center) {
    PYFAST_DISPATCH(t, T, forward<T, true>(s, x, residual, weight, bias, eps, (T*)y, (T*)sum, mean, rstd))
  } else {
    PYFAST_DISPATCH(t, T, forward<T, false>(s, x, residual, weight, bias, eps, (T*)y, (T*)sum, mean, rstd))
  }
}
void norm_backward(DType t, NormShape s, Rows dy, Rows dsum, Rows x, const float* mean, const float* rstd,
                   const float* weight, void* dx, float* dweight, float* dbias) {
  if (s.center) {
    PYFAST_DISPATCH(t, T, backward<T, true>(s, dy, dsum, x, mean, rstd, weight, (T*)dx, dweight, dbias))
  } else {
    PYFAST_DISPATCH(t, T, backward<T, false>(s, dy, dsum, x, mean, rstd, weight, (T*)dx, dweight, dbias))
  }
}

}  // namespace pyfast::PYFAST_ISA
