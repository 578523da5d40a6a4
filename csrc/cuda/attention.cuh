// Softmax attention that never holds its scores (Dao 2023, "FlashAttention-2"), forward and backward.
//
// A block of the forward and of the dq pass takes 64 queries of one head, 16 to a warp, and walks over the keys that
// they may see; one of the dk/dv pass takes 64 keys of one key/value head and walks over the queries, of all its query
// heads, that may see them. Nothing is added atomically: the same inputs give the same bits.
//
// Tiling: D is padded to 64, 128 or 256; inner tiles of 64 rows, or 32 where D is wide, in a ring of two that cp.async
// fills. Scores, probabilities and their gradients stay in registers, where the result of one product is the operand
// of the next. fp32 is multiplied by FMA in the same layout, D = 256 in tiles of 32 rows and without a ring.
// Shared memory, 16-bit: forward (64 + 4 inner) rows of D, 40 to 96 KB; backward (128 + 4 inner), 48 to 128 KB.
// Bound: tensor cores, 4 D FLOP per pair of query and key forward, and 14 D backward, where 10 D would do with atomics.
// mma.sync reaches some 60 % of an H100's peak, which is wgmma's: there attention90.cuh serves what it can.
// Without a GPU these are bounds on paper.
//
// Packed sequences (cu_seqlens): tile t belongs to the sequence n for which start(n) <= t < start(n + 1), where
// start(n) = cu_seqlens[n] / rows of a tile + n. That leaves each sequence enough tiles (a few have no rows) without a
// count that only the GPU knows. Rows after the last sequence are a sequence of their own that sees nothing.
#pragma once
#include <cmath>

#include "common/philox.h"
#include "cuda/attention.h"
#include "cuda/math.cuh"
#include "cuda/tile.cuh"

namespace pyfast::cuda {

// How a kernel for element T and padded width kDim is tiled
template <class T, int kDim, bool kOverKeys>
struct Tiling {
  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr int kOuter = kWide && kDim == 256 ? 32 : 64;
  static constexpr int kInner = kDim == 64 || (!kWide && kDim == 128 && kOverKeys) ? 64 : 32;
  static constexpr int kStages = kWide && kDim == 256 ? 1 : 2;
  // the dk/dv pass holds two results: of D = 256, half of each in a warp
  static constexpr int kParts = !kOverKeys && kDim == 256 ? 2 : 1;
  static constexpr int kWarps = kOuter / 16 * kParts, kThreads = 32 * kWarps;
  // per processor: fp32's shared memory leaves room for one or two, so that registers are free; 0: as ptxas thinks best
  static constexpr int kMinBlocks = kWide ? 1 : 0;
  using OuterTile = Tile<T, kOuter, kDim>;
  using InnerTile = Tile<T, kInner, kDim>;
  static constexpr int kScratch = kWide ? Tile<T, 16, kInner>::kBytes : 0;  // of a warp

  static constexpr int shared_bytes(int outer_tiles) {
    return outer_tiles * OuterTile::kBytes + 2 * kStages * InnerTile::kBytes + kWarps * kScratch;
  }
};

struct AttentionLaunch {
  Attention a;
  int64_t tiles = 0;  // per head and batch
  // of dropout: a word below this drops its probability, and what stays is multiplied by this
  uint32_t dropout_threshold = uint32_t(a.dropout_p * 4294967296.0);
  float dropout_scale = float(1.0 / (1.0 - a.dropout_p));
};

// Where a block works: its tile's first row within the sequence, and the sequence's rows, on this side and the other,
// where there may be none
struct Place {
  int batch, head, begin, other_begin, first, length, other_length;
};

__device__ __forceinline__ int64_t cu_at(const void* cu, bool wide, int64_t n) {
  return wide ? static_cast<const int64_t*>(cu)[n] : static_cast<const int32_t*>(cu)[n];
}

// With a causal mask the last tiles of queries see most, and the first tiles of keys are seen most: they start first.
__device__ __forceinline__ Place locate(const AttentionLaunch& l, int64_t heads, const void* cu, const void* cu_other,
                                        int64_t rows, int64_t rows_other, int tile_rows, bool last_first) {
  const int64_t program = blockIdx.x, in_head = program % l.tiles, tile = last_first ? l.tiles - 1 - in_head : in_head;
  Place p{int(program / l.tiles / heads), int(program / l.tiles % heads), 0, 0, 0, int(rows), int(rows_other)};
  if (!cu) {
    p.first = int(tile) * tile_rows;
    return p;
  }
  const int64_t sequences = l.a.sequences;
  const bool wide = l.a.cu_wide;
  int64_t n = 0, last = sequences;
  while (n < last) {
    const int64_t middle = (n + last + 1) / 2;
    if (cu_at(cu, wide, middle) / tile_rows + middle <= tile)
      n = middle;
    else
      last = middle - 1;
  }
  // within the rows that there are, whatever cu_seqlens hold
  const auto bound = [&](const void* at, int64_t i, int64_t limit) {
    const int64_t b = i <= sequences ? cu_at(at, wide, i) : limit;
    return int(b < 0 ? 0 : b > limit ? limit : b);
  };
  p.begin = bound(cu, n, rows), p.length = bound(cu, n + 1, rows) - p.begin;
  p.other_begin = bound(cu_other, n, rows_other);
  const int other_end = n < sequences ? bound(cu_other, n + 1, rows_other) : 0;
  p.other_length = other_end > p.other_begin ? other_end - p.other_begin : 0;
  const int64_t first = (tile - (cu_at(cu, wide, n) / tile_rows + n)) * tile_rows;
  p.first = first < 0 || first > rows ? int(rows) : int(first);
  return p;
}

template <class T>
__device__ __forceinline__ T* row_of(const Heads& x, int64_t batch, int64_t head, int64_t row) {
  return static_cast<T*>(const_cast<void*>(x.data)) + batch * x.batch + head * x.head + row * x.row;
}

// Called, not inlined at each of a tile's elements: kernels would grow tenfold
struct alignas(16) Words {
  uint32_t words[4];
};
__device__ __attribute__((noinline)) inline Words called_philox(uint64_t seed, uint64_t block) {
  Words w;
  philox4x32<1>(seed, block, w.words);
  return w;
}

struct Keys {  // or queries
  int first, count;
};

// The scores of one head and sequence. kGeneral: with softcap, mask, bias or dropout, which the plain kernels leave
// out.
template <bool kGeneral>
struct Scores {
  const Attention& a;
  int queries, keys;
  const bool* mask = nullptr;
  const char* bias = nullptr;
  int64_t row = 0;  // of query 0, among the maxima and for dropout

  __device__ Scores(const Attention& a, int64_t batch, int64_t head, int64_t q_begin, int queries, int keys)
      : a(a), queries(queries), keys(keys), row((batch * a.heads + head) * a.sq + q_begin) {
    if (!kGeneral) return;
    if (a.mask) mask = a.mask + batch * a.sk;
    if (a.bias)
      bias = static_cast<const char*>(a.bias) +
             (batch * a.bias_strides[0] + head * a.bias_strides[1]) * (a.bias_dtype == DType::fp32 ? 4 : 2);
  }

  __device__ __forceinline__ bool counts(int j) const { return j < keys && (!kGeneral || !mask || mask[j]); }
  __device__ __forceinline__ bool visible(int i, int j) const {
    const int offset = j - (i + keys - queries);
    return i < queries && counts(j) && (a.left < 0 || offset >= -a.left) && (a.right < 0 || offset <= a.right);
  }
  // The keys that query i may see, a mask apart
  __device__ __forceinline__ Keys seen_by(int i) const {
    const int position = i + keys - queries, behind = position + a.right + 1;
    const int first = a.left < 0 ? 0 : position - a.left, end = a.right < 0 || behind > keys ? keys : behind;
    return {first, i < queries && first < end ? end - first : 0};
  }
  // The queries that may see key j, likewise
  __device__ __forceinline__ Keys seeing(int j) const {
    const int position = j + queries - keys, behind = position + a.left + 1;
    const int first = a.right < 0 ? 0 : position - a.right, end = a.left < 0 || behind > queries ? queries : behind;
    return {first, first < end ? end - first : 0};
  }
  // Every query of i0 to i1 - 1 may see every key of j0 to j1 - 1
  __device__ __forceinline__ bool all_visible(int i0, int i1, int j0, int j1) const {
    const int shift = keys - queries;
    return !(kGeneral && mask) && i1 <= queries && j1 <= keys && (a.left < 0 || j0 - (i1 - 1 + shift) >= -a.left) &&
           (a.right < 0 || j1 - 1 - (i0 + shift) <= a.right);
  }
  // The score of a product q k, before masking, and its slope
  __device__ __forceinline__ float score(float product, int i, int j, float& slope) const {
    float s = product * a.scale;
    slope = 1.f;
    if (!kGeneral) return s;
    if (a.softcap > 0.f) {
      const float t = called_tanh(s / a.softcap);
      s = a.softcap * t;
      slope = (1.f - t) * (1.f + t);
    }
    if (bias && i < queries && j < keys) {
      const int64_t at = i * a.bias_strides[2] + j * a.bias_strides[3];
      s += a.bias_dtype == DType::fp32   ? reinterpret_cast<const float*>(bias)[at]
           : a.bias_dtype == DType::bf16 ? to_float(reinterpret_cast<const bf16*>(bias)[at])
                                         : to_float(reinterpret_cast<const fp16*>(bias)[at]);
    }
    return s;
  }
  __device__ __forceinline__ uint64_t dropout_index(int i, int j) const { return (row + i) * a.dropout_keys + j; }
};

// dropout's factors, 0 or 1 / (1 - p)
struct Factors {
  const AttentionLaunch& l;
  uint64_t seed, block = ~0ull;
  Words drawn;  // those of `block`

  __device__ explicit Factors(const AttentionLaunch& l) : l(l), seed(l.a.seed ? uint64_t(*l.a.seed) : 0) {}

  __device__ __forceinline__ float factor(const Words& w, int i) const {
    const uint32_t word = i < 2 ? (i ? w.words[1] : w.words[0]) : i == 2 ? w.words[2] : w.words[3];
    return word >= l.dropout_threshold ? l.dropout_scale : 0.f;
  }
  __device__ __forceinline__ float at(uint64_t e) const { return factor(called_philox(seed, e / 4), e % 4); }
  // the same where neighbours are asked for in turn: a block's four words are drawn once
  __device__ __forceinline__ float next(uint64_t e) {
    if (e / 4 != block) {
      block = e / 4;
      drawn = called_philox(seed, block);
    }
    return factor(drawn, e % 4);
  }
};

// A block's shared memory: its outer tiles, the ring of pairs of inner tiles, and each warp's scratch
template <class T, class Tiles, int kOuterTiles>
struct AttentionMemory {
  using Outer = typename Tiles::OuterTile;
  using Inner = typename Tiles::InnerTile;
  unsigned char* shared;

  __device__ __forceinline__ Outer outer(int which) const {
    return {reinterpret_cast<T*>(shared + which * Outer::kBytes)};
  }
  __device__ __forceinline__ Inner inner(int which, int stage) const {
    return {reinterpret_cast<T*>(shared + kOuterTiles * Outer::kBytes + (2 * stage + which) * Inner::kBytes)};
  }
  __device__ __forceinline__ T* scratch() const {
    const int before = kOuterTiles * Outer::kBytes + 2 * Tiles::kStages * Inner::kBytes;
    return reinterpret_cast<T*>(shared + before + threadIdx.x / 32 * Tiles::kScratch);
  }
};

// Begins to copy a tile: rows of x from `row` on, those for which there(i)
template <class T, class Tile, class There>
__device__ __forceinline__ void load(const Tile& tile, const Heads& x, int64_t batch, int64_t head, int64_t row,
                                     int dim, const There& there) {
  tile.load(row_of<T>(x, batch, head, row), x.row, dim, x.aligned, there);
}

// The first key that a tile of queries may see, and the first behind those
__device__ __forceinline__ int first_key(const Attention& a, const Place& p, int keys) {
  const int left = p.first + keys - p.length - a.left;
  return a.left >= 0 && left > 0 ? left : 0;
}
__device__ __forceinline__ int behind_keys(const Attention& a, const Place& p, int keys, int rows) {
  const int right = p.first + rows + keys - p.length + a.right;
  return a.right >= 0 && right < keys ? right : keys;
}

// The first query that may see a key of a tile, and the first behind those
__device__ __forceinline__ int first_query(const Attention& a, const Place& p, int queries) {
  const int first = p.first + queries - p.length - a.right;
  return a.right >= 0 && first > 0 ? first : 0;
}
__device__ __forceinline__ int behind_queries(const Attention& a, const Place& p, int queries, int rows) {
  const int behind = p.first + rows + queries - p.length + a.left;
  return a.left >= 0 && behind < queries ? behind : queries;
}

// What a block walks over: rows of the other side that its own may see, in tiles
struct Range {
  int begin, end, tiles;

  __device__ __forceinline__ Range(int begin, int end, int tile_rows)
      : begin(begin), end(end), tiles(begin < end ? (end - begin + tile_rows - 1) / tile_rows : 0) {}
};

// What the passes over keys share: a block's queries, and the keys that they may see
template <class T, int kDim, bool kGeneral, int kOuterTiles>
struct OverKeys {
  using Tiles = Tiling<T, kDim, true>;
  static constexpr int kInner = Tiles::kInner, kTiles = kInner / 8;
  static constexpr bool kGeneralScores = kGeneral;
  const Attention& a;
  const Place p;
  const int keys;
  const Scores<kGeneral> scores;
  const AttentionMemory<T, Tiles, kOuterTiles> memory;

  __device__ __forceinline__ OverKeys(const AttentionLaunch& l, unsigned char* shared)
      : a(l.a),
        p(locate(l, l.a.heads, l.a.cu_q, l.a.cu_k, l.a.sq, l.a.sk, Tiles::kOuter, true)),
        keys(p.other_length),
        scores(a, p.batch, p.head, p.begin, p.length, keys),
        memory{shared} {}

  __device__ __forceinline__ int warp_row() const { return p.first + threadIdx.x / 32 * 16; }
  // Queries are waited for with the first keys
  __device__ __forceinline__ void load_queries(int which, const Heads& x) const {
    load<T>(memory.outer(which), x, p.batch, p.head, p.begin + p.first, a.dim,
            [&](int row) { return p.first + row < p.length; });
  }
  __device__ __forceinline__ void load_keys(int at, int stage) const {
    const int kv_head = p.head / int(a.heads / a.kv_heads);
    const auto there = [&](int row) { return scores.counts(at + row); };
    load<T>(memory.inner(0, stage), a.k, p.batch, kv_head, p.other_begin + at, a.dim, there);
    load<T>(memory.inner(1, stage), a.v, p.batch, kv_head, p.other_begin + at, a.dim, there);
  }
  __device__ __forceinline__ int begin() const { return first_key(a, p, keys); }
  __device__ __forceinline__ int end() const { return behind_keys(a, p, keys, Tiles::kOuter); }
  __device__ __forceinline__ bool all_visible(int at) const {
    return scores.all_visible(p.first, p.first + Tiles::kOuter, at, at + kInner);
  }
  // Writes a warp's result times a factor per row
  __device__ __forceinline__ void store(const float (&acc)[kDim / 8][4], const float (&factor)[2],
                                        const Heads& to) const {
    store_rows(acc, factor, row_of<T>(to, p.batch, p.head, p.begin), to.row, warp_row(), p.length, 0, a.dim,
               to.aligned);
  }
};

// Of queries `row` and `row` + 8, whose scores four lanes share: joins the sums of exp(score - maximum), adds the sink,
// writes what the backward needs, and gives the factors that make sums of values results. before: query 0's place among
// the maxima.
template <class T>
__device__ __forceinline__ void end_rows(const Attention& a, const Place& p, int64_t before, int row,
                                         float (&maximum)[2], float (&total)[2], float (&factor)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    total[h] += __shfl_xor_sync(~0u, total[h], 1);
    total[h] += __shfl_xor_sync(~0u, total[h], 2);
    float rescale = 1.f;
    if (a.sinks) {
      const float sink = a.sinks[p.head], larger = sink > maximum[h] || sink != sink ? sink : maximum[h];
      const float base = larger == -INFINITY ? 0.f : larger;
      rescale = exponential<T>(maximum[h] - base);
      total[h] = total[h] * rescale + exponential<T>(sink - base);
      maximum[h] = larger;
    }
    factor[h] = total[h] == 0.f ? 0.f : rescale / total[h];
    const int i = row + 8 * h;
    if (threadIdx.x % 4 == 0 && i < p.length) {
      a.maximum[before + i] = maximum[h];
      a.log_sum[before + i] = total[h] == 0.f ? 0.f : logf(total[h]);
    }
  }
}

template <class T, int kDim, bool kGeneral>
__global__ void __launch_bounds__(Tiling<T, kDim, true>::kThreads, Tiling<T, kDim, true>::kMinBlocks)
    attention_kernel(const __grid_constant__ AttentionLaunch l) {
  PYFAST_SHARED(shared);
  using Block = OverKeys<T, kDim, kGeneral, 1>;
  constexpr int kInner = Block::kInner, kTiles = Block::kTiles;
  const Attention& a = l.a;
  const Block block(l, shared);
  const Place& p = block.p;
  if (p.first >= p.length) return;
  const Scores<kGeneral>& scores = block.scores;
  block.load_queries(0, a.q);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = block.warp_row() + lane / 4;  // this lane's first query; the second is row + 8
  float maximum[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f};
  float acc[kDim / 8][4] = {};
  Factors factors(l);

  const auto load_keys = [&](int at, int stage) { block.load_keys(at, stage); };
  walk<kInner, Block::Tiles::kStages>(block.begin(), block.end(), load_keys, [&](int at, int stage) {
    float s[kTiles][4] = {};
    multiply<T, false, kDim>(s, block.memory.outer(0), warp * 16, block.memory.inner(0, stage), 0);
    const bool whole = block.all_visible(at);
    float largest[2] = {maximum[0], maximum[1]};
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = row + e / 2 * 8, key = at + 8 * j + lane % 4 * 2 + e % 2;
        float slope;
        s[j][e] = scores.score(s[j][e], i, key, slope);
        if (!whole && !scores.visible(i, key)) s[j][e] = -INFINITY;
        largest[e / 2] = fmaxf(largest[e / 2], s[j][e]);
      }
    float base[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      largest[h] = fmaxf(largest[h], __shfl_xor_sync(~0u, largest[h], 1));
      largest[h] = fmaxf(largest[h], __shfl_xor_sync(~0u, largest[h], 2));
      base[h] = largest[h] == -INFINITY ? 0.f : largest[h];
      const float rescale = exponential<T>(maximum[h] - base[h]);
      maximum[h] = largest[h];
      total[h] *= rescale;
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j) acc[j][2 * h] *= rescale, acc[j][2 * h + 1] *= rescale;
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[j][e] = exponential<T>(s[j][e] - base[e / 2]);
        total[e / 2] += s[j][e];
        if (kGeneral && a.seed)
          s[j][e] *= factors.next(scores.dropout_index(row + e / 2 * 8, at + 8 * j + lane % 4 * 2 + e % 2));
      }
    multiply<T, kInner>(acc, s, block.memory.scratch(), block.memory.inner(1, stage), 0);
  });

  float factor[2];
  end_rows<T>(a, p, scores.row, row, maximum, total, factor);
  block.store(acc, factor, a.out);
}

// Calls use(probability, gradient of it, query, key, h) for each element of a tile of scores; s becomes what it returns
// times the score's slope. h: which of a lane's two queries.
template <class T, int kDim, class Block, int kTiles, class Use>
__device__ __forceinline__ void visit(const Block& block, Factors& factors, const float (&maximum)[2],
                                      const float (&inverse_sum)[2], float (&s)[kTiles][4], int at, int stage,
                                      const Use& use) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = block.warp_row() + lane / 4;
  float dp[kTiles][4] = {};
  multiply<T, false, kDim>(s, block.memory.outer(0), warp * 16, block.memory.inner(0, stage), 0);
  multiply<T, false, kDim>(dp, block.memory.outer(1), warp * 16, block.memory.inner(1, stage), 0);
  const bool whole = block.all_visible(at);
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int h = e / 2, i = row + h * 8, key = at + 8 * j + lane % 4 * 2 + e % 2;
      float slope;
      const float score = block.scores.score(s[j][e], i, key, slope);
      const bool seen = (whole || block.scores.visible(i, key)) && score != -INFINITY;
      const float probability = seen ? exponential<T>(score - maximum[h]) * inverse_sum[h] : 0.f;
      float d = dp[j][e];
      if (Block::kGeneralScores && block.a.seed) d *= factors.next(block.scores.dropout_index(i, key));
      s[j][e] = use(probability, seen ? d : 0.f, i, key, h) * slope;
    }
}

// delta of a warp's 16 queries: writes it, and gives each lane those of its two. before: query 0's place among them.
template <class T>
__device__ __forceinline__ void make_deltas(const Attention& a, const Place& p, int64_t before, int warp_row,
                                            float (&delta)[2]) {
  using Sum = std::conditional_t<sizeof(T) == 4, double, float>;  // dp - delta cancels: fp32 needs delta's last bits
  const int lane = threadIdx.x % 32;
  delta[0] = delta[1] = 0.f;
  for (int r = 0; r < 16; ++r) {  // a warp sums one row after the other
    const int i = warp_row + r;
    Sum terms = 0;
    if (i < p.length) {
      const T *o = row_of<T>(a.out, p.batch, p.head, p.begin + i), *d = row_of<T>(a.dout, p.batch, p.head, p.begin + i);
      for (int c = lane; c < a.dim; c += 32) terms += Sum(to_float(o[c])) * to_float(d[c]);
    }
    for (int by = 16; by; by /= 2) terms += __shfl_xor_sync(~0u, terms, by);
    float sum = float(terms);
    if (i < p.length && a.dlse) sum -= a.dlse[before + i];
    if (i < p.length && lane == 0) a.delta[before + i] = sum;
    if (r == lane / 4) delta[0] = sum;  // not delta[r / 8]: an index that is not known would put it in local memory
    if (r == lane / 4 + 8) delta[1] = sum;
  }
}

// dq, delta (out dout summed, less the gradient of lse) and, where asked for, the gradient of the scores
template <class T, int kDim, bool kGeneral>
__global__ void __launch_bounds__(Tiling<T, kDim, true>::kThreads, Tiling<T, kDim, true>::kMinBlocks)
    attention_dq_kernel(const __grid_constant__ AttentionLaunch l) {
  PYFAST_SHARED(shared);
  using Block = OverKeys<T, kDim, kGeneral, 2>;
  constexpr int kInner = Block::kInner, kTiles = Block::kTiles;
  const Attention& a = l.a;
  const Block block(l, shared);
  const Place& p = block.p;
  if (p.first >= p.length) return;
  const Scores<kGeneral>& scores = block.scores;
  block.load_queries(0, a.q);
  block.load_queries(1, a.dout);

  const int lane = threadIdx.x % 32, keys = block.keys;
  const int row = block.warp_row() + lane / 4;
  float delta[2], maximum[2] = {0.f, 0.f}, inverse_sum[2] = {0.f, 0.f};
  make_deltas<T>(a, p, scores.row, block.warp_row(), delta);
#pragma unroll
  for (int h = 0; h < 2; ++h)
    if (row + 8 * h < p.length) {
      maximum[h] = a.maximum[scores.row + row + 8 * h];
      inverse_sum[h] = expf(-a.log_sum[scores.row + row + 8 * h]);
    }

  const auto load_keys = [&](int at, int stage) { block.load_keys(at, stage); };
  Factors factors(l);
  if (sizeof(T) == 4 && (a.dscores || a.sinks)) {
    // Their gradients are sums of p (dp - delta) over whole rows, which cancel: in fp32 they need a delta of the same
    // roundings, the sum of p dp, not that of out dout.
    double sum[2] = {0.0, 0.0};
    walk<kInner, Block::Tiles::kStages>(block.begin(), block.end(), load_keys, [&](int at, int stage) {
      float s[kTiles][4] = {}, part[2] = {0.f, 0.f};
      visit<T, kDim>(block, factors, maximum, inverse_sum, s, at, stage,
                     [&](float p, float d, int, int, int h) { return part[h] = fmaf(p, d, part[h]); });
      sum[0] += part[0], sum[1] += part[1];
    });
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
      sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
      const int i = row + 8 * h;
      delta[h] = float(sum[h]) - (i < p.length && a.dlse ? a.dlse[scores.row + i] : 0.f);
      if (i < p.length && lane % 4 == 0) a.delta[scores.row + i] = delta[h];
    }
  }

  // of dscores each element is written
  const int begin = a.dscores ? 0 : block.begin(), end = a.dscores ? keys : block.end();
  float acc[kDim / 8][4] = {};
  walk<kInner, Block::Tiles::kStages>(begin, end, load_keys, [&](int at, int stage) {
    float s[kTiles][4] = {};
    visit<T, kDim>(block, factors, maximum, inverse_sum, s, at, stage, [&](float p, float d, int i, int key, int h) {
      const float ds = p * (d - delta[h]);
      if (kGeneral && a.dscores && i < block.p.length && key < keys) a.dscores[(scores.row + i) * a.sk + key] = ds;
      return ds;
    });
    multiply<T, kInner>(acc, s, block.memory.scratch(), block.memory.inner(0, stage), 0);
  });
  const float factor[2] = {a.scale, a.scale};
  block.store(acc, factor, a.dq);
}

// dk and dv: rows of the products are keys here, columns queries
template <class T, int kDim, bool kGeneral>
__global__ void __launch_bounds__(Tiling<T, kDim, false>::kThreads, Tiling<T, kDim, false>::kMinBlocks)
    attention_dkv_kernel(const __grid_constant__ AttentionLaunch l) {
  PYFAST_SHARED(shared);
  using Tiles = Tiling<T, kDim, false>;
  constexpr int kInner = Tiles::kInner, kTiles = kInner / 8, kColumns = kDim / Tiles::kParts;
  const Attention& a = l.a;
  const Place p = locate(l, a.kv_heads, a.cu_k, a.cu_q, a.sk, a.sq, Tiles::kOuter, false);
  if (p.first >= p.length) return;
  const int group = int(a.heads / a.kv_heads);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, queries = p.other_length;
  const int warp_row = warp % (Tiles::kOuter / 16) * 16, column = warp / (Tiles::kOuter / 16) * kColumns;

  const AttentionMemory<T, Tiles, 2> memory{shared};
  {
    const Scores<kGeneral> scores(a, p.batch, 0, 0, queries, p.length);
    const auto there = [&](int row) { return scores.counts(p.first + row); };
    load<T>(memory.outer(0), a.k, p.batch, p.head, p.begin + p.first, a.dim, there);
    load<T>(memory.outer(1), a.v, p.batch, p.head, p.begin + p.first, a.dim, there);
  }

  const int begin = first_query(a, p, queries), end = behind_queries(a, p, queries, Tiles::kOuter);
  const int row = p.first + warp_row + lane / 4;  // this lane's first key; the second is row + 8
  float dk[kColumns / 8][4] = {}, dv[kColumns / 8][4] = {};
  const Factors factors(l);
  for (int head = p.head * group; head < (p.head + 1) * group; ++head) {
    const Scores<kGeneral> scores(a, p.batch, head, p.other_begin, queries, p.length);
    const auto load_queries = [&](int at, int stage) {
      const auto there = [&](int row) { return at + row < queries; };
      load<T>(memory.inner(0, stage), a.q, p.batch, head, p.other_begin + at, a.dim, there);
      load<T>(memory.inner(1, stage), a.dout, p.batch, head, p.other_begin + at, a.dim, there);
    };
    walk<kInner, Tiles::kStages>(begin, end, load_queries, [&](int at, int stage) {
      const auto q = memory.inner(0, stage), dout = memory.inner(1, stage);
      float s[kTiles][4] = {}, dp[kTiles][4] = {};
      multiply<T, false, kDim>(s, memory.outer(0), warp_row, q, 0);
      multiply<T, false, kDim>(dp, memory.outer(1), warp_row, dout, 0);
      const bool whole = scores.all_visible(at, at + kInner, p.first, p.first + Tiles::kOuter);
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int key = row + e / 2 * 8, i = at + 8 * j + lane % 4 * 2 + e % 2;
          // first: what lives across this call takes registers, of which D = 128 leaves none
          const float factor = kGeneral && a.seed ? factors.at(scores.dropout_index(i, key)) : 1.f;
          float slope;
          const float score = scores.score(s[j][e], i, key, slope);
          const bool seen = (whole || scores.visible(i, key)) && score != -INFINITY;
          const int64_t at_row = scores.row + i;
          const float probability = seen ? exponential<T>((score - a.maximum[at_row]) - a.log_sum[at_row]) : 0.f;
          const float d = dp[j][e] * factor;
          dp[j][e] = seen ? probability * (d - a.delta[at_row]) * slope : 0.f;
          s[j][e] = probability * factor;
        }
      multiply<T, kInner>(dv, s, memory.scratch(), dout, column);
      multiply<T, kInner>(dk, dp, memory.scratch(), q, column);
    });
  }
  const float one[2] = {1.f, 1.f}, scale[2] = {a.scale, a.scale};
  store_rows(dk, scale, row_of<T>(a.dk, p.batch, p.head, p.begin), a.dk.row, p.first + warp_row, p.length, column,
             a.dim, a.dk.aligned);
  store_rows(dv, one, row_of<T>(a.dv, p.batch, p.head, p.begin), a.dv.row, p.first + warp_row, p.length, column, a.dim,
             a.dv.aligned);
}

enum class Pass { forward, dq, dkv };

template <class T, int kDim>
int launch_attention(const Attention& a, Pass pass, void* stream) {
  using OverKeys = Tiling<T, kDim, true>;
  using OverQueries = Tiling<T, kDim, false>;
  constexpr bool kOnlyGeneral = sizeof(T) == 4;  // FMA leaves nothing to gain
  const bool over_keys = pass != Pass::dkv, general = kOnlyGeneral || a.softcap > 0.f || a.mask || a.bias || a.seed;
  const int rows = over_keys ? OverKeys::kOuter : OverQueries::kOuter;
  const int64_t length = over_keys ? a.sq : a.sk, heads = over_keys ? a.heads : a.kv_heads;
  const AttentionLaunch l{a, a.cu_q ? length / rows + a.sequences + 1 : (length + rows - 1) / rows};
  Shape shape{l.tiles * heads * a.batch, over_keys ? OverKeys::kThreads : OverQueries::kThreads, 0};
  if (length == 0 || shape.blocks == 0) return 0;
  if (pass == Pass::forward) {
    shape.shared_bytes = OverKeys::shared_bytes(1);
    return launch(general ? attention_kernel<T, kDim, true> : attention_kernel<T, kDim, kOnlyGeneral>, shape, l,
                  stream);
  }
  shape.shared_bytes = over_keys ? OverKeys::shared_bytes(2) : OverQueries::shared_bytes(2);
  if (pass == Pass::dq)
    return launch(general ? attention_dq_kernel<T, kDim, true> : attention_dq_kernel<T, kDim, kOnlyGeneral>, shape, l,
                  stream);
  return launch(general ? attention_dkv_kernel<T, kDim, true> : attention_dkv_kernel<T, kDim, kOnlyGeneral>, shape, l,
                stream);
}

template <class T>
int launch_attention(const Attention& a, Pass pass, void* stream) {
  if (a.dim <= 64) return launch_attention<T, 64>(a, pass, stream);
  if (a.dim <= 128) return launch_attention<T, 128>(a, pass, stream);
  return launch_attention<T, 256>(a, pass, stream);
}

// one per element type, each in a file of its own: they take longest to compile
int attention_fp32(const Attention& a, Pass pass, void* stream);
int attention_bf16(const Attention& a, Pass pass, void* stream);
int attention_fp16(const Attention& a, Pass pass, void* stream);

}  // namespace pyfast::cuda
