// Softmax attention in blocks: scores exist for one block of queries and keys at a time (online softmax, Milakov and
// Gimelshein 2018; blocks and backward from lse, Dao et al. 2022 and 2023, "FlashAttention" 1 and 2).
//
// All blocks are held transposed, (keys, queries): Sᵀ = K Qᵀ. Then what belongs to a query (maximum, sum, lse, delta)
// is a vector along the lanes, so no horizontal reductions; Pᵀ and dSᵀ are the left operands of dV = Pᵀ dO and
// dK = dSᵀ Q as they lie; and two of their rows, interleaved while they are rounded, are the right operand of
// Oᵀ = Vᵀ Pᵀ and dQᵀ = Kᵀ dSᵀ. No block is transposed between products; only the inputs are, once.
//
// C is the type that is multiplied: bf16 with AMX, else fp32 (16-bit inputs are widened as they are packed).
#include "cpu/attention.h"

#include <vector>

#include "cpu/attention_few.h"
#include "cpu/attention_problem.h"
#include "cpu/attention_short.h"

namespace pyfast::PYFAST_ISA {
namespace {

constexpr int64_t kForwardKeys = 128, kForwardQueries = 64;  // block sizes: measured, see benchmarks/NOTES.md
constexpr int64_t kBackwardKeys = 256, kBackwardQueries = 64;
constexpr int64_t kPad = 32;  // rows and D are padded to what AMX's K dimension needs
struct NoTiles {};
#ifdef __AVX512F__
template <class C>
using TilesOf = std::conditional_t<std::is_same_v<C, bf16>, Tiles, NoTiles>;
#else
template <class C>
using TilesOf = NoTiles;
#endif

// Two rows of a block, 16 (or 8) columns, as operands: row-major for the left side, pairs for the right. In fp32 both
// are one array.
PF_INLINE void put(float* rows, float*, int64_t ld, int64_t j, int64_t i, fvec x0, fvec x1) {
  store(rows + j * ld + i, x0);
  store(rows + (j + 1) * ld + i, x1);
}
#ifdef __AVX512F__
PF_INLINE void put(bf16* rows, bf16* pairs, int64_t ld, int64_t j, int64_t i, fvec x0, fvec x1) {
  __m512i packed = pack_bf16(x0, x1);
  if (rows) {
    _mm256_storeu_si256((__m256i*)(rows + j * ld + i), _mm512_castsi512_si256(packed));
    _mm256_storeu_si256((__m256i*)(rows + (j + 1) * ld + i), _mm512_extracti64x4_epi64(packed, 1));
  }
  if (pairs) _mm512_storeu_si512(pairs + j * ld + 2 * i, pairs_of(packed));
}
#endif

// rows of T from a transposed fp32 block (columns, ld), each row times its factor
template <class T>
void store_transposed(const float* x, int64_t ld, int64_t rows, int64_t columns, int64_t padded_columns,
                      const float* factor, T* y, int64_t stride, float* scratch) {
  transpose32(x, ld, scratch, padded_columns, padded_columns, round_up(rows, 16));
  for (int64_t r = 0; r < rows; ++r) {
    float f = factor[r];
    for_lanes(columns, [&](int64_t i, int lanes) {
      store_any(y + r * stride + i, load_any(scratch + r * padded_columns + i, lanes) * f, lanes);
    });
  }
}

// ---- forward

// Leading dimension of a sequence's Vᵀ: padded beyond its keys, so that rows do not all fall into one set of the cache
inline int64_t values_ld(const Sequence& s) { return round_up(s.sk, kPad) + kPad; }

template <class T, class C>
struct Forward {
  const Problem& a;
  const int64_t D = round_up(a.dim, kPad);
  const C *keys, *values_t;   // per sequence and key/value head: K (sk, D), and Vᵀ (D, sk), padded
  const int64_t* packed_row;  // where a sequence begins in them, in rows

  struct Memory {
    Memory(int64_t D)
        : queries(kForwardQueries * D),
          queries_t(kForwardQueries * D),
          scores(kForwardKeys * kForwardQueries),
          dropout(kForwardKeys * kForwardQueries),
          probabilities(kForwardKeys * kForwardQueries),
          out_t(D * kForwardQueries),
          out(D * kForwardQueries) {}
    TilesOf<C> tiles;
    Scratch<C> queries, queries_t;
    Scratch<float> scores, dropout;
    Scratch<C> probabilities;
    Scratch<float> out_t, out;
    float maximum[kForwardQueries], sum[kForwardQueries], rescale[kForwardQueries];
  };

  void task(int64_t n, int64_t h, int64_t i0, Memory& m) const {
    const Sequence s = a.sequence(n);
    const int64_t rows = std::min(kForwardQueries, s.sq - i0), queries = round_up(rows, kPad), hk = h / a.group();
    const int64_t ldv = values_ld(s);
    const C* k = keys + (packed_row[n] * a.kv_heads + hk * ldv) * D;
    const C* vt = values_t + (packed_row[n] * a.kv_heads + hk * ldv) * D;
    pack_rows((const T*)a.q + s.q_offset + h * a.q_strides.head + i0 * a.q_strides.row, a.q_strides.row, rows, a.dim,
              (C*)m.queries, queries, D);
    pack_transposed(m.queries, m.queries_t, queries, D);
    bool sink = a.sinks && a.sinks[h] != -kInf;
    std::fill_n(m.maximum, queries, sink ? a.sinks[h] : -kInf);
    std::fill_n(m.sum, queries, sink ? 1.f : 0.f);
    std::fill_n((float*)m.out_t, D * queries, 0.f);
    auto [first, last] = a.keys_of(s, i0, i0 + rows);
    for (int64_t j0 = first / kPad * kPad; j0 < last; j0 += kForwardKeys) {
      Block b{n, h, i0, j0, std::min(kForwardKeys, round_up(last - j0, kPad)), queries};
      block_gemm(b.keys, queries, D, k + j0 * D, D, (const C*)m.queries_t, queries, m.scores, queries, false);
      if (a.general() || a.scale < 0 || !all_visible(a, s, b)) {
        finish_scores(a, s, b, m.scores, nullptr, m.dropout);
        softmax<true>(b, m, 1.f, a.dropout_p > 0);
      } else {
        softmax<false>(b, m, a.scale, false);
      }
      block_gemm(D, queries, b.keys, vt + j0, ldv, (const C*)m.probabilities, queries, m.out_t, queries, true);
    }
    const int64_t row = s.row + h * a.sq + i0;
    for (int64_t i = 0; i < rows; ++i) {
      bool no_key = m.sum[i] == 0;
      a.maximum[row + i] = m.maximum[i];
      a.log_sum[row + i] = no_key ? 0.f : std::log(m.sum[i]);
      m.rescale[i] = no_key ? 0.f : 1.f / m.sum[i];
    }
    store_transposed(m.out_t, queries, rows, a.dim, D, m.rescale,
                     (T*)a.out + s.out_offset + h * a.out_strides.head + i0 * a.out_strides.row, a.out_strides.row,
                     m.out);
  }

  // The online softmax of one block: new maxima, probabilities, sums; rescales the output where a maximum has grown.
  // factor is not negative.
  template <bool kFinished>
  void softmax(const Block& b, Memory& m, float factor, bool dropout) const {
    const int64_t ld = b.queries;
    fvec largest_growth{};
    for (int64_t i = 0; i < ld; i += VL) {
      float* x = m.scores + i;
      fvec top0 = splat(-kInf), top1 = top0;
      for (int64_t j = 0; j < b.keys; j += 2) {
        top0 = max(top0, load(x + j * ld));
        top1 = max(top1, load(x + (j + 1) * ld));
      }
      fvec before = load(m.maximum + i), top = max(max(top0, top1) * factor, before);
      // rows without a key yet: exp(-inf - 0) = 0
      const fvec base = top == -kInf ? fvec{} : top, base_log2 = base * kLog2e;
      fvec rescale = exp_below(before - base), sum0{}, sum1{};
      for (int64_t j = 0; j < b.keys; j += 2) {
        fvec p0 = exp_above<C, kFinished>(load(x + j * ld), factor, base, base_log2);
        fvec p1 = exp_above<C, kFinished>(load(x + (j + 1) * ld), factor, base, base_log2);
        sum0 += p0, sum1 += p1;
        if (kFinished && dropout) p0 *= load(m.dropout + j * ld + i), p1 *= load(m.dropout + (j + 1) * ld + i);
        if constexpr (std::is_same_v<C, float>)
          put((float*)m.probabilities, nullptr, ld, j, i, p0, p1);
        else
          put((C*)nullptr, (C*)m.probabilities, ld, j, i, p0, p1);
      }
      store(m.maximum + i, top);
      store(m.sum + i, load(m.sum + i) * rescale + (sum0 + sum1));
      store(m.rescale + i, rescale);
      largest_growth = max(largest_growth, top - before);
    }
    if (hmax(largest_growth) == 0.f) return;  // no maximum has grown
    for (int64_t d = 0; d < D; ++d)
      for (int64_t i = 0; i < ld; i += VL) {
        float* o = m.out_t + d * ld + i;
        store(o, load(o) * load(m.rescale + i));
      }
  }
};

// Zeros rows of a (batch, head, row, D) tensor that no sequence holds.
template <class T>
void zero_rows(T* x, const Strides& t, int64_t heads, int64_t first, int64_t last, int64_t dim) {
  for (int64_t row = first; row < last; ++row)
    for (int64_t h = 0; h < heads; ++h) std::memset(x + row * t.row + h * t.head, 0, dim * sizeof(T));
}

template <class T, class C>
void forward(const Problem& a) {
  ShortSequences<T>(a, [](const Sequence& s) { return is_short(s) && !has_few_queries(s); }).forward();
  few_queries<T>(a);
  const int64_t D = round_up(a.dim, kPad);
  std::vector<int64_t> packed_row(a.batch + 1, 0);
  struct Task {
    int64_t n, h, i0;
  };
  std::vector<Task> tasks, packs;
  for (int64_t n = 0; n < a.batch; ++n) {
    Sequence s = a.sequence(n);
    if (is_short(s) || has_few_queries(s)) {
      packed_row[n + 1] = packed_row[n];
      continue;
    }
    packed_row[n + 1] = packed_row[n] + values_ld(s);
    for (int64_t h = 0; h < a.heads; ++h)
      for (int64_t i0 = (ceil_div(s.sq, kForwardQueries) - 1) * kForwardQueries; i0 >= 0; i0 -= kForwardQueries)
        tasks.push_back({n, h, i0});
    for (int64_t h = 0; h < a.kv_heads; ++h)
      for (int64_t j0 = 0; j0 < s.sk; j0 += kForwardQueries) packs.push_back({n, h, j0});
  }
  Scratch<C> keys(packed_row.back() * a.kv_heads * D), values_t(packed_row.back() * a.kv_heads * D);
  struct Packing {
    Packing(int64_t D) : rows(kForwardQueries * D), pairs(kForwardQueries * D) {}
    Scratch<C> rows, pairs;
  };
  parallel_tasks(
      packs.size(), [&] { return std::make_unique<Packing>(D); },
      [&](int64_t t, Packing& m) {
        auto [n, h, j0] = packs[t];
        Sequence s = a.sequence(n);
        int64_t rows = std::min(kForwardQueries, s.sk - j0), padded = round_up(rows, kPad);
        int64_t begin = (packed_row[n] * a.kv_heads + h * values_ld(s)) * D;
        pack_rows((const T*)a.k + s.k_offset + h * a.k_strides.head + j0 * a.k_strides.row, a.k_strides.row, rows,
                  a.dim, keys + begin + j0 * D, padded, D);
        pack_rows((const T*)a.v + s.v_offset + h * a.v_strides.head + j0 * a.v_strides.row, a.v_strides.row, rows,
                  a.dim, (C*)m.rows, padded, D);
        pack_left_transposed(m.rows, m.pairs, values_t + begin + j0, values_ld(s), padded, D);
      });
  Forward<T, C> kernel{a, D, keys, values_t, packed_row.data()};
  parallel_tasks(
      tasks.size(), [&] { return std::make_unique<typename Forward<T, C>::Memory>(D); },
      [&](int64_t t, auto& m) { kernel.task(tasks[t].n, tasks[t].h, tasks[t].i0, m); });
  if (a.bounds_q) {
    int64_t end = a.bounds_q[a.batch];
    zero_rows((T*)a.out, a.out_strides, a.heads, end, a.sq, a.dim);
    for (int64_t h = 0; h < a.heads; ++h) {
      std::fill(a.maximum + h * a.sq + end, a.maximum + (h + 1) * a.sq, -kInf);
      std::fill(a.log_sum + h * a.sq + end, a.log_sum + (h + 1) * a.sq, 0.f);
    }
  }
}

// ---- backward

template <class T, class C>
struct Backward {
  const Problem& a;
  const int64_t D = round_up(a.dim, kPad);

  // A query block as operands: Qᵀ and dOᵀ for the scores and dP, Q and dO for dK and dV; and per query, what
  // its softmax subtracts (+inf where no key counts, so that probabilities come out 0), as maximum and the share of the
  // maximum, or both in one as lse in units of log 2; and delta = dO . O - dlse.
  struct Queries {
    Queries(int64_t rows, int64_t D)
        : q_t(rows * D),
          do_t(rows * D),
          q(rows * D),
          dout(rows * D),
          maximum(rows),
          share(rows),
          lse_log2(rows),
          delta(rows) {}
    Scratch<C> q_t, do_t, q, dout;
    Scratch<float> maximum, share, lse_log2, delta;
  };
  // What one strip of kPad keys needs.
  struct Strip {
    static constexpr int64_t kSize = kPad * kBackwardQueries;
    Scratch<float> scores{kSize}, dp{kSize}, cap_slope{kSize}, dropout{kSize};
  };

  void pack_queries(const Sequence& s, int64_t h, int64_t i0, int64_t at, Queries& m, C* scratch) const {
    const int64_t rows = std::min(kBackwardQueries, s.sq - i0), padded = round_up(rows, kPad);
    auto pack = [&](const void* x, int64_t offset, const Strides& t, C* transposed, C* pairs) {
      C* plain = std::is_same_v<C, bf16> ? scratch : pairs;
      pack_rows((const T*)x + offset + h * t.head + i0 * t.row, t.row, rows, a.dim, plain, padded, D);
      pack_transposed(plain, transposed, padded, D);
      if constexpr (std::is_same_v<C, bf16>) pack_pairs(plain, pairs, padded, D);
    };
    pack(a.q, s.q_offset, a.q_strides, m.q_t + at * D, m.q + at * D);
    pack(a.dout, s.dout_offset, a.dout_strides, m.do_t + at * D, m.dout + at * D);
    const int64_t row = s.row + h * a.sq + i0;
    for (int64_t i = 0; i < padded; i += VL) {
      const int lanes = int(std::clamp<int64_t>(rows - i, 0, VL));
      fvec top = load_n(a.maximum + row + i, lanes, -kInf), log_sum = load_n(a.log_sum + row + i, lanes);
      top = top == -kInf ? splat(kInf) : top;
      store(m.maximum + at + i, top);
      store(m.share + at + i, exp_below(-log_sum));
      store(m.lse_log2 + at + i, (top + log_sum) * kLog2e);
    }
    for (int64_t i = 0; i < padded; ++i) m.delta[at + i] = i < rows ? delta(s, h, i0 + i) : 0.f;
  }

  float delta(const Sequence& s, int64_t h, int64_t i) const {
    const T* out = (const T*)a.out + s.out_offset + h * a.out_strides.head + i * a.out_strides.row;
    const T* dout = (const T*)a.dout + s.dout_offset + h * a.dout_strides.head + i * a.dout_strides.row;
    return dot(out, dout, a.dim) - (a.dlse ? a.dlse[s.row + h * a.sq + i] : 0.f);
  }

  // From raw scores and dP of a strip: P and dS (before the factor `scale`), as operands. With keep_ds the gradient of
  // the scores after softcap and bias stays in strip.dp.
  template <bool kGeneral, bool kFinished>
  void gradients(const Block& b, float factor, Strip& m, const Queries& q, int64_t at, C* p, C* ds, C* ds_pairs,
                 bool keep_ds) const {
    const int64_t ld = b.queries;
    const bool dropout = kGeneral && a.dropout_p > 0, cap = kGeneral && a.softcap > 0;
    // scores that are finished may be so large that their lse loses the logarithm; in fp32 the sum is rounded once less
    constexpr bool kApart = kFinished || std::is_same_v<C, float>;
    for (int64_t j = 0; j < b.keys; j += 2)
      for (int64_t i = 0; i < ld; i += VL) {
        const int64_t x = j * ld + i, y = x + ld;
        const fvec d = load(q.delta + at + i), base = load(q.maximum + at + i);
        const fvec base_log2 = load(q.lse_log2 + at + i);
        fvec p0 = exp_above<C, kFinished>(load(m.scores + x), factor, base, base_log2);
        fvec p1 = exp_above<C, kFinished>(load(m.scores + y), factor, base, base_log2);
        if (kApart) {
          const fvec share = load(q.share + at + i);
          p0 *= share, p1 *= share;
        }
        fvec dp0 = load(m.dp + x), dp1 = load(m.dp + y), kept0 = p0, kept1 = p1;
        if (dropout) {
          fvec f0 = load(m.dropout + x), f1 = load(m.dropout + y);
          kept0 *= f0, kept1 *= f1, dp0 *= f0, dp1 *= f1;
        }
        fvec ds0 = p0 * (dp0 - d), ds1 = p1 * (dp1 - d);
        if (kGeneral && keep_ds) store(m.dp + x, ds0), store(m.dp + y, ds1);
        if (cap) ds0 *= load(m.cap_slope + x), ds1 *= load(m.cap_slope + y);
        put(p, (C*)nullptr, ld, j, i, kept0, kept1);
        put(ds, ds_pairs, ld, j, i, ds0, ds1);
      }
  }

  // P and dS of one strip of keys (k and v: its packed rows) against a packed query block.
  void strip(const Sequence& s, const Block& b, const C* k, const C* v, const Queries& q, int64_t at, Strip& m, C* p,
             C* ds, C* ds_pairs, bool keep_ds) const {
    block_gemm(b.keys, b.queries, D, k, D, q.q_t + at * D, b.queries, m.scores, b.queries, false);
    block_gemm(b.keys, b.queries, D, v, D, q.do_t + at * D, b.queries, m.dp, b.queries, false);
    bool general = a.general() || keep_ds, finish = general || !all_visible(a, s, b);
    if (finish) finish_scores(a, s, b, m.scores, m.cap_slope, m.dropout);
    float factor = finish ? 1.f : a.scale;
    if (general)
      gradients<true, true>(b, factor, m, q, at, p, ds, ds_pairs, keep_ds);
    else if (finish)
      gradients<false, true>(b, factor, m, q, at, p, ds, ds_pairs, false);
    else
      gradients<false, false>(b, factor, m, q, at, p, ds, ds_pairs, false);
  }

  struct Memory {
    Memory(int64_t D, int64_t queries, int64_t keys)
        : q(queries, D),
          scratch(std::max(kBackwardQueries, kPad) * D),
          k(keys * D),
          v(keys * D),
          k_t((keys + kPad) * D),
          p(kBackwardKeys * kBackwardQueries),
          ds(kBackwardKeys * kBackwardQueries),
          ds_pairs(kBackwardKeys * kBackwardQueries),
          dq_t(queries * D),
          dk(keys * D),
          dv(keys * D),
          rows(std::max(kBackwardQueries, kPad) * D) {}
    TilesOf<C> tiles;
    Queries q;
    Scratch<C> scratch, k, v, k_t, p, ds, ds_pairs;
    Scratch<float> dq_t, dk, dv, rows;
    Strip strip;
  };

  // dK and dV of keys c0 .. c1 of one key/value head, and their part of dQ: written to dq, or, where a sequence is
  // split, to dq_part (rows of maximum, D) in fp32.
  void task(int64_t n, int64_t hk, int64_t c0, int64_t c1, float* dq_part, Memory& m) const {
    const Sequence s = a.sequence(n);
    const int64_t count = c1 - c0, padded = round_up(count, kPad), ldk = padded + kPad;
    pack_rows((const T*)a.k + s.k_offset + hk * a.k_strides.head + c0 * a.k_strides.row, a.k_strides.row, count, a.dim,
              (C*)m.k, padded, D);
    pack_rows((const T*)a.v + s.v_offset + hk * a.v_strides.head + c0 * a.v_strides.row, a.v_strides.row, count, a.dim,
              (C*)m.v, padded, D);
    for (int64_t j = 0; j < padded; j += kPad) pack_left_transposed(m.k + j * D, m.scratch, m.k_t + j, ldk, kPad, D);
    std::fill_n((float*)m.dk, padded * D, 0.f);
    std::fill_n((float*)m.dv, padded * D, 0.f);
    auto seen = a.queries_of(s, c0, c1);
    const int64_t first = seen.first / kBackwardQueries * kBackwardQueries, last = count ? seen.second : first;
    for (int64_t h = hk * a.group(); h < (hk + 1) * a.group(); ++h) {
      for (int64_t i0 = first; i0 < last; i0 += kBackwardQueries) pack_queries(s, h, i0, i0 - first, m.q, m.scratch);
      if (last > first) std::fill_n((float*)m.dq_t, round_up(last - first, kPad) * D, 0.f);
      for (int64_t j0 = 0; j0 < padded; j0 += kBackwardKeys) {
        auto [i_first, i_last] = a.queries_of(s, c0 + j0, std::min(c1, c0 + j0 + kBackwardKeys));
        for (int64_t i0 = i_first / kBackwardQueries * kBackwardQueries; i0 < i_last; i0 += kBackwardQueries)
          block(s, {n, h, i0, c0, 0, 0}, j0, std::min(padded, j0 + kBackwardKeys), c1, ldk, i0 - first, m);
      }
      // dQ, queries that see none of these keys included
      for (int64_t i0 = 0; i0 < s.sq; i0 += kBackwardQueries) {
        const int64_t rows = std::min(kBackwardQueries, s.sq - i0), at = i0 - first;
        if (dq_part)
          store_dq(i0 >= first && i0 < last, m.dq_t + at * D, rows, D, dq_part + (s.row + h * a.sq + i0) * D, D,
                   m.rows);
        else
          store_dq(i0 >= first && i0 < last, m.dq_t + at * D, rows, a.dim,
                   (T*)a.dq + s.dq_offset + h * a.dq_strides.head + i0 * a.dq_strides.row, a.dq_strides.row, m.rows);
      }
    }
    for (int64_t j = 0; j < count; ++j) {
      int64_t y = s.dkv_offset + hk * a.dkv_strides.head + (c0 + j) * a.dkv_strides.row;
      for_lanes(a.dim, [&](int64_t d, int lanes) {
        store_any((T*)a.dk + y + d, load_any(m.dk + j * D + d, lanes) * a.scale, lanes);
        store_any((T*)a.dv + y + d, load_any(m.dv + j * D + d, lanes), lanes);
      });
    }
  }

  // Rows of dQ from a block of dQᵀ, or zeros where its queries saw no key.
  template <class O>
  void store_dq(bool seen, const float* dq_t, int64_t rows, int64_t columns, O* y, int64_t stride,
                float* scratch) const {
    float scales[kBackwardQueries];
    std::fill_n(scales, rows, a.scale);
    if (seen) return store_transposed(dq_t, round_up(rows, kPad), rows, columns, D, scales, y, stride, scratch);
    for (int64_t r = 0; r < rows; ++r) std::memset(y + r * stride, 0, columns * sizeof(O));
  }

  // One block of keys j0 .. j1 (from c0) against the query block at i0: narrowed to the keys that its queries see.
  void block(const Sequence& s, Block b, int64_t j0, int64_t j1, int64_t c1, int64_t ldk, int64_t at, Memory& m) const {
    const int64_t c0 = b.j0, rows = std::min(kBackwardQueries, s.sq - b.i0);
    b.queries = round_up(rows, kPad), b.keys = kPad;
    auto [first, last] = a.keys_of(s, b.i0, b.i0 + rows);
    j0 = std::max(j0, (first - c0) / kPad * kPad), j1 = std::min(j1, round_up(std::min(last, c1) - c0, kPad));
    if (j0 >= j1) return;
    for (int64_t j = j0; j < j1; j += kPad) {
      b.j0 = c0 + j;
      const int64_t x = (j - j0) * b.queries;
      strip(s, b, m.k + j * D, m.v + j * D, m.q, at, m.strip, m.p + x, m.ds + x,
            std::is_same_v<C, bf16> ? m.ds_pairs + x : nullptr, false);
    }
    const int64_t keys = j1 - j0;
    const C* pairs = std::is_same_v<C, bf16> ? m.ds_pairs : m.ds;
    block_gemm(keys, D, b.queries, (const C*)m.p, b.queries, m.q.dout + at * D, D, m.dv + j0 * D, D, true);
    block_gemm(keys, D, b.queries, (const C*)m.ds, b.queries, m.q.q + at * D, D, m.dk + j0 * D, D, true);
    block_gemm(D, b.queries, keys, m.k_t + j0, ldk, pairs, b.queries, m.dq_t + at * D, b.queries, true);
  }

  // use(j0, keys, dS) for each strip of keys that a packed query block sees
  template <class Use>
  void bias_strips(const Sequence& s, Block b, Memory& m, const Use& use) const {
    const int64_t hk = b.h / a.group();
    auto [first, last] = a.keys_of(s, b.i0, std::min(s.sq, b.i0 + kBackwardQueries));
    for (int64_t j0 = b.j0 = first / kPad * kPad; j0 < last; b.j0 = j0 += kPad) {
      const int64_t keys = std::min(kPad, s.sk - j0);
      pack_rows((const T*)a.k + s.k_offset + hk * a.k_strides.head + j0 * a.k_strides.row, a.k_strides.row, keys, a.dim,
                (C*)m.k, kPad, D);
      pack_rows((const T*)a.v + s.v_offset + hk * a.v_strides.head + j0 * a.v_strides.row, a.v_strides.row, keys, a.dim,
                (C*)m.v, kPad, D);
      strip(s, b, m.k, m.v, m.q, 0, m.strip, m.p, m.ds, m.ds_pairs, true);
      use(j0, keys, m.strip.dp);
    }
  }

  // The gradient of attn_bias, in a pass of its own over the scores, so that a broadcast bias needs no (B, H, Sq, Sk)
  // buffer: one task per element of its batch and head dimensions and per query block, unless it is broadcast over
  // them.
  void bias_task(int64_t n_first, int64_t n_last, int64_t h_first, int64_t h_last, int64_t i_first, int64_t i_last,
                 double* sums, Memory& m) const {
    for (int64_t n = n_first; n < n_last; ++n) {
      const Sequence s = a.sequence(n);
      for (int64_t h = h_first; h < h_last; ++h)
        for (int64_t i0 = i_first; i0 < i_last; i0 += kBackwardQueries) {
          const int64_t rows = std::min(kBackwardQueries, s.sq - i0);
          pack_queries(s, h, i0, 0, m.q, m.scratch);
          // delta from O as it was rounded would not cancel in long sums over a broadcast dimension: here it is summed
          double delta[kBackwardQueries] = {};
          std::fill_n((float*)m.q.delta, rows, 0.f);
          bias_strips(s, {n, h, i0, 0, kPad, round_up(rows, kPad)}, m, [&](int64_t, int64_t keys, const float* ds) {
            for (int64_t j = 0; j < keys; ++j)
              for (int64_t i = 0; i < rows; ++i) delta[i] += ds[j * round_up(rows, kPad) + i];
          });
          for (int64_t i = 0; i < rows; ++i)
            m.q.delta[i] = float(delta[i] - (a.dlse ? a.dlse[s.row + h * a.sq + i0 + i] : 0.f));
          bias_strips(s, {n, h, i0, 0, kPad, round_up(rows, kPad)}, m, [&](int64_t j0, int64_t keys, const float* ds) {
            const int64_t* t = a.dbias_strides;
            for (int64_t i = 0; i < rows; ++i) {
              double* dbias = sums + n * t[0] + h * t[1] + (i0 + i) * t[2] + j0 * t[3];
              for (int64_t j = 0; j < keys; ++j) dbias[j * t[3]] += ds[j * round_up(rows, kPad) + i];
            }
          });
        }
    }
  }
};

template <class T, class C>
void backward(const Problem& a, int64_t threads) {
  ShortSequences<T>(a, is_short).backward();
  Backward<T, C> kernel{a};
  const int64_t D = kernel.D;
  // Tasks are key/value heads of a sequence. Where those are too few for the threads, their keys are split, which costs
  // a partial dQ for each part.
  struct Task {
    int64_t n, h, part, first, last;
  };
  std::vector<Task> tasks;
  std::vector<int64_t> parts(a.batch);
  int64_t total = 0, most_parts = 1, longest_q = kBackwardQueries, longest_part = kPad;
  for (int64_t n = 0; n < a.batch; ++n) {
    const Sequence s = a.sequence(n);
    if (!is_short(s)) total += s.sk * a.kv_heads;
  }
  const int64_t length = std::max<int64_t>(256, ceil_div(total, 4 * threads));
  for (int64_t n = 0; n < a.batch; ++n) {
    const Sequence s = a.sequence(n);
    if (is_short(s)) continue;
    parts[n] = std::max<int64_t>(1, ceil_div(s.sk, length));
    const int64_t step = std::max(kPad, round_up(ceil_div(s.sk, parts[n]), kPad));
    parts[n] = std::max<int64_t>(1, ceil_div(s.sk, step));
    most_parts = std::max(most_parts, parts[n]);
    longest_q = std::max(longest_q, round_up(s.sq, kBackwardQueries));
    longest_part = std::max(longest_part, std::min(step, round_up(s.sk, kPad)));
    for (int64_t h = 0; h < a.kv_heads; ++h)
      for (int64_t part = 0; part < parts[n]; ++part)
        tasks.push_back({n, h, part, part * step, std::min(s.sk, (part + 1) * step)});
  }
  const int64_t all_rows = (a.bounds_q ? 1 : a.batch) * a.heads * a.sq;
  Scratch<float> dq_parts(most_parts > 1 ? most_parts * all_rows * D : 0);
  auto memory = [&] { return std::make_unique<typename Backward<T, C>::Memory>(D, longest_q, longest_part); };
  parallel_tasks(tasks.size(), memory, [&](int64_t i, auto& m) {
    const Task& t = tasks[i];
    kernel.task(t.n, t.h, t.first, t.last, most_parts > 1 ? dq_parts + t.part * all_rows * D : nullptr, m);
  });
  if (most_parts > 1) {
    parallel_for(a.batch * a.heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t nh = begin; nh < end; ++nh) {
        const int64_t n = nh / a.heads, h = nh % a.heads;
        const Sequence s = a.sequence(n);
        if (is_short(s)) continue;
        for (int64_t i = 0; i < s.sq; ++i) {
          const float* part = dq_parts + (s.row + h * a.sq + i) * D;
          T* dq = (T*)a.dq + s.dq_offset + h * a.dq_strides.head + i * a.dq_strides.row;
          for_lanes(a.dim, [&](int64_t d, int lanes) {
            fvec sum{};
            for (int64_t c = 0; c < parts[n]; ++c) sum += load_any(part + c * all_rows * D + d, lanes);
            store_any(dq + d, sum, lanes);
          });
        }
      }
    });
  }
  if (a.bounds_q) {
    zero_rows((T*)a.dq, a.dq_strides, a.heads, a.bounds_q[a.batch], a.sq, a.dim);
    zero_rows((T*)a.dk, a.dkv_strides, a.kv_heads, a.bounds_k[a.batch], a.sk, a.dim);
    zero_rows((T*)a.dv, a.dkv_strides, a.kv_heads, a.bounds_k[a.batch], a.sk, a.dim);
  }
  if (a.sinks) {
    // the sink's probability times (0 - delta): its value is zero
    parallel_for(a.heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h) {
        double sum = 0;
        for (int64_t n = 0; n < a.batch; ++n) {
          const Sequence s = a.sequence(n);
          for (int64_t i = 0; i < s.sq; ++i) {
            const int64_t row = s.row + h * a.sq + i;
            if (a.maximum[row] != -kInf)
              sum -= std::exp(double(a.sinks[h]) - a.maximum[row] - a.log_sum[row]) * kernel.delta(s, h, i);
          }
        }
        a.dsinks[h] = float(sum);
      }
    });
  }
  if (a.dbias) {
    Scratch<double> sums(a.dbias_count);  // long sums with much cancellation where the bias is broadcast
    std::fill_n((double*)sums, a.dbias_count, 0.);
    const int64_t* t = a.dbias_strides;
    const int64_t batches = t[0] ? a.batch : 1, heads = t[1] ? a.heads : 1;
    const int64_t blocks = t[2] ? ceil_div(a.sq, kBackwardQueries) : 1;
    parallel_tasks(batches * heads * blocks, memory, [&](int64_t i, auto& m) {
      const int64_t n = i / blocks / heads, h = i / blocks % heads, block = i % blocks;
      kernel.bias_task(t[0] ? n : 0, t[0] ? n + 1 : a.batch, t[1] ? h : 0, t[1] ? h + 1 : a.heads,
                       t[2] ? block * kBackwardQueries : 0,
                       t[2] ? std::min(a.sq, (block + 1) * kBackwardQueries) : a.sq, sums, m);
    });
    std::copy_n((const double*)sums, a.dbias_count, a.dbias);
  }
}

// Calls f(T, C) with the element type and the type that is multiplied.
template <class F>
void dispatch_types(DType dtype, const F& f) {
#ifdef __AVX512F__
  if (dtype == DType::bf16 && current_isa() == Isa::amx) return f(bf16{}, bf16{});
#endif
  PYFAST_DISPATCH(dtype, T, f(T{}, float{}))
}

}  // namespace

void attention_forward(const Attention& a) {
  Problem problem(a);
  dispatch_types(a.dtype, [&](auto t, auto c) { forward<decltype(t), decltype(c)>(problem); });
}

void attention_backward(const Attention& a, int64_t threads) {
  Problem problem(a);
  dispatch_types(a.dtype, [&](auto t, auto c) { backward<decltype(t), decltype(c)>(problem, threads); });
}

}  // namespace pyfast::PYFAST_ISA
