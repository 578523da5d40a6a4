// linear (cpu/linear.h) in bf16 on AMX. The weight is packed into tiles once per call, by all threads, 16 MB at a time;
// a low-rank term is a few more columns of x and rows of the weight, so that it costs no pass over y. A task is a block
// of 256 rows. For 256 columns and 512 of the depth at a time, x's part and the sums so far stay in L2 while the weight
// passes by once, 32 columns of it staying in L1: tileloaddt1 keeps x's tiles out of their way.
#pragma once
#include <algorithm>
#include <cstring>

#include "cpu/amx.h"
#include "cpu/gemm.h"
#include "cpu/linear_plan.h"
#include "cpu/lora.h"
#include "cpu/parallel.h"

namespace pyfast::avx512::amx {
namespace {

constexpr int64_t kPair = 2 * kTile;  // rows and columns of sums in registers
constexpr int64_t kRows = 256;        // of a task
constexpr int64_t kDepth = 512;       // of a part

// Tiles of 16 columns of w transposed, from row `column` on, one after the other along the depth.
void pack_transposed(const LinearTerm& term, int64_t column, int64_t columns, bf16* out) {
  const int64_t valid = std::clamp<int64_t>(columns - column, 0, kTile);
  const bf16* w = (const bf16*)term.w + column * term.ldw;
  alignas(64) bf16 edge[kTileSize];
  for (int64_t d = 0; d < term.depth; d += kTileDepth, out += kTileSize) {
    if (valid == kTile) {
      transpose32(w + d, term.ldw / 2, out, kTile, kTile, kTile);
    } else {
      std::memset(edge, 0, sizeof edge);
      for (int64_t i = 0; i < valid; ++i) std::memcpy(edge + i * kTileDepth, w + i * term.ldw + d, kTileDepth * 2);
      transpose32(edge, kTile, out, kTile, kTile, kTile);
    }
  }
}

// Tiles of 32 columns of w, two side by side (`step` elements apart) for each 32 of the depth.
void pack_straight(const LinearTerm& term, int64_t column, int64_t columns, bf16* out, int64_t step) {
  const __mmask32 mask = columns - column >= kPair ? ~0u : (1u << (columns - column)) - 1;
  const bf16* w = (const bf16*)term.w + column;
  for (int64_t d = 0; d < term.depth; d += 2) {
    bf16* tile = out + d / kTileDepth * kTileSize + d % kTileDepth * kTile;
    interleave(_mm512_maskz_loadu_epi16(mask, w + d * term.ldw), _mm512_maskz_loadu_epi16(mask, w + (d + 1) * term.ldw),
               tile, tile + step);
  }
}

// The same of b, whose rows beyond r are zero
void pack_low_rank(const float* b, int64_t r, int64_t ldb, int64_t column, bf16* out, int64_t step) {
  for (int64_t d = 0; d < blocks(r, kTileDepth) * kTileDepth; d += 2) {
    for (int64_t t = 0; t < 2; ++t) {
      const int64_t c = column + t * kTile;
      const auto row = [&](int64_t j) { return j < r && c < ldb ? load(b + j * ldb + c) : fvec{}; };
      pack_pairs(row(d), row(d + 1), out + t * step + d / kTileDepth * kTileSize + d % kTileDepth * kTile);
    }
  }
}

// 32 rows of floats as A tiles, zero beyond `rows` and r; the lower 16 rows `step` elements on
void pack_left(const float* h, int64_t ldh, int64_t rows, int64_t r, bf16* out, int64_t step) {
  for (int64_t i = 0; i < kPair; ++i)
    for (int64_t d = 0; d < r; d += kTileDepth) {
      const auto part = [&](int64_t j) {
        const int64_t lanes = i < rows ? std::clamp<int64_t>(r - j, 0, VL) : 0;
        return lanes ? load_any(h + i * ldh + j, int(lanes)) : fvec{};
      };
      _mm512_storeu_si512(out + i / kTile * step + d / kTileDepth * kTileSize + i % kTile * kTileDepth,
                          pack_bf16(part(d), part(d + VL)));
    }
}

struct Epilogue {
  const float* bias;
  bool accumulate;

  // 2 x 2 tiles of sums to `rows` rows of up to 32 columns of y
  void store(const float* sums, int64_t column, int64_t columns, int64_t rows, bf16* y, int64_t ldy) const {
    const int64_t lanes = std::min(kPair, columns - column);
    const __mmask32 mask = lanes == kPair ? ~0u : (1u << lanes) - 1;
    const fvec bias0 = bias ? load(bias + column) : fvec{};
    const fvec bias1 = bias && lanes > VL ? load(bias + column + VL) : fvec{};
    for (int64_t i = 0; i < rows; ++i, y += ldy) {
      const float* p = sums + i / kTile * 2 * kTileResult + i % kTile * kTile;
      fvec low = load(p) + bias0, high = load(p + kTileResult) + bias1;
      if (accumulate) {
        const __m512i old = _mm512_maskz_loadu_epi16(mask, y);
        low += (fvec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(old)), 16);
        high += (fvec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(old, 1)), 16);
      }
      _mm512_mask_storeu_epi16(y, mask, pack_bf16(low, high));
    }
  }
};

void linear(const LinearTerm* terms, int64_t count, int64_t rows, int64_t columns, const float* h, int64_t ldh,
            int64_t r, const float* b, const float* bias, bool accumulate, void* y) {
  const LinearParts plan(terms, count, kDepth, kTileDepth);
  const auto& parts = plan.parts;
  const int64_t deep = plan.deep / kTileDepth;  // in tiles
  const int64_t rank_tiles = blocks(r, kTileDepth), rank_size = rank_tiles * kTileSize;
  const int64_t column_size = (deep + rank_tiles) * kTileSize;  // elements of 16 columns' tiles
  const int64_t chunk = chunk_of(columns, column_size / kTile * int64_t(sizeof(bf16)), kPair);
  Scratch<bf16> packed(chunk / kTile * column_size);
  for (int64_t from = 0; from < columns; from += chunk) {
    const int64_t to = std::min(columns, from + chunk);
    parallel_for(blocks(to - from, kPair), 1, [&](int64_t first, int64_t last) {
      for (int64_t pair = first; pair < last; ++pair) {
        const int64_t column = from + pair * kPair;
        bf16* out = packed + pair * 2 * column_size;
        for (int64_t i = 0; i < count; out += terms[i++].depth / kTileDepth * kTileSize) {
          if (terms[i].transposed) {
            for (int64_t t = 0; t < 2; ++t)
              pack_transposed(terms[i], column + t * kTile, columns, out + t * column_size);
          } else {
            pack_straight(terms[i], column, columns, out, column_size);
          }
        }
        pack_low_rank(b, r, padded(columns), column, out, column_size);
      }
    });

    const LinearTasks tasks{rows, kRows, from, to};
    parallel_for(tasks.count(), 1, [&](int64_t first, int64_t last) {
      Tiles scope;
      alignas(64) float results[4 * kTileResult];
      Scratch<float> sums(kRows * kColumns);
      Scratch<bf16> low_rank(kRows / kTile * rank_size), edge(kPair * deep * kTileDepth);
      const Epilogue epilogue{bias, accumulate};
      for (int64_t task = first; task < last; ++task) {
        const auto [row_begin, row_end, column_begin, column_end] = tasks[task];
        for (int64_t i = row_begin; i < row_end && r; i += kPair)
          pack_left(h + i * ldh, ldh, row_end - i, r, low_rank + (i - row_begin) / kTile * rank_size, rank_size);
        const int64_t whole_end = row_begin + (row_end - row_begin) / kPair * kPair, rest = row_end - whole_end;
        bf16* spare = edge;  // of each term, the rows that do not fill a pair of tiles, and zeros
        for (int64_t n = 0; n < count && rest; spare += kPair * terms[n++].depth) {
          const int64_t depth = terms[n].depth;
          std::memcpy(spare, (const bf16*)terms[n].x + whole_end * depth, rest * depth * sizeof(bf16));
          std::memset(spare + rest * depth, 0, (kPair - rest) * depth * sizeof(bf16));
        }
        for (int64_t c0 = column_begin; c0 < column_end; c0 += kColumns)
          for (const auto& part : parts) {
            const int64_t depth = part.term->depth;
            const bool first_part = &part == &parts.front(), last_part = &part == &parts.back();
            for (int64_t c = c0; c < std::min(column_end, c0 + kColumns); c += kPair)
              for (int64_t i = row_begin; i < row_end; i += kPair) {
                const bf16* right = packed + (c - from) / kTile * column_size;
                const auto add = [=](const bf16* left, const bf16* lower, int64_t row_bytes, int64_t step,
                                     const bf16* right, int64_t tiles) {
                  for (int64_t d = 0; d < tiles; ++d) {
                    Tiles::stream<4>(left + d * step, row_bytes);
                    Tiles::load<6>(right + d * kTileSize);
                    Tiles::multiply<0, 4, 6>();
                    Tiles::load<7>(right + column_size + d * kTileSize);
                    Tiles::multiply<1, 4, 7>();
                    Tiles::stream<5>(lower + d * step, row_bytes);
                    Tiles::multiply<2, 5, 6>();
                    Tiles::multiply<3, 5, 7>();
                  }
                };
                float* sum = sums + ((c - c0) / kPair * kRows + i - row_begin) * kPair;
                if (first_part) {
                  unrolled<4>([](auto t) { Tiles::zero<t>(); });
                } else {
                  unrolled<4>([&](auto t) { Tiles::load<t>(sum + t * kTileResult); });
                }
                const bf16* x =
                    i < whole_end ? (const bf16*)part.term->x + i * depth : edge + kPair * (part.at - part.first);
                x += part.first;
                add(x, x + kTile * depth, depth * sizeof(bf16), kTileDepth, right + part.at / kTileDepth * kTileSize,
                    part.depth / kTileDepth);
                if (!last_part) {
                  unrolled<4>([&](auto t) { Tiles::store<t>(sum + t * kTileResult); });
                  continue;
                }
                const bf16* left = low_rank + (i - row_begin) / kTile * rank_size;
                add(left, left + rank_size, 64, kTileSize, right + deep * kTileSize, rank_tiles);
                unrolled<4>([&](auto t) { Tiles::store<t>(results + t * kTileResult); });
                epilogue.store(results, c, columns, std::min(kPair, row_end - i), (bf16*)y + i * columns + c, columns);
              }
          }
      }
    });
  }
}

}  // namespace
}  // namespace pyfast::avx512::amx
