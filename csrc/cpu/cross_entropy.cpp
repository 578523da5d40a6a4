// Softmax cross-entropy of rows of logits: one online-softmax pass over a row, then, while it is in cache, one that
// turns logits into their gradient. Rows are spread over threads.
//
// With m the row's largest logit, s = sum exp(z - m), lse = m + log s, target y, class weights w, smoothing e:
//   loss = (1 - e) w_y (lse - z_y) + e / V sum_c w_c (lse - z_c)
// and, for upstream gradients a of the loss and b of lse²:
//   dz_c = (a ((1 - e) w_y + e / V sum w) + 2 b lse) p_c - a e / V w_c - a (1 - e) w_y [c = y]
// A row's own few scalars are doubles.
// lse - z is taken as log s - (z - m): logits with a large common offset lose nothing.
#include "cpu/cross_entropy.h"

#include <type_traits>
#include <vector>

#include "cpu/amx.h"
#include "cpu/logits.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace pyfast::PYFAST_ISA {
namespace {

constexpr int64_t kSpan = 1024;    // logits per step of the online softmax: a few KB, in L1 from its maximum to its sum
constexpr int64_t kGrain = 16384;  // elements per task

// A sum that carries its rounding errors along (Dekker's Fast2Sum): rows of nearly equal terms round all the same way.
struct Sum {
  fvec sum = {}, error = {};
  PF_INLINE void add(fvec x) {
    fvec next = sum + x;
    error += x - (next - sum);
    sum = next;
  }
  double total() const {
    double t = 0.0;
    for (int i = 0; i < VL; ++i) t += std::isinf(sum[i]) ? sum[i] : double(sum[i]) + double(error[i]);
    return t;
  }
};

// exp(x) for x <= 0. Beside 16-bit logits, on AVX-512, 2^n (1 + f q(f)) with own minimax fit of q, relative error 9e-8
// and none at 0, so that a row with one great logit keeps its small loss; half the work of the exact one.
template <class T>
PF_INLINE fvec decay(fvec x) {
#ifdef __AVX512F__
  if constexpr (sizeof(T) == 2) {
    x = PYFAST_ISA::max(splat(-104.f), x);
    fvec n = round_even(x * 1.44269504f), f = x * 1.44269504f - n;
    fvec p = splat(1.326472877e-3f);
    p = p * f + 9.671513183e-3f;
    p = p * f + 5.550733744e-2f;
    p = p * f + 2.402224208e-1f;
    p = p * f + 6.931469776e-1f;
    return (fvec)_mm512_scalef_ps((__m512)(p * f + 1.f), (__m512)n);
  }
#endif
  return PYFAST_ISA::exp(x);
}

// The largest of n >= 1 numbers by their bits, whose order as integers is theirs once negative ones are turned around;
// twice as many to a vector as fp32. A NaN stands beyond the infinities: the result may be one.
inline float largest_of(const bf16* x, int64_t n) {
  const auto turned = [](int16_t bits) { return int16_t(bits ^ (bits >> 15 & 0x7fff)); };
  int16_t top = INT16_MIN;
  for (int64_t i = 0; i < n; ++i) {
    int16_t bits = turned(int16_t(x[i].bits));
    top = bits > top ? bits : top;
  }
  return to_float(bf16{uint16_t(turned(top))});
}

// Stores four vectors. `packed`: T is bf16 and the CPU converts two vectors at once (every one with AMX does); it turns
// subnormal values into zeros.
template <bool packed, class T>
PF_INLINE void store4(T* p, const fvec* v) {
#ifdef __AVX512F__
  if constexpr (packed) {
    for (int k = 0; k < 4; k += 2) _mm512_storeu_si512(p + k * VL, pack_bf16(v[k], v[k + 1]));
    return;
  }
#endif
  for (int k = 0; k < 4; ++k) store(p + k * VL, v[k]);
}

// body(i, n) for n vectors or fewer lanes: four vectors at a time first, for the processor to overlap
template <class F>
PF_INLINE void for_vectors(int64_t count, F&& body) {
  int64_t i = 0;
  for (; i + 4 * VL <= count; i += 4 * VL) body(i, std::integral_constant<int, 4>{}, VL);
  for (; i < count; i += VL) body(i, std::integral_constant<int, 1>{}, count - i < VL ? int(count - i) : VL);
}

template <class T, class Transform, bool packed>
struct Row {
  const T* x;
  int64_t classes;
  Transform transform;
  float* exps;      // exp(z - the tile's maximum), for the gradient; null where none is wanted
  float* tile_max;  // the largest logit up to and with each tile, which its exps are relative to
  float max = -INFINITY;
  double sum = 0.0;  // of exp(z - max)

  PF_INLINE fvec logit(int64_t c, int lanes) const { return transform.logit(load_any(x + c, lanes)); }

  float largest_logit(int64_t begin, int64_t n) const {
    if constexpr (std::is_same_v<T, bf16> && !Transform::sloped) return largest_of(x + begin, n);
    fvec top[4] = {splat(-INFINITY), splat(-INFINITY), splat(-INFINITY), splat(-INFINITY)};
    for_vectors(n, [&](int64_t i, auto vectors, int lanes) {
      for (int k = 0; k < vectors; ++k)
        top[k] = PYFAST_ISA::max(first(logit(begin + i + k * VL, lanes), lanes, -INFINITY), top[k]);
    });
    return hmax(PYFAST_ISA::max(PYFAST_ISA::max(top[0], top[1]), PYFAST_ISA::max(top[2], top[3])));
  }

  template <bool keep>
  void softmax(const T* dx) {
    for (int64_t begin = 0, tile = 0; begin < classes; begin += kSpan, ++tile) {
      int64_t n = classes - begin < kSpan ? classes - begin : kSpan;
      float largest = largest_logit(begin, n);
      if (largest > max) {
        sum *= std::exp(double(max) - largest);
        max = largest;
      }
      float shift = max == -INFINITY ? 0.f : max;  // every logit so far is -inf, or a NaN, which must stay one
      if constexpr (keep) tile_max[tile] = max;
      Sum terms;
      for_vectors(n, [&](int64_t i, auto vectors, int lanes) {
        fvec e[vectors];
        for (int k = 0; k < vectors; ++k) {
          int64_t c = begin + i + k * VL;
          _mm_prefetch((const char*)(x + c + kSpan), _MM_HINT_T0);  // the next tile comes while this one is computed
          e[k] = decay<T>(first(logit(c, lanes), lanes, -INFINITY) - shift);
          if constexpr (keep) {
            store(exps + c, e[k]);
            __asm__ volatile("prefetchw %0" ::"m"(*(const char*)(dx + c)));  // where the gradient will go
          }
        }
        terms.add(vectors == 4 ? (e[0] + e[1]) + (e[vectors / 2] + e[vectors - 1]) : e[0]);
      });
      sum += terms.total();
    }
  }

  // sum over c of w_c (max - z_c)
  double weighted_distance(const float* weight) const {
    Sum sums;
    for_lanes(classes, [&](int64_t c, int lanes) {
      fvec distance = max - logit(c, lanes);
      sums.add(first(weight ? distance * load_any(weight + c, lanes) : distance, lanes, 0.f));
    });
    return sums.total();
  }

  // dx = (p · softmax_gradient - w · smoothing_gradient) · slope; x may be dx
  template <bool smoothing>
  void gradient(T* dx, double softmax_gradient, const float* weight, float smoothing_gradient) const {
    for (int64_t begin = 0, tile = 0; begin < classes; begin += kSpan, ++tile) {
      int64_t n = classes - begin < kSpan ? classes - begin : kSpan;
      fvec factor = splat(float(std::exp(double(tile_max[tile]) - max) * softmax_gradient / sum));
      for_vectors(n, [&](int64_t i, auto vectors, int lanes) {
        fvec d[vectors];
        for (int k = 0; k < vectors; ++k) {
          int64_t c = begin + i + k * VL;
          d[k] = load(exps + c) * factor;
          if constexpr (smoothing)
            d[k] -= weight ? smoothing_gradient * load_any(weight + c, lanes) : splat(smoothing_gradient);
          if constexpr (Transform::sloped) d[k] *= transform.slope(logit(c, lanes));
        }
        if constexpr (vectors == 4)
          store4<packed>(dx + begin + i, d);
        else
          store_any(dx + begin + i, d[0], lanes);
      });
    }
  }
};

// A thread's own memory for the exponentials of a row, kept between calls.
float* scratch(int64_t size) {
  static thread_local std::vector<float> buffer;
  if (int64_t(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

template <bool packed, class T, class Transform>
void run(const LossRows& r, Transform transform, const T* input, int64_t stride, T* dinput, int64_t dstride) {
  double weight_sum = r.classes;
  if (r.weight) {
    weight_sum = 0.0;
    for (int64_t c = 0; c < r.classes; ++c) weight_sum += r.weight[c];
  }
  double smooth = r.label_smoothing / double(r.classes);
  int64_t tiles = (r.classes + kSpan - 1) / kSpan;
  parallel_for(r.rows, kGrain / r.classes, [&](int64_t begin, int64_t end) {
    float* exps = r.upstream ? scratch(tiles * kSpan + tiles) : nullptr;
    for (int64_t i = begin; i < end; ++i) {
      int64_t at = r.index[i], place = r.gathered ? i : at, y = r.target[at];
      Row<T, Transform, packed> row{input + place * stride, r.classes, transform, exps, exps + tiles * kSpan};
      T* dx = dinput + place * dstride;
      r.upstream ? row.template softmax<true>(dx) : row.template softmax<false>(dx);
      fvec target_logit = row.logit(y, 1);
      double log_sum = std::log(row.sum), lse = row.max + log_sum, target_shifted = double(target_logit[0]) - row.max;
      double target_weight = r.weight ? r.weight[y] : 1.0, hard = (1.0 - r.label_smoothing) * target_weight;
      double loss = hard * (log_sum - target_shifted);
      if (smooth > 0.0) loss += smooth * (weight_sum * log_sum + row.weighted_distance(r.weight));
      r.loss[at] = loss;
      r.lse[at] = lse;
      if (!r.upstream) continue;
      double a = r.upstream[2 * at], b = r.upstream[2 * at + 1], p = std::exp(target_shifted) / row.sum;
      double target_gradient = a * (hard * (p - 1.0) + smooth * (weight_sum * p - target_weight)) + 2.0 * b * lse * p;
      double softmax_gradient = a * (hard + smooth * weight_sum) + 2.0 * b * lse;
      if (smooth > 0.0)
        row.template gradient<true>(dx, softmax_gradient, r.weight, float(a * smooth));
      else
        row.template gradient<false>(dx, softmax_gradient, nullptr, 0.f);
      dx[y] = from_float<T>(float(target_gradient * transform.slope(target_logit)[0]));
    }
  });
}

template <class T>
void column_sums(const T* x, int64_t rows, int64_t cols, float* sums) {
  parallel_for(cols, kGrain / (rows + 1) / VL * VL + VL, [=](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < rows; ++i)
      for_lanes(end - begin, [=](int64_t c, int lanes) {
        float* s = sums + begin + c;
        store_any(s, load_any(s, lanes) + load_any(x + i * cols + begin + c, lanes), lanes);
      });
  });
}

template <class T>
void scaled(const T* x, float scale, float* sums, int64_t n) {
  parallel_for(n, kGrain, [=](int64_t begin, int64_t end) {
    for_lanes(end - begin, [=](int64_t i, int lanes) {
      float* s = sums + begin + i;
      store_any(s, load_any(s, lanes) + scale * load_any(x + begin + i, lanes), lanes);
    });
  });
}

}  // namespace

void cross_entropy(DType t, const LossRows& r, const void* input, int64_t stride, void* dinput, int64_t dstride) {
  bool plain = r.scale == 1.f && r.softcap == 0.f;
  PYFAST_DISPATCH(t, T, {
    constexpr bool packs = std::is_same_v<T, bf16> && VL == 16;
    const auto run_with = [&](auto transform) {
      if (packs && current_isa() == Isa::amx)
        run<packs>(r, transform, (const T*)input, stride, (T*)dinput, dstride);
      else
        run<false>(r, transform, (const T*)input, stride, (T*)dinput, dstride);
    };
    plain ? run_with(Plain{}) : run_with(Scaled{r.scale, r.softcap});
  })
}
void gather_rows(const void* from, const int64_t* index, int64_t rows, int64_t bytes, void* to) {
  parallel_for(rows, 16, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      std::memcpy((char*)to + i * bytes, (const char*)from + index[i] * bytes, bytes);
  });
}
void scatter_rows(const void* from, const int64_t* index, int64_t rows, int64_t bytes, void* to) {
  parallel_for(rows, 16, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      std::memcpy((char*)to + index[i] * bytes, (const char*)from + i * bytes, bytes);
  });
}
void add_column_sums(DType t, const void* x, int64_t rows, int64_t cols, float* sums) {
  PYFAST_DISPATCH(t, T, column_sums((const T*)x, rows, cols, sums))
}
void add_scaled(DType t, const void* x, float scale, float* sums, int64_t n) {
  PYFAST_DISPATCH(t, T, scaled((const T*)x, scale, sums, n))
}

}  // namespace pyfast::PYFAST_ISA
