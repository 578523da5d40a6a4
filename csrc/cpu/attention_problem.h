// What every way to compute an attention problem shares: its geometry, its scores, and elementwise mathematics.
#pragma once
#include <algorithm>
#include <atomic>
#include <limits>
#include <type_traits>
#include <utility>

#include "common/philox.h"
#include "cpu/attention.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace pyfast::PYFAST_ISA {
namespace {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kInf = std::numeric_limits<float>::infinity();

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// work(i) for i in [0, count), taken by whichever thread is free; make() gives each thread its scratch
template <class Make, class Work>
void parallel_tasks(int64_t count, const Make& make, const Work& work) {
  std::atomic<int64_t> next{0};
  on_threads(std::min(count, num_threads()), [&](int64_t) {
    auto scratch = make();
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i, *scratch);
  });
}

// e^x for x <= 0 or a little above; 0 below -87, where results would be subnormal (and scalef slow); NaN for NaN. Own
// minimax polynomial of the reduced argument, relative error 3e-9 after Cody-Waite reduction by ln 2 in two parts.
PF_INLINE fvec exp_below(fvec x) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves an integer
  constexpr float kLeast = -87.f;
  fvec n = (x * kLog2e + kRound) - kRound;
  fvec r = without_ln2(x, n);
  fvec p = splat(1.381454008e-3f);
  p = p * r + 8.368745213e-3f;
  p = p * r + 4.166839079e-2f;
  p = p * r + 1.666652040e-1f;
  p = p * r + 4.999999343e-1f;
  p = p * (r * r) + r + 1.f;
#ifdef __AVX512F__
  __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(kLeast), _CMP_NLT_UQ);
  return (fvec)_mm512_maskz_scalef_ps(counts, (__m512)p, (__m512)n);
#else
  fvec scaled = (fvec)((ivec)p + (__builtin_convertvector(n, ivec) << 23));
  return x < kLeast ? fvec{} : scaled;
#endif
}

#ifdef __AVX512F__
// 2^x likewise, for what is rounded to bf16: own minimax polynomial of the fraction, relative error 3e-6. scalef takes
// the integral part by itself.
PF_INLINE fvec exp2_below(fvec x) {
  fvec r = (fvec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  fvec p = splat(1.342668427e-2f);
  p = p * r + 5.224247422e-2f;
  p = p * r + 2.412802048e-1f;
  p = p * r + 6.930448449e-1f;
  p = p * r + 1.f;
  __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(-126.f), _CMP_NLT_UQ);
  return (fvec)_mm512_maskz_scalef_ps(counts, (__m512)p, (__m512)x);
}
#endif

// e^(x * factor - base), in the precision that C is multiplied in. kFinished: factor is 1, and x and base may be as
// large as floats are. Without it base_log2, base * log2(e), saves an instruction.
template <class C, bool kFinished>
PF_INLINE fvec exp_above(fvec x, float factor, fvec base, fvec base_log2) {
#ifdef __AVX512F__
  if constexpr (std::is_same_v<C, bf16>)
    return exp2_below(kFinished ? (x - base) * kLog2e : x * (factor * kLog2e) - base_log2);
#endif
  return exp_below(kFinished ? x - base : x * factor - base);
}

template <class T, class U>
inline float dot(const T* x, const U* y, int64_t n) {
  fvec sum{};
  for_lanes(n, [&](int64_t i, int lanes) { sum += load_any(x + i, lanes) * load_any(y + i, lanes); });
  return hsum(sum);
}

// Copies rows to a padded row-major block (padded_rows, padded_columns), converting them; what is beyond them is 0.
template <class T, class C>
inline void pack_rows(const T* x, int64_t stride, int64_t rows, int64_t columns, C* y, int64_t padded_rows,
                      int64_t padded_columns) {
  constexpr int64_t kAhead = 8, kLine = 64 / sizeof(T);  // rows lie apart: the processor does not see which comes next
  for (int64_t r = 0; r < rows; ++r, x += stride, y += padded_columns) {
    for (int64_t i = 0; i < columns; i += kLine) __builtin_prefetch(x + kAhead * stride + i);
    int64_t i = 0;
    if constexpr (std::is_same_v<T, C>) {
      for (; i + kLine <= columns; i += kLine) std::memcpy(y + i, x + i, kLine * sizeof(T));
      if (i < columns) std::memcpy(y + i, x + i, (columns - i) * sizeof(C));
    } else {
      for_lanes(columns, [&](int64_t i, int lanes) { store_any(y + i, load_any(x + i, lanes), lanes); });
    }
    if (columns < padded_columns) std::memset(y + columns, 0, (padded_columns - columns) * sizeof(C));
  }
  std::memset(y, 0, (padded_rows - rows) * padded_columns * sizeof(C));
}

// ---- the geometry of a problem

// One sequence (packed) or batch element: where it lies and how long it is.
struct Sequence {
  int64_t q_offset, k_offset, out_offset, dout_offset, v_offset, dq_offset, dkv_offset;
  int64_t row;  // of maximum and log_sum, for head 0 and query 0
  int64_t sq, sk;
  int64_t shift;                // query i stands at position i + shift
  int64_t first_key, last_key;  // attention_mask excludes the keys before and from here
};

struct Problem : Attention {
  explicit Problem(const Attention& a) : Attention(a) {}

  Sequence sequence(int64_t n) const {
    Sequence s;
    int64_t q0 = bounds_q ? bounds_q[n] : 0, k0 = bounds_k ? bounds_k[n] : 0, b = bounds_q ? 0 : n;
    auto offset = [&](const Strides& t, int64_t row) { return b * t.batch + row * t.row; };
    s.q_offset = offset(q_strides, q0), s.out_offset = offset(out_strides, q0),
    s.dout_offset = offset(dout_strides, q0);
    s.k_offset = offset(k_strides, k0), s.v_offset = offset(v_strides, k0), s.dq_offset = offset(dq_strides, q0);
    s.dkv_offset = offset(dkv_strides, k0);
    s.row = b * heads * sq + q0;
    s.sq = bounds_q ? bounds_q[n + 1] - q0 : sq;
    s.sk = bounds_k ? bounds_k[n + 1] - k0 : sk;
    s.shift = s.sk - s.sq;
    s.first_key = 0, s.last_key = s.sk;
    if (const bool* counts = keys(n)) {
      while (s.first_key < s.last_key && !counts[s.first_key]) ++s.first_key;
      s.first_key -= s.first_key % 2;  // kernels sum keys by pairs: the same ones whatever is masked before them
      while (s.first_key < s.last_key && !counts[s.last_key - 1]) --s.last_key;
    }
    return s;
  }
  int64_t group() const { return heads / kv_heads; }
  const bool* keys(int64_t n) const { return mask ? mask + n * sk : nullptr; }
  // softcap, bias or dropout: scores need more than a scale
  bool general() const { return softcap > 0 || bias || dropout_p > 0; }

  // [first, last) of the keys that any of the queries [i0, i1) may see, and of the queries that may see [j0, j1)
  std::pair<int64_t, int64_t> keys_of(const Sequence& s, int64_t i0, int64_t i1) const {
    int64_t first = left < 0 ? s.first_key : std::max(s.first_key, i0 + s.shift - left);
    int64_t last = right < 0 ? s.last_key : std::min(s.last_key, i1 + s.shift + right);
    return {first, std::max(first, last)};
  }
  std::pair<int64_t, int64_t> queries_of(const Sequence& s, int64_t j0, int64_t j1) const {
    int64_t first = right < 0 ? 0 : std::max<int64_t>(0, j0 - right - s.shift);
    int64_t last = left < 0 ? s.sq : std::min(s.sq, j1 + left - s.shift);
    return {first, std::max(first, last)};
  }
};

// A block of scores: keys j0 .. j0 + keys (padded) by queries i0 .. i0 + queries (padded) of head h of sequence n.
struct Block {
  int64_t n, h, i0, j0, keys, queries;
};

// Turns raw products into scores, excluded keys -inf, and notes what backward multiplies: the derivative
// of the softcap and the dropout factors. Only for blocks that are masked, or where the problem is general.
void finish_scores(const Problem& a, const Sequence& s, const Block& b, float* scores, float* cap_slope,
                   float* dropout_factor) {
  const int64_t ld = b.queries, rows = std::min(b.keys, s.sk - b.j0), columns = std::min(b.queries, s.sq - b.i0);
  if (a.softcap > 0) {
    for (int64_t x = 0; x < rows * ld; x += VL) {
      fvec t = tanh(load(scores + x) * (a.scale / a.softcap));
      store(scores + x, t * a.softcap);
      if (cap_slope) store(cap_slope + x, 1.f - t * t);
    }
    if (cap_slope) std::fill(cap_slope + rows * ld, cap_slope + b.keys * ld, 0.f);  // padded keys: dS = 0 * this
  } else {
    for (int64_t x = 0; x < rows * ld; x += VL) store(scores + x, load(scores + x) * a.scale);
  }
  if (a.bias) {
    PYFAST_DISPATCH(a.bias_dtype, T, {
      const int64_t* t = a.bias_strides;
      for (int64_t i = 0; i < columns; ++i) {
        const T* bias = (const T*)a.bias + b.n * t[0] + b.h * t[1] + (b.i0 + i) * t[2] + b.j0 * t[3];
        for (int64_t j = 0; j < rows; ++j) scores[j * ld + i] += to_float(bias[j * t[3]]);
      }
    })
  }
  if (a.dropout_p > 0) {
    Dropout(a.dropout_p, a.seed)
        .fill_transposed(uint64_t(s.row + b.h * a.sq + b.i0) * a.dropout_keys + b.j0, a.dropout_keys, columns, rows,
                         dropout_factor, ld);
    for (int64_t j = 0; j < b.keys; ++j)
      std::fill(dropout_factor + j * ld + (j < rows ? columns : 0), dropout_factor + (j + 1) * ld, 0.f);
  }
  const bool* keys = a.keys(b.n);
  for (int64_t j = 0; j < b.keys; ++j) {
    auto [first, last] = a.queries_of(s, b.j0 + j, b.j0 + j + 1);
    first = std::clamp<int64_t>(first - b.i0, 0, ld), last = std::clamp<int64_t>(last - b.i0, 0, ld);
    if (j >= rows || (keys && !keys[b.j0 + j])) last = first;
    std::fill(scores + j * ld, scores + j * ld + first, -kInf);
    std::fill(scores + j * ld + std::max(first, last), scores + (j + 1) * ld, -kInf);
  }
}

// True where every query of the block sees every key. (Queries beyond the sequence are dropped in another way.)
bool all_visible(const Problem& a, const Sequence& s, const Block& b) {
  if (b.j0 + b.keys > s.sk) return false;
  if (a.right >= 0 && b.j0 + b.keys - 1 > b.i0 + s.shift + a.right) return false;
  if (a.left >= 0 && b.j0 < std::min(b.i0 + b.queries, s.sq) - 1 + s.shift - a.left) return false;
  const bool* keys = a.keys(b.n);
  return !keys || !std::memchr(keys + b.j0, 0, b.keys);
}

}  // namespace
}  // namespace pyfast::PYFAST_ISA
