// Attention of so few queries (generation) that it is bound by reading K and V: they are read in place, once for up to
// four rows of a group of heads. Scores lie as (key, row), the rows of a key side by side, so that the sums of a
// register of scores are reduced together, and exponentials are taken of whole registers.
#pragma once
#include <vector>

#include "cpu/attention_problem.h"

namespace pyfast::PYFAST_ISA {
namespace {

constexpr int64_t kFewQueries = 4;

inline bool has_few_queries(const Sequence& s) { return s.sq <= kFewQueries; }

// One step of a tree that turns VL registers into one whose lane i is the sum of register i's lanes
template <int kStep>
PF_INLINE void reduce_step(fvec* r) {
  uvec low, high;  // as in transpose_step
  for (int i = 0; i < VL; ++i) {
    low[i] = i & kStep ? VL + i - kStep : i;
    high[i] = i & kStep ? VL + i : i + kStep;
  }
#pragma GCC unroll 16
  for (int i = 0; i < VL; i += 2 * kStep)
    r[i] = __builtin_shuffle(r[i], r[i + kStep], low) + __builtin_shuffle(r[i], r[i + kStep], high);
}
PF_INLINE fvec reduce(fvec* r) {
  reduce_step<1>(r);
  reduce_step<2>(r);
  reduce_step<4>(r);
  if constexpr (VL == 16) reduce_step<VL / 2>(r);
  return r[0];
}

// R rows (query heads and queries of one group), a power of two; those beyond the last one there is repeat it, unused.
template <class T, int R>
struct Few {
  const Problem& a;
  const int64_t D = round_up(a.dim, VL);
  static constexpr int kKeys = VL / R;  // of a register of scores

  struct Memory {
    Memory(int64_t keys, int64_t D) : q(R * D), out(R * D), scores(round_up(keys, kKeys) * R), dropout(keys) {}
    Scratch<float> q, out, scores, dropout;
  };

  // rows first_row to last_row of the group, row x being head x / sq, query x % sq
  void task(int64_t n, int64_t hk, int64_t first_row, int64_t last_row, Memory& m) const {
    const Sequence s = a.sequence(n);
    int64_t head[R], query[R];
    for (int r = 0; r < R; ++r) {
      const int64_t x = std::min(first_row + r, last_row - 1);
      head[r] = hk * a.group() + x / s.sq, query[r] = x % s.sq;
      pack_rows((const T*)a.q + s.q_offset + head[r] * a.q_strides.head + query[r] * a.q_strides.row, 0, 1, a.dim,
                m.q + r * D, 1, D);
    }
    const auto [first, last] =
        a.keys_of(s, *std::min_element(query, query + R), *std::max_element(query, query + R) + 1);
    const int64_t count = last - first, size = round_up(count, kKeys) * R;
    const T* k = (const T*)a.k + s.k_offset + hk * a.k_strides.head + first * a.k_strides.row;
    const T* v = (const T*)a.v + s.v_offset + hk * a.v_strides.head + first * a.v_strides.row;
    multiply_keys(k, count, m.q, m.scores);
    finish(s, n, head, query, first, count, m);
    std::fill(m.scores + count * R, m.scores + size, -kInf);

    float sink[VL], share[R];
    for (int i = 0; i < VL; ++i) sink[i] = a.sinks ? a.sinks[head[i % R]] : -kInf;
    fvec top = load(sink), sums{};
    for (int64_t x = 0; x < size; x += VL) top = max(top, load(m.scores + x));
    top = per_row(top, [](float x, float y) { return x > y ? x : y; });
    const fvec base = top == -kInf ? fvec{} : top;
    for (int64_t x = 0; x < size; x += VL) {
      fvec p = exp_below(load(m.scores + x) - base);
      sums += p;
      store(m.scores + x, p);
    }
    sums = per_row(sums, [](float x, float y) { return x + y; });
    if (a.sinks) sums += exp_below(load(sink) - base);
    for (int r = 0; r < R; ++r) {
      const int64_t row = s.row + head[r] * a.sq + query[r];
      a.maximum[row] = top[r];
      a.log_sum[row] = sums[r] == 0 ? 0.f : std::log(sums[r]);
      share[r] = sums[r] == 0 ? 0.f : 1.f / sums[r];
      if (a.dropout_p > 0) {
        Dropout(a.dropout_p, a.seed).fill(uint64_t(row) * a.dropout_keys + first, count, m.dropout);
        for (int64_t j = 0; j < count; ++j) m.scores[j * R + r] *= m.dropout[j];
      }
    }
    std::fill_n((float*)m.out, R * D, 0.f);
    for (int64_t j = 0; j < count; j += kBlock)  // sums of sums: fewer roundings
      multiply_values(v + j * a.v_strides.row, std::min(kBlock, count - j), m.scores + j * R, m.out);
    for (int r = 0; r < last_row - first_row; ++r) {
      T* out = (T*)a.out + s.out_offset + head[r] * a.out_strides.head + query[r] * a.out_strides.row;
      for_lanes(a.dim, [&](int64_t d, int lanes) { store_any(out + d, load(m.out + r * D + d) * share[r], lanes); });
    }
  }

 private:
  static constexpr int64_t kBlock = 256;
  static constexpr int64_t kAhead = 32;  // rows: measured with 48 heads of 512 keys, which no cache holds
  static void prefetch(const T* row, int64_t count) {
    for (int64_t d = 0; d < count; d += 64 / sizeof(T)) __builtin_prefetch(row + d);
  }

  // what f makes of the lanes of each row, in all of them
  template <class F>
  static fvec per_row(fvec x, const F& f) {
    for (int i = R; i < VL; ++i) x[i % R] = f(x[i % R], x[i]);
    for (int i = R; i < VL; ++i) x[i] = x[i % R];
    return x;
  }

  // raw scores of whole registers of keys: those beyond count repeat the last one
  void multiply_keys(const T* k, int64_t count, const float* q, float* scores) const {
    for (int64_t j = 0; j < count; j += kKeys) {
      const T* key[kKeys];
      for (int x = 0; x < kKeys; ++x) key[x] = k + std::min(j + x, count - 1) * a.k_strides.row;
      fvec sum[VL];
      for (fvec& x : sum) x = fvec{};
#pragma GCC unroll 16
      for (int x = 0; x < kKeys; ++x) {  // key by key, as they lie in memory
        prefetch(key[x] + kAhead * a.k_strides.row, a.dim);
        for_lanes(a.dim, [&](int64_t d, int lanes) {
          fvec part = load_any(key[x] + d, lanes);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) sum[x * R + r] += part * load(q + r * D + d);
        });
      }
      store(scores + j * R, reduce(sum));
    }
  }

  // From raw scores to scores, excluded keys -inf
  void finish(const Sequence& s, int64_t n, const int64_t* head, const int64_t* query, int64_t first, int64_t count,
              Memory& m) const {
    float* const x = m.scores;
    if (a.softcap > 0)
      for (int64_t i = 0; i < round_up(count, kKeys) * R; i += VL)
        store(x + i, tanh(load(x + i) * (a.scale / a.softcap)) * a.softcap);
    else
      for (int64_t i = 0; i < round_up(count, kKeys) * R; i += VL) store(x + i, load(x + i) * a.scale);
    if (a.bias)
      PYFAST_DISPATCH(a.bias_dtype, B, {
        const int64_t* t = a.bias_strides;
        for (int r = 0; r < R; ++r) {
          const B* bias = (const B*)a.bias + n * t[0] + head[r] * t[1] + query[r] * t[2] + first * t[3];
          for (int64_t j = 0; j < count; ++j) x[j * R + r] += to_float(bias[j * t[3]]);
        }
      })
    if (const bool* keys = a.keys(n))
      for (int64_t j = 0; j < count; ++j)
        if (!keys[first + j]) std::fill_n(x + j * R, R, -kInf);
    for (int r = 0; r < R && s.sq > 1; ++r) {
      const auto [from, to] = a.keys_of(s, query[r], query[r] + 1);
      for (int64_t j = 0; j < count; ++j)
        if (first + j < from || first + j >= to) x[j * R + r] = -kInf;
    }
  }

  // out += P V
  void multiply_values(const T* v, int64_t count, const float* p, float* out) const {
    constexpr int kVectors = VL == 16 ? 4 : 2;
    int64_t d = 0;
    for (; d + kVectors * VL <= a.dim; d += kVectors * VL) values<kVectors>(v + d, count, p, out + d, VL);
    for (; d < a.dim; d += VL) values<1>(v + d, count, p, out + d, int(std::min<int64_t>(VL, a.dim - d)));
  }
  template <int N>
  void values(const T* v, int64_t count, const float* p, float* out, int lanes) const {
    fvec sum[R][N] = {};
    for (int64_t j = 0; j < count; ++j) {
      prefetch(v + (j + kAhead) * a.v_strides.row, N * VL);
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) {
        fvec part = load_any(v + j * a.v_strides.row + i * VL, lanes);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[r][i] += part * p[j * R + r];
      }
    }
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < N; ++i) store(out + r * D + i * VL, load(out + r * D + i * VL) + sum[r][i]);
  }
};

// The sequences of few queries: a task per four (two, one) rows of a key/value head's group.
template <class T, int R>
void few_rows(const Problem& a) {
  struct Task {
    int64_t n, hk, first, last;
  };
  std::vector<Task> tasks;
  int64_t longest = 0;
  for (int64_t n = 0; n < a.batch; ++n) {
    const Sequence s = a.sequence(n);
    const int64_t rows = s.sq * a.group();
    if (!has_few_queries(s) || rows == 0) continue;
    longest = std::max(longest, s.sk);
    for (int64_t hk = 0; hk < a.kv_heads; ++hk)
      for (int64_t x = 0; x < rows; x += R) tasks.push_back({n, hk, x, std::min(rows, x + R)});
  }
  const Few<T, R> kernel{a};
  parallel_tasks(
      tasks.size(), [&] { return std::make_unique<typename Few<T, R>::Memory>(longest, kernel.D); },
      [&](int64_t t, auto& m) { kernel.task(tasks[t].n, tasks[t].hk, tasks[t].first, tasks[t].last, m); });
}

template <class T>
void few_queries(const Problem& a) {
  // rows of a group there may be: with one query, as many as it has heads
  const int64_t rows = a.group() * (a.bounds_q ? kFewQueries : std::min(a.sq, kFewQueries));
  if (rows >= 3) return few_rows<T, 4>(a);
  rows == 2 ? few_rows<T, 2>(a) : few_rows<T, 1>(a);
}

}  // namespace
}  // namespace pyfast::PYFAST_ISA
