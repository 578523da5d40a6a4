// Attention over short sequences, as batches of sentences hold them, in fp32: the keys of a head form one block, so
// that nothing is rescaled and products have the size of the sequence, its queries rounded up to whole vectors. Blocks
// are held transposed, (keys, queries), as in attention.cpp; products with their transposed or row-major form read them
// as they lie, so that only Qᵀ and dOᵀ are made, and fp32 inputs and results are used in place.
#pragma once
#include <vector>

#include "cpu/attention_problem.h"

namespace pyfast::PYFAST_ISA {
namespace {

constexpr int64_t kShort = 128;  // queries and keys of a short sequence
constexpr int64_t kShortQueries = 64;

inline bool is_short(const Sequence& s) { return s.sq <= kShort && s.sk <= kShort; }

template <class T>
struct Short {
  const Problem& a;
  const int64_t D = round_up(a.dim, VL);

  struct Operand {
    const float* data;
    int64_t ld;
    const float* row(int64_t i) const { return data + i * ld; }
  };
  // One thread's buffers, of one allocation: calls on short sequences are too short for many.
  struct Memory {
    Memory(int64_t D, int64_t longest_q, int64_t longest_k)
        : queries(round_up(std::min(longest_q, kShortQueries), VL)),
          keys(longest_k),
          all(4 * keys * D + 4 * queries * D + 4 * keys * queries) {
      float* next = all;
      for (float** x : {&k, &v, &dk, &dv}) *x = next, next += keys * D;
      for (float** x : {&q, &dout, &q_t, &do_t}) *x = next, next += queries * D;
      for (float** x : {&scores, &dp, &dropout, &cap_slope}) *x = next, next += keys * queries;
    }
    int64_t queries, keys;
    Scratch<float> all;
    float *k, *v, *dk, *dv, *q, *dout, *q_t, *do_t, *scores, *dp, *dropout, *cap_slope;
    float rescale[kShortQueries];
  };

  // `rows` rows of D columns in fp32: where they lie, if they are such, else in `copy`
  Operand operand(const void* x, int64_t offset, const Strides& t, int64_t head, int64_t first, int64_t rows,
                  float* copy) const {
    const T* data = (const T*)x + offset + head * t.head + first * t.row;
    if constexpr (std::is_same_v<T, float>)
      if (a.dim % VL == 0) return {data, t.row};
    pack_rows(data, t.row, rows, a.dim, copy, rows, D);
    return {copy, D};
  }

  // body(block, its queries) for the blocks of a key/value head's heads
  template <class F>
  void for_blocks(const Sequence& s, int64_t n, int64_t hk, const F& body) const {
    for (int64_t h = hk * a.group(); h < (hk + 1) * a.group(); ++h)
      for (int64_t i0 = 0; i0 < s.sq; i0 += kShortQueries) {
        const int64_t rows = std::min(kShortQueries, s.sq - i0);
        const auto [first, last] = a.keys_of(s, i0, i0 + rows);
        body(Block{n, h, i0, first, last - first, round_up(rows, VL)}, rows);
      }
  }

  // ---- forward: one key/value head of a sequence
  void forward(int64_t n, int64_t hk, Memory& m) const {
    const Sequence s = a.sequence(n);
    const Operand k = operand(a.k, s.k_offset, a.k_strides, hk, 0, s.last_key, m.k);
    const Operand v = operand(a.v, s.v_offset, a.v_strides, hk, 0, s.last_key, m.v);
    for_blocks(s, n, hk, [&](const Block& b, int64_t rows) {
      const auto [sequence, h, i0, first, keys, ld] = b;
      const Operand q = operand(a.q, s.q_offset, a.q_strides, h, i0, rows, m.q);
      transpose32(q.data, q.ld, m.q_t, ld, rows, D);
      multiply<false>(keys, a.dim, k.row(first), k.ld, m.q_t, ld, Destination<float>{m.scores, ld, ld});
      const bool finish = a.general() || !all_visible(a, s, b);
      if (finish) finish_scores(a, s, b, m.scores, nullptr, m.dropout);
      softmax(s, b, rows, finish ? 1.f : a.scale, m);
      T* out = (T*)a.out + s.out_offset + h * a.out_strides.head + i0 * a.out_strides.row;
      multiply<true>(rows, keys, m.scores, ld, v.row(first), v.ld,
                     Destination<T>{out, a.out_strides.row, a.dim, false, m.rescale});
    });
  }

  // Scores become exponentials, dropped out; rescale divides by their sum.
  void softmax(const Sequence& s, const Block& b, int64_t rows, float factor, Memory& m) const {
    const int64_t ld = b.queries, row = s.row + b.h * a.sq + b.i0;
    const bool dropout = a.dropout_p > 0;
    for (int64_t i = 0; i < rows; i += VL) {
      float* x = m.scores + i;
      const fvec sink = splat(a.sinks ? a.sinks[b.h] : -kInf);
      fvec top0 = sink, top1 = sink;
      int64_t j = 0;
      for (; j + 2 <= b.keys; j += 2) {
        top0 = max(top0, load(x + j * ld) * factor);
        top1 = max(top1, load(x + (j + 1) * ld) * factor);
      }
      if (j < b.keys) top0 = max(top0, load(x + j * ld) * factor);
      const fvec top = max(top0, top1), base = top == -kInf ? fvec{} : top;  // without a key: exp(-inf - 0) = 0
      fvec sum0{}, sum1{};
      auto exponential = [&](int64_t j) {
        fvec p = exp_below(load(x + j * ld) * factor - base);
        store(x + j * ld, dropout ? p * load(m.dropout + j * ld + i) : p);
        return p;
      };
      for (j = 0; j + 2 <= b.keys; j += 2) sum0 += exponential(j), sum1 += exponential(j + 1);
      if (j < b.keys) sum0 += exponential(j);
      fvec sum = sum0 + sum1;
      if (a.sinks) sum += exp_below(sink - base);
      const int lanes = int(std::min<int64_t>(VL, rows - i));
      store_any(a.maximum + row + i, top, lanes);
      store_any(a.log_sum + row + i, sum == 0.f ? fvec{} : log(sum), lanes);
      store(m.rescale + i, sum == 0.f ? fvec{} : 1.f / sum);
    }
  }

  // ---- backward: one key/value head of a sequence
  void backward(int64_t n, int64_t hk, Memory& m) const {
    const Sequence s = a.sequence(n);
    const Operand k = operand(a.k, s.k_offset, a.k_strides, hk, 0, s.last_key, m.k);
    const Operand v = operand(a.v, s.v_offset, a.v_strides, hk, 0, s.last_key, m.v);
    T* const dk = (T*)a.dk + s.dkv_offset + hk * a.dkv_strides.head;
    T* const dv = (T*)a.dv + s.dkv_offset + hk * a.dkv_strides.head;
    // summed where they belong, if that is fp32
    constexpr bool kInPlace = std::is_same_v<T, float>;
    Destination<float> sum_k{m.dk, D, a.dim}, sum_v{m.dv, D, a.dim};
    if constexpr (kInPlace) sum_k = {dk, a.dkv_strides.row, a.dim}, sum_v = {dv, a.dkv_strides.row, a.dim};
    auto zero = [&](int64_t first, int64_t last) {
      for (const auto& sum : {sum_k, sum_v})
        for (int64_t j = first; j < last; ++j) std::memset(sum.data + j * sum.ld, 0, a.dim * sizeof(float));
    };
    for_blocks(s, n, hk, [&](const Block& b, int64_t rows) {
      const auto [sequence, h, i0, first, keys, ld] = b;
      const Operand q = operand(a.q, s.q_offset, a.q_strides, h, i0, rows, m.q);
      const Operand dout = operand(a.dout, s.dout_offset, a.dout_strides, h, i0, rows, m.dout);
      transpose32(q.data, q.ld, m.q_t, ld, rows, D);
      transpose32(dout.data, dout.ld, m.do_t, ld, rows, D);
      multiply<false>(keys, a.dim, k.row(first), k.ld, m.q_t, ld, Destination<float>{m.scores, ld, ld});
      multiply<false>(keys, a.dim, v.row(first), v.ld, m.do_t, ld, Destination<float>{m.dp, ld, ld});
      const bool finish = a.general() || !all_visible(a, s, b);
      if (finish) finish_scores(a, s, b, m.scores, m.cap_slope, m.dropout);
      gradients(s, b, rows, finish ? 1.f : a.scale, m);
      if (!sum_k.accumulate) zero(0, first), zero(first + keys, s.sk);
      const Destination<float> part_k{sum_k.data + first * sum_k.ld, sum_k.ld, a.dim, sum_k.accumulate};
      const Destination<float> part_v{sum_v.data + first * sum_v.ld, sum_v.ld, a.dim, sum_v.accumulate};
      multiply<false>(keys, rows, m.scores, ld, dout.data, dout.ld, part_v);
      multiply<false>(keys, rows, m.dp, ld, q.data, q.ld, part_k);
      sum_k.accumulate = sum_v.accumulate = true;
      T* dq = (T*)a.dq + s.dq_offset + h * a.dq_strides.head + i0 * a.dq_strides.row;
      multiply<true>(rows, keys, m.dp, ld, k.row(first), k.ld, Destination<T>{dq, a.dq_strides.row, a.dim});
    });
    if (!sum_k.accumulate) zero(0, s.sk);
    if constexpr (!kInPlace)
      for (int64_t j = 0; j < s.sk; ++j)
        for_lanes(a.dim, [&](int64_t d, int lanes) {
          store_any(dk + j * a.dkv_strides.row + d, load_any(m.dk + j * D + d, lanes), lanes);
          store_any(dv + j * a.dkv_strides.row + d, load_any(m.dv + j * D + d, lanes), lanes);
        });
  }

  // Scores become probabilities, dropped out, and dP becomes the gradient of Q Kᵀ. delta, the sum of P dP over the
  // keys, which are all here, is dO . O.
  void gradients(const Sequence& s, const Block& b, int64_t rows, float factor, Memory& m) const {
    const int64_t ld = b.queries, row = s.row + b.h * a.sq + b.i0;
    const bool dropout = a.dropout_p > 0;
    for (int64_t i = 0; i < rows; i += VL) {
      const int lanes = int(std::min<int64_t>(VL, rows - i));
      float *x = m.scores + i, *y = m.dp + i;
      fvec top = load_any(a.maximum + row + i, lanes);
      top = top == -kInf ? splat(kInf) : top;  // no key: P = 0
      const fvec share = exp_below(-load_any(a.log_sum + row + i, lanes));
      fvec delta{};
      for (int64_t j = 0; j < b.keys; ++j) {
        fvec p = exp_below(load(x + j * ld) * factor - top) * share, dp = load(y + j * ld);
        if (dropout) {  // P itself stays where its factors were
          fvec kept = load(m.dropout + j * ld + i);
          store(m.dropout + j * ld + i, p);
          store(x + j * ld, p * kept), store(y + j * ld, dp *= kept);
        } else {
          store(x + j * ld, p);
        }
        delta += p * dp;
      }
      if (a.dlse) delta -= load_any(a.dlse + row + i, lanes);
      for (int64_t j = 0; j < b.keys; ++j) {
        fvec p = dropout ? load(m.dropout + j * ld + i) : load(x + j * ld);
        fvec ds = p * (load(y + j * ld) - delta) * a.scale;
        if (a.softcap > 0) ds *= load(m.cap_slope + j * ld + i);
        store(y + j * ld, ds);
      }
    }
  }
};

// The sequences of a problem that `chosen` takes: one task per key/value head of each.
template <class T>
struct ShortSequences {
  template <class Chosen>
  ShortSequences(const Problem& a, const Chosen& chosen) : kernel{a} {
    for (int64_t n = 0; n < a.batch; ++n) {
      const Sequence s = a.sequence(n);
      if (!chosen(s)) continue;
      found.push_back(n);
      longest_q = std::max(longest_q, s.sq), longest_k = std::max(longest_k, s.sk);
    }
  }
  void forward() const { run(&Short<T>::forward); }
  void backward() const { run(&Short<T>::backward); }

  Short<T> kernel;
  std::vector<int64_t> found;
  int64_t longest_q = 0, longest_k = 0;

 private:
  using Memory = typename Short<T>::Memory;
  void run(void (Short<T>::*part)(int64_t, int64_t, Memory&) const) const {
    const int64_t heads = kernel.a.kv_heads;
    parallel_tasks(
        found.size() * heads, [&] { return std::make_unique<Memory>(kernel.D, longest_q, longest_k); },
        [&](int64_t t, Memory& m) { (kernel.*part)(found[t / heads], t % heads, m); });
  }
};

}  // namespace
}  // namespace pyfast::PYFAST_ISA
