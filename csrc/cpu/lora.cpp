// Two forms of each product. Vectors: register tiles of fp32 accumulators; 16-bit inputs are widened, and dropped out,
// into a small scratch tile once and then used for all r columns. Sums are cut into blocks, which bounds their rounding
// error. AMX, for bf16: the thin operand is rounded to bf16 too and packed once per call, the tall one goes through
// tiles as it lies in memory, or with its dropped elements masked out; dropout's scale multiplies the fp32 results.
#include "cpu/lora.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common/philox.h"
#include "cpu/amx.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace pyfast::PYFAST_ISA {
namespace {

constexpr int ACC = VL == 16 ? 16 : 8;  // accumulator vectors per tile: half of the registers
constexpr int64_t kGrain = 4096;        // elements of a panel per task

// out[c] = factor[c] x[c] as fp32, c < n; a null factor is 1
template <class T>
PF_INLINE void widen(const T* x, int64_t n, const float* factor, float* out) {
  if (factor) {
    for_lanes(n, [=](int64_t i, int lanes) {
      store_any(out + i, load_any(factor + i, lanes) * load_any(x + i, lanes), lanes);
    });
  } else {
    for_lanes(n, [=](int64_t i, int lanes) { store_any(out + i, load_any(x + i, lanes), lanes); });
  }
}

// ---- h = x a
constexpr int64_t kDepth = 256;  // columns of x per block: a's block (16 KB at r = 16) and x's rows stay in L1

// total[m, v] += sum_c x[m, c] a[c, v], for MR rows of x (stride kDepth) and NV vectors of a
template <int NV>
PF_INLINE void down_tile(const float* x, const float* a, int64_t lda, int64_t depth, float* total, int64_t ld) {
  constexpr int MR = ACC / NV;
  fvec acc[MR][NV] = {};
  for (int64_t c = 0; c < depth; ++c) {
    fvec panel[NV];
    for (int v = 0; v < NV; ++v) panel[v] = load(a + c * lda + v * VL);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
      for (int v = 0; v < NV; ++v) acc[m][v] += x[m * kDepth + c] * panel[v];
  }
  for (int m = 0; m < MR; ++m)
    for (int v = 0; v < NV; ++v) store(total + m * ld + v * VL, load(total + m * ld + v * VL) + acc[m][v]);
}

// Rows first .. last - 1. A tile may read up to kSlack floats beyond a's rows; what comes of them is not stored.
template <int NV, class T>
void down(const T* x, int64_t first, int64_t last, int64_t k, const Dropout* dropout, const float* a, int64_t lda,
          int64_t r, float* h, int64_t ldh) {
  constexpr int MR = ACC / NV;
  const int64_t width = (r + NV * VL - 1) / (NV * VL) * (NV * VL);
  std::vector<float> scratch(MR * (kDepth + width));
  float *block = scratch.data(), *total = block + MR * kDepth;
  for (int64_t i = first; i < last; i += MR) {
    const int64_t count = std::min<int64_t>(MR, last - i);
    std::fill(total, total + MR * width, 0.f);
    if (count < MR) std::fill(block, block + MR * kDepth, 0.f);
    for (int64_t c = 0; c < k; c += kDepth) {
      const int64_t depth = std::min(kDepth, k - c);
      for (int64_t m = 0; m < count; ++m) {
        const int64_t e = (i + m) * k + c;
        float factor[kDepth];
        if (dropout) dropout->fill(uint64_t(e), depth, factor);
        widen(x + e, depth, dropout ? factor : nullptr, block + m * kDepth);
      }
      for (int64_t j = 0; j < width; j += NV * VL) down_tile<NV>(block, a + c * lda + j, lda, depth, total + j, width);
    }
    for (int64_t m = 0; m < count; ++m) std::copy_n(total + m * width, r, h + (i + m) * ldh);
  }
}

// ---- y += h b + bias
constexpr int64_t kUpRows = 64, kUpColumns = 512;  // b's block (32 KB at r = 16) is used for all rows of a task

template <int MR, int NV, class T>
PF_INLINE void up_tile(T* y, int64_t n, int lanes, const float* factor, const float* h, int64_t ldh, int64_t r,
                       const float* b, int64_t ldb, const float* bias, bool accumulate) {
  fvec acc[MR][NV] = {};
  for (int64_t j = 0; j < r; ++j) {
    fvec panel[NV];
    for (int v = 0; v < NV; ++v) panel[v] = load(b + j * ldb + v * VL);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
      for (int v = 0; v < NV; ++v) acc[m][v] += h[m * ldh + j] * panel[v];
  }
  for (int m = 0; m < MR; ++m)
    for (int v = 0; v < NV; ++v) {
      fvec term = acc[m][v];
      if (factor) term *= load_any(factor + m * kUpColumns + v * VL, lanes);
      if (bias) term += load(bias + v * VL);
      T* p = y + m * n + v * VL;
      if (accumulate) term += load_any(p, lanes);
      store_any(p, term, lanes);
    }
}

template <int MR, class T>
PF_INLINE void up_rows(T* y, int64_t row, int64_t n, int64_t begin, int64_t end, const Dropout* dropout, const float* h,
                       int64_t ldh, int64_t r, const float* b, const float* bias, bool accumulate) {
  constexpr int NV = 4;
  const int64_t ldb = padded(n);
  int64_t c = begin;
  float factor[MR * kUpColumns];
  for (int m = 0; m < MR && dropout; ++m)
    dropout->fill(uint64_t((row + m) * n + begin), end - begin, factor + m * kUpColumns);
  const auto tile = [&](auto vectors, int lanes) {
    up_tile<MR, vectors.value>(y + row * n + c, n, lanes, dropout ? factor + c - begin : nullptr, h + row * ldh, ldh, r,
                               b + c, ldb, bias ? bias + c : nullptr, accumulate);
  };
  for (; c + NV * VL <= end; c += NV * VL) tile(std::integral_constant<int, NV>(), VL);
  for (; c < end; c += VL) tile(std::integral_constant<int, 1>(), int(std::min<int64_t>(VL, end - c)));
}

template <class T>
void up(T* y, int64_t rows, int64_t n, const Dropout* dropout, const float* h, int64_t ldh, int64_t r, const float* b,
        const float* bias, bool accumulate) {
  constexpr int MR = ACC / 4;
  const int64_t across = (n + kUpColumns - 1) / kUpColumns, along = (rows + kUpRows - 1) / kUpRows;
  parallel_for(across * along, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t begin = task % across * kUpColumns, end = std::min(n, begin + kUpColumns);
      int64_t i = task / across * kUpRows;
      const int64_t stop = std::min(rows, i + kUpRows);
      for (; i + MR <= stop; i += MR) up_rows<MR>(y, i, n, begin, end, dropout, h, ldh, r, b, bias, accumulate);
      for (; i < stop; ++i) up_rows<1>(y, i, n, begin, end, dropout, h, ldh, r, b, bias, accumulate);
    }
  });
}

// ---- g = h^T x
constexpr int64_t kOuterRows = 32;  // with strips of 256 columns, 32 KB as fp32
constexpr int kOuterVectors = 2;
constexpr int64_t kOuterColumns = kOuterVectors * VL;

// g[j, c] += sum_i h[i, j] x[i, c] for JR rows of g; x is a scratch tile of kOuterColumns columns
template <int JR>
PF_INLINE void outer_tile(const float* x, int64_t rows, const float* h, int64_t ldh, float* g, int64_t ldg, int width) {
  fvec acc[JR][kOuterVectors] = {};
  for (int64_t i = 0; i < rows; ++i) {
    fvec tile[kOuterVectors];
    for (int v = 0; v < kOuterVectors; ++v) tile[v] = load(x + i * kOuterColumns + v * VL);
#pragma GCC unroll 16
    for (int j = 0; j < JR; ++j)
      for (int v = 0; v < kOuterVectors; ++v) acc[j][v] += h[i * ldh + j] * tile[v];
  }
  for (int j = 0; j < JR; ++j)
    for (int v = 0; v < kOuterVectors; ++v) {
      const int lanes = std::clamp(width - v * VL, 0, VL);
      float* p = g + j * ldg + v * VL;
      if (lanes) store_any(p, load_any(p, lanes) + acc[j][v], lanes);
    }
}

template <class T>
void outer(const T* x, int64_t rows, int64_t m, const Dropout* dropout, const float* h, int64_t ldh, int64_t r,
           float* g, float* column_sum) {
  constexpr int JR = ACC / kOuterVectors;
  constexpr int64_t kTileFloats = kOuterRows * kOuterColumns;
  const int64_t ldg = padded(m);
  // about 8 tasks, whatever the number of threads, so that results do not depend on it: each a strip of columns, wide
  // enough for its rows to be read as streams
  constexpr int64_t kStrip = 256;
  const int64_t strip =
      std::clamp((m / 8 + kOuterColumns - 1) / kOuterColumns, int64_t(1), kStrip / kOuterColumns) * kOuterColumns;
  parallel_for((m + strip - 1) / strip, 1, [&](int64_t first, int64_t last) {
    std::vector<float> block(strip / kOuterColumns * kTileFloats);
    for (int64_t task = first; task < last; ++task) {
      const int64_t begin = task * strip, width = std::min(m - begin, strip);
      for (int64_t j = 0; j < r; ++j) std::fill_n(g + j * ldg + begin, width, 0.f);
      if (column_sum) std::fill_n(column_sum + begin, width, 0.f);
      for (int64_t i = 0; i < rows; i += kOuterRows) {
        const int64_t count = std::min(kOuterRows, rows - i);
        for (int64_t row = 0; row < count; ++row) {
          const int64_t e = (i + row) * m + begin;
          float factor[kStrip];
          if (dropout) dropout->fill(uint64_t(e), width, factor);
          for (int64_t c = 0; c < width; c += kOuterColumns) {
            widen(x + e + c, std::min(kOuterColumns, width - c), dropout ? factor + c : nullptr,
                  &block[c / kOuterColumns * kTileFloats + row * kOuterColumns]);
          }
        }
        for (int64_t c = 0; c < width; c += kOuterColumns) {
          const float* tile = &block[c / kOuterColumns * kTileFloats];
          const int lanes = int(std::min(kOuterColumns, width - c));
          float* out = g + begin + c;
          int64_t j = 0;
          for (; j + JR <= r; j += JR) outer_tile<JR>(tile, count, h + i * ldh + j, ldh, out + j * ldg, ldg, lanes);
          for (; j < r; ++j) outer_tile<1>(tile, count, h + i * ldh + j, ldh, out + j * ldg, ldg, lanes);
          if (column_sum) {
            const float one = 1.f;
            outer_tile<1>(tile, count, &one, 0, column_sum + begin + c, ldg, lanes);
          }
        }
      }
    }
  });
}

#ifdef __AVX512F__
// ---- the same with AMX

bool use_amx(DType t) { return t == DType::bf16 && current_isa() == Isa::amx; }

int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

// bits[c / 32]: which of the `count` elements numbered from `begin` on dropout keeps, a bit each, with any bits beyond
// them; all without dropout
void kept(const Dropout* dropout, uint64_t begin, int64_t count, uint32_t* bits) {
  if (!dropout) return (void)std::fill_n(bits, blocks(count, 32), ~0u);
  constexpr int64_t kStep = 512;
  alignas(64) uint32_t words[kStep] = {};
  const __m512i threshold = _mm512_set1_epi32(int(dropout->threshold));
  for (int64_t c = 0; c < count; c += kStep) {
    const int64_t n = std::min(kStep, count - c);
    philox_words(dropout->seed, begin + c, n, words);
    for (int64_t i = 0; i < n; i += 32) {
      const uint32_t low = _mm512_cmpge_epu32_mask(_mm512_load_si512(words + i), threshold);
      const uint32_t high = _mm512_cmpge_epu32_mask(_mm512_load_si512(words + i + 16), threshold);
      bits[(c + i) / 32] = low | high << 16;
    }
  }
}

// The first `lanes` of 16 floats and zeros; `lanes` may be negative or larger.
PF_INLINE fvec load_first(const float* p, int64_t lanes) {
  return lanes <= 0 ? fvec{} : load_any(p, int(std::min<int64_t>(lanes, VL)));
}

// The thin operand (depth, columns) as B tiles, [32 rows][16 columns], zero beyond its edges; `across` tiles per 32
// rows.
Scratch<bf16> pack_panel(const float* panel, int64_t ld, int64_t depth, int64_t columns, int64_t across) {
  Scratch<bf16> tiles(blocks(depth, kTileDepth) * across * kTileSize);
  parallel_for(blocks(depth, kTileDepth), 8, [&](int64_t first, int64_t last) {
    for (int64_t d = first; d < last; ++d) {
      for (int64_t t = 0; t < across; ++t) {
        for (int64_t i = 0; i < kTileDepth; i += 2) {
          const int64_t row = d * kTileDepth + i, lanes = columns - t * kTile;
          const float* p = panel + row * ld + t * kTile;
          pack_pairs(row < depth ? load_first(p, lanes) : fvec{}, row + 1 < depth ? load_first(p + ld, lanes) : fvec{},
                     tiles + (d * across + t) * kTileSize + i * kTile);
        }
      }
    }
  });
  return tiles;
}

// MR x 16 rows of x from `row` on times NR x 16 columns of the panel, whose tiles start at `tiles`; bits: null, or the
// elements of these rows that dropout keeps
template <int MR, int NR>
void amx_down_block(const bf16* x, int64_t row, int64_t end, int64_t k, const uint32_t* bits, float scale,
                    const bf16* tiles, int64_t across, int64_t r, float* h, int64_t ldh) {
  alignas(64) bf16 edge[kTileSize];
  alignas(64) float result[kTileResult];
  unrolled<MR * NR>([](auto c) { Tiles::zero<c>(); });
  for (int64_t d = 0; d < k; d += kTileDepth) {
    unrolled<NR>([&](auto n) { Tiles::load<4 + n>(tiles + (d / kTileDepth * across + n) * kTileSize); });
    unrolled<MR>([&](auto m) {
      const bf16* p = x + (row + m * kTile) * k + d;
      const int64_t count = std::min<int64_t>(kTile, end - row - m * kTile),
                    depth = std::min<int64_t>(kTileDepth, k - d);
      if (count <= 0) return;
      if (count == kTile && depth == kTileDepth && !bits) {
        Tiles::load<6 + m % 2>(p, k * sizeof(bf16));
      } else {
        const __mmask32 there = depth == kTileDepth ? ~0u : (1u << depth) - 1;
        for (int64_t i = 0; i < kTile; ++i) {
          __mmask32 mask = i < count ? there : 0;
          if (bits && i < count) mask &= bits[(m * kTile + i) * blocks(k, kTileDepth) + d / kTileDepth];
          _mm512_store_si512(edge + i * kTileDepth, _mm512_maskz_loadu_epi16(mask, p + i * k));
        }
        Tiles::load<6 + m % 2>(edge);
      }
      unrolled<NR>([&](auto n) { Tiles::multiply<m * NR + n, 6 + m % 2, 4 + n>(); });
    });
  }
  unrolled<MR * NR>([&](auto c) {
    const int64_t first = row + c / NR * kTile, column = c % NR * kTile;
    Tiles::store<c>(result);
    for (int64_t i = 0; i < kTile && first + i < end && column < r; ++i) {
      const int lanes = int(std::min<int64_t>(kTile, r - column));
      store_any(h + (first + i) * ldh + column, scale * load(result + i * kTile), lanes);
    }
  });
}

void amx_down(const bf16* x, int64_t rows, int64_t k, const Dropout* dropout, const float* a, int64_t lda, int64_t r,
              float* h, int64_t ldh) {
  const int64_t across = r <= kTile ? 1 : blocks(r, 2 * kTile) * 2;
  const Scratch<bf16> tiles = pack_panel(a, lda, k, r, across);
  parallel_for(rows, 4 * kTile, [&](int64_t first, int64_t last) {
    Tiles scope;
    const int64_t height = across == 1 ? 4 * kTile : 2 * kTile, words = blocks(k, kTileDepth);
    const float scale = dropout ? dropout->scale : 1.f;
    std::vector<uint32_t> bits(dropout ? height * words : 0);
    for (int64_t i = first; i < last; i += height) {
      for (int64_t row = i; row < std::min(last, i + height) && dropout; ++row)
        kept(dropout, uint64_t(row * k), k, &bits[(row - i) * words]);
      const uint32_t* mask = dropout ? bits.data() : nullptr;
      if (across == 1) {
        amx_down_block<4, 1>(x, i, last, k, mask, scale, tiles, 1, r, h, ldh);
        continue;
      }
      for (int64_t t = 0; t < across; t += 2) {
        const int64_t column = t * kTile;
        amx_down_block<2, 2>(x, i, last, k, mask, scale, tiles + t * kTileSize, across, r - column, h + column, ldh);
      }
    }
  });
}

// 2 x 2 result tiles times scale where bits are set (row m's at bits[m * ld]), plus bias, rounded and stored (or added)
// to `height` rows of out under a mask of 32 columns
template <bool Accumulate>
PF_INLINE void add_tiles(const float* result, int64_t height, const uint32_t* bits, int64_t ld, float scale, fvec bias0,
                         fvec bias1, __mmask32 mask, bf16* out, int64_t stride) {
  for (int64_t m = 0; m < height; ++m, out += stride, bits += ld) {
    const float* p = result + (m & 16) * 2 * kTile + (m & 15) * kTile;
    fvec low = (fvec)_mm512_maskz_mov_ps(__mmask16(*bits), (__m512)load(p)) * scale + bias0;
    fvec high = (fvec)_mm512_maskz_mov_ps(__mmask16(*bits >> 16), (__m512)load(p + kTileResult)) * scale + bias1;
    if constexpr (Accumulate) {
      const __m512i old = _mm512_maskz_loadu_epi16(mask, out);
      low += (fvec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(old)), 16);
      high += (fvec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(old, 1)), 16);
    }
    if (mask == ~0u) {
      _mm512_storeu_si512(out, pack_bf16(low, high));
    } else {
      _mm512_mask_storeu_epi16(out, mask, pack_bf16(low, high));
    }
  }
}

void amx_up(bf16* y, int64_t rows, int64_t n, const Dropout* dropout, const float* h, int64_t ldh, int64_t r,
            const float* b, const float* bias, bool accumulate) {
  const int64_t ldb = padded(n), across = blocks(n, 2 * kTile) * 2, deep = blocks(r, kTileDepth);
  const Scratch<bf16> tiles = pack_panel(b, ldb, r, n, across);
  const int64_t wide = blocks(n, kUpColumns), tall = blocks(rows, kUpRows);
  parallel_for(wide * tall, 1, [&](int64_t first, int64_t last) {
    Tiles scope;
    Scratch<bf16> left(kUpRows / kTile * deep * kTileSize);  // h's rows as A tiles, [16 rows][32 columns]
    alignas(64) float result[4][kTileResult];                // 2 x 2 tiles
    constexpr int64_t kWords = kUpColumns / 32;
    uint32_t bits[kUpRows * kWords];
    const float scale = dropout ? dropout->scale : 1.f;
    for (int64_t task = first; task < last; ++task) {
      const int64_t row = task / wide * kUpRows, count = std::min(kUpRows, rows - row);
      if (task == first || task % wide == 0) {
        for (int64_t i = 0; i < kUpRows; ++i) {
          for (int64_t d = 0; d < deep; ++d) {
            const float* p = h + (row + i) * ldh + d * kTileDepth;
            const int64_t lanes = i < count ? r - d * kTileDepth : 0;
            bf16* out = left + (i / kTile * deep + d) * kTileSize + i % kTile * kTileDepth;
            _mm512_storeu_si512(out, pack_bf16(load_first(p, lanes), load_first(p + VL, lanes - VL)));
          }
        }
      }
      const int64_t begin = task % wide * kUpColumns, end = std::min(n, begin + kUpColumns);
      if (dropout || task == first)
        for (int64_t i = 0; i < kUpRows; ++i)
          kept(dropout, uint64_t((row + i) * n + begin), dropout ? end - begin : kUpColumns, bits + i * kWords);
      for (int64_t i = 0; i < count; i += 2 * kTile) {
        for (int64_t c = begin; c < end; c += 2 * kTile) {
          const int lanes = int(std::min<int64_t>(2 * kTile, end - c));
          const __mmask32 mask = lanes == 32 ? ~0u : (1u << lanes) - 1;
          const fvec bias0 = bias ? load(bias + c) : fvec{};
          const fvec bias1 = bias && lanes > VL ? load(bias + c + VL) : fvec{};
          unrolled<4>([](auto t) { Tiles::zero<t>(); });
          for (int64_t d = 0; d < deep; ++d) {
            Tiles::load<4>(left + (i / kTile * deep + d) * kTileSize);
            Tiles::load<5>(left + ((i / kTile + 1) * deep + d) * kTileSize);
            const bf16* right = tiles + (d * across + c / kTile) * kTileSize;
            Tiles::load<6>(right);
            Tiles::load<7>(right + kTileSize);
            unrolled<4>([](auto t) { Tiles::multiply<t, 4 + t / 2, 6 + t % 2>(); });
          }
          unrolled<4>([&](auto t) { Tiles::store<t>(result[t]); });
          const int64_t height = std::min<int64_t>(2 * kTile, count - i);
          bf16* out = y + (row + i) * n + c;
          const uint32_t* keep = bits + i * kWords + (c - begin) / 32;
          accumulate ? add_tiles<true>(result[0], height, keep, kWords, scale, bias0, bias1, mask, out, n)
                     : add_tiles<false>(result[0], height, keep, kWords, scale, bias0, bias1, mask, out, n);
        }
      }
    }
  });
}

void amx_outer(const bf16* x, int64_t rows, int64_t m, const Dropout* dropout, const float* h, int64_t ldh, int64_t r,
               float* g, float* column_sum) {
  constexpr int64_t kRows = 2 * kTileDepth, kColumns = 4 * kTile;  // of x per step
  const int64_t total = r + (column_sum ? 1 : 0), deep = blocks(rows, kTileDepth), tall = blocks(total, kTile);
  // h^T as A tiles, and a row of ones for the sums
  Scratch<bf16> left(deep * tall * kTileSize);
  parallel_for(deep, 4, [&](int64_t first, int64_t last) {
    std::memset(left + first * tall * kTileSize, 0, (last - first) * tall * kTileSize * sizeof(bf16));
    for (int64_t i = first * kTileDepth; i < std::min(rows, last * kTileDepth); ++i) {
      bf16* out = left + i / kTileDepth * tall * kTileSize + i % kTileDepth;
      for (int64_t j = 0; j < total; ++j) out[j * kTileDepth] = from_float<bf16>(j < r ? h[i * ldh + j] : 1.f);
    }
  });
  // Strips of at most 512 columns, long enough to be read as streams, cut into parts of at least 256 rows until there
  // are 16 tasks or so, whatever the number of threads; the parts' sums are added in their order.
  constexpr int64_t kStrip = 8 * kColumns, kTasks = 16, kPart = 4 * kRows;
  const int64_t strip = std::clamp<int64_t>(blocks(m / 8, kColumns), 1, 8) * kColumns,
                strips = std::max<int64_t>(blocks(m, strip), 1);
  const int64_t height = std::max(blocks(rows, blocks(kTasks, strips) * kRows) * kRows, kPart);
  const int64_t parts = std::max<int64_t>(blocks(rows, height), 1), across = strip / kTile, ldp = padded(m);
  Scratch<float> partial(parts * total * ldp);
  parallel_for(strips * parts, 1, [&](int64_t first, int64_t last) {
    Tiles scope;
    Scratch<float> sums(tall * across * kTileResult);
    Scratch<bf16> right(kRows / kTileDepth * across * kTileSize);  // x's rows as B tiles
    for (int64_t task = first; task < last; ++task) {
      const int64_t begin = task % strips * strip, width = std::min(m - begin, strip), part = task / strips;
      std::fill_n(static_cast<float*>(sums), tall * across * kTileResult, 0.f);
      for (int64_t i = part * height; i < std::min(rows, (part + 1) * height); i += kRows) {
        const int64_t steps = std::min(kRows / kTileDepth, deep - i / kTileDepth);
        for (int64_t pair = 0; pair < steps * kTileDepth; pair += 2) {
          const bf16* p = x + (i + pair) * m + begin;
          bf16* out = right + pair / kTileDepth * across * kTileSize + pair % kTileDepth * kTile;
          const __mmask32 even = i + pair < rows ? ~0u : 0, odd = i + pair + 1 < rows ? ~0u : 0;
          uint32_t bits[2][kStrip / 32];
          for (int side = 0; side < 2 && dropout; ++side)
            kept(dropout, uint64_t((i + pair + side) * m + begin), width, bits[side]);
          for (int64_t c = 0; c < width; c += 2 * kTile, out += 2 * kTileSize) {
            const __mmask32 mask = width - c >= 2 * kTile ? ~0u : (1u << (width - c)) - 1;
            const __mmask32 low = even & mask & (dropout ? bits[0][c / 32] : ~0u);
            const __mmask32 high = odd & mask & (dropout ? bits[1][c / 32] : ~0u);
            _mm_prefetch(p + 8 * m + c, _MM_HINT_T0);
            _mm_prefetch(p + 9 * m + c, _MM_HINT_T0);
            interleave(_mm512_maskz_loadu_epi16(low, p + c), _mm512_maskz_loadu_epi16(high, p + m + c), out,
                       out + kTileSize);
          }
        }
        for (int64_t t = 0; t < tall; ++t) {
          const bf16* a = left + (i / kTileDepth * tall + t) * kTileSize;
          for (int64_t c = 0; c < blocks(width, kTile); c += 4) {
            float* sum = sums + (t * across + c) * kTileResult;
            unrolled<4>([&](auto v) { Tiles::load<v>(sum + v * kTileResult); });
            for (int64_t d = 0; d < steps; ++d) {
              Tiles::load<4>(a + d * tall * kTileSize);
              unrolled<4>([&](auto v) {
                Tiles::load<5 + v % 3>(right + (d * across + c + v) * kTileSize);
                Tiles::multiply<v, 4, 5 + v % 3>();
              });
            }
            unrolled<4>([&](auto v) { Tiles::store<v>(sum + v * kTileResult); });
          }
        }
      }
      for (int64_t j = 0; j < total; ++j) {
        float* out = partial + (part * total + j) * ldp + begin;
        for (int64_t c = 0; c < width; c += kTile) {
          const float* sum = sums + (j / kTile * across + c / kTile) * kTileResult + j % kTile * kTile;
          store(out + c, load(sum));
        }
      }
    }
  });
  const float scale = dropout ? dropout->scale : 1.f;
  parallel_for(blocks(ldp, VL), kGrain / (total * parts * VL), [&](int64_t first, int64_t last) {
    for (int64_t j = 0; j < total; ++j) {
      float* out = j < r ? g + j * ldp : column_sum;
      for (int64_t c = first * VL; c < last * VL; c += VL) {
        fvec sum = {};
        for (int64_t part = 0; part < parts; ++part) sum += load(partial + (part * total + j) * ldp + c);
        store(out + c, scale * sum);
      }
    }
  });
}
#endif

}  // namespace

void lora_pack(Matrix source, float scale, float* panel, int64_t ld) {
  PYFAST_DISPATCH(source.dtype, T, {
    parallel_for(source.rows, kGrain / std::max<int64_t>(1, source.columns), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const T* row = (const T*)source.data + i * source.row_stride;
        for (int64_t j = 0; j < source.columns; ++j)
          panel[i * ld + j] = scale * to_float(row[j * source.column_stride]);
      }
    });
  })
}

void lora_unpack(const float* panel, int64_t ld, float scale, Matrix target) {
  PYFAST_DISPATCH(target.dtype, T, {
    T* out = (T*)target.data;
    const auto write = [=](T* to, const float* from, int64_t n) {
      for_lanes(n, [=](int64_t i, int lanes) { store_any(to + i, scale * load_any(from + i, lanes), lanes); });
    };
    if (target.column_stride == 1) {
      parallel_for(target.rows, kGrain / std::max<int64_t>(1, target.columns), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) write(out + i * target.row_stride, panel + i * ld, target.columns);
      });
    } else {  // in the order of the target's memory, so that threads do not share cache lines
      const int64_t depth = padded(target.rows);
      parallel_for((target.columns + VL - 1) / VL, kGrain / (depth * VL), [&](int64_t first, int64_t last) {
        std::vector<float> turned(depth * VL);
        for (int64_t j = first * VL; j < std::min(target.columns, last * VL); ++j) {
          if (j % VL == 0) transpose32(panel + j, ld, turned.data(), depth, target.rows, VL);
          write(out + j * target.column_stride, &turned[j % VL * depth], target.rows);
        }
      });
    }
  })
}

void lora_down(DType t, const void* x, int64_t rows, int64_t k, DropoutArgs args, const float* a, int64_t lda,
               int64_t r, float* h, int64_t ldh) {
  const Dropout mask(args.p, args.seed), *dropout = args.p > 0 ? &mask : nullptr;
#ifdef __AVX512F__
  if (use_amx(t)) return amx_down((const bf16*)x, rows, k, dropout, a, lda, r, h, ldh);
#endif
  PYFAST_DISPATCH(t, T, {
    parallel_for(rows, ACC, [&](int64_t first, int64_t last) {
      const auto product = r <= VL ? down<1, T> : r <= 2 * VL ? down<2, T> : down<4, T>;
      product((const T*)x, first, last, k, dropout, a, lda, r, h, ldh);
    });
  })
}

void lora_up(DType t, void* y, int64_t rows, int64_t n, DropoutArgs args, const float* h, int64_t ldh, int64_t r,
             const float* b, const float* bias, bool accumulate) {
  const Dropout mask(args.p, args.seed), *dropout = args.p > 0 ? &mask : nullptr;
#ifdef __AVX512F__
  if (use_amx(t)) return amx_up((bf16*)y, rows, n, dropout, h, ldh, r, b, bias, accumulate);
#endif
  PYFAST_DISPATCH(t, T, up((T*)y, rows, n, dropout, h, ldh, r, b, bias, accumulate))
}

void lora_outer(DType t, const void* x, int64_t rows, int64_t m, DropoutArgs args, const float* h, int64_t ldh,
                int64_t r, float* g, float* column_sum) {
  const Dropout mask(args.p, args.seed), *dropout = args.p > 0 ? &mask : nullptr;
#ifdef __AVX512F__
  if (use_amx(t)) return amx_outer((const bf16*)x, rows, m, dropout, h, ldh, r, g, column_sum);
#endif
  PYFAST_DISPATCH(t, T, outer((const T*)x, rows, m, dropout, h, ldh, r, g, column_sum))
}

}  // namespace pyfast::PYFAST_ISA
