// linear in fp32, by FMA: what the AMX kernel (cpu/linear_amx.h) does in bf16. The weight is packed into panels as wide
// as the sums in registers once per call, by all threads, 16 MB at a time. A task is a block of rows. For 256 columns
// and 128 of the depth at a time, x's part, read where it lies, and the sums stay in L2, a panel of the weight in L1
// until all rows of the block have seen it; the next panel and the next rows are fetched meanwhile.
//
// One thread of it is nearly as fast as MKL's GEMM, four are 1.03 to 1.4 times as fast (benchmarks/NOTES.md).
#include "cpu/linear.h"

#include <algorithm>
#include <cstring>

#include "cpu/gemm.h"
#include "cpu/linear_plan.h"
#include "cpu/lora.h"
#include "cpu/parallel.h"
#ifdef __AVX512F__
#include "cpu/linear_amx.h"
#endif

namespace pyfast::PYFAST_ISA {
namespace {

constexpr int kTall = 6, kVectors = VL == 16 ? 4 : 2;  // rows and vectors of sums in registers
constexpr int64_t kWide = kVectors * VL;               // of a panel
constexpr int64_t kRows = 126;                         // of a task, at most
constexpr int64_t kDepth = 128;                        // of a part

// w's columns from `column` on, `valid` of them, as rows of kWide floats; zeros fill the others
void pack(const LinearTerm& term, int64_t column, int64_t valid, float* out) {
  const float* w = (const float*)term.w + column * (term.transposed ? term.ldw : 1);
  if (!term.transposed) {
    for (int64_t d = 0; d < term.depth; ++d, w += term.ldw, out += kWide) {
      std::memcpy(out, w, valid * sizeof(float));
      std::memset(out + valid, 0, (kWide - valid) * sizeof(float));
    }
    return;
  }
  const int64_t whole = term.depth / VL * VL, filled = blocks(valid, VL) * VL;
  transpose32(w, term.ldw, out, kWide, valid, whole);
  for (int64_t d = 0; d < whole && filled < kWide; ++d)
    std::memset(out + d * kWide + filled, 0, (kWide - filled) * sizeof(float));
  for (int64_t d = whole; d < term.depth; ++d)
    for (int64_t c = 0; c < kWide; ++c) out[d * kWide + c] = c < valid ? w[c * term.ldw + d] : 0.f;
}

// y's columns [column, column + kWide) += or = x times a panel, both `depth` deep; meanwhile `next` is fetched, which
// is as large
void multiply_panel(int64_t rows, int64_t depth, const float* x, int64_t ldx, const float* panel, const float* next,
                    const Destination<float>& y, int64_t column) {
  const int64_t tiles = rows / kTall, share = tiles ? depth * kWide / tiles : 0;
  for (int64_t m = 0; m < tiles * kTall; m += kTall, x += kTall * ldx, next += share) {
    if (m + 2 * kTall <= rows)
      for (int64_t i = kTall; i < 2 * kTall; ++i)
        for (int64_t d = 0; d < depth; d += 16) _mm_prefetch((const char*)(x + i * ldx + d), _MM_HINT_T0);
    fma_tile<kTall, kVectors, false, true>(depth, x, ldx, panel, kWide, y, m, column, next);
  }
  const Destination<float> rest{y.data + tiles * kTall * y.ld, y.ld, y.columns, y.accumulate};
  fma_columns<kTall, kVectors, false>(rows - tiles * kTall, depth, x, ldx, panel, kWide, rest, column);
}

void linear_fp32(const LinearTerm* terms, int64_t count, int64_t rows, int64_t columns, const float* h, int64_t ldh,
                 int64_t r, const float* b, const float* bias, bool accumulate, float* y) {
  const LinearParts plan(terms, count, kDepth, 1);
  const auto& parts = plan.parts;
  const int64_t deep = plan.deep, chunk = chunk_of(columns, deep * int64_t(sizeof(float)), kWide);
  Scratch<float> packed(chunk * deep);
  const int64_t height = blocks(blocks(rows, blocks(rows, kRows)), kTall) * kTall;
  for (int64_t from = 0; from < columns; from += chunk) {
    const int64_t to = std::min(columns, from + chunk);
    parallel_for(blocks(to - from, kWide), 1, [&](int64_t first, int64_t last) {
      for (int64_t column = from + first * kWide; column < std::min(to, from + last * kWide); column += kWide) {
        float* out = packed + (column - from) * deep;
        for (const LinearTerm* term = terms; term < terms + count; out += term++->depth * kWide)
          pack(*term, column, std::min(kWide, to - column), out);
      }
    });

    const LinearTasks tasks{rows, height, from, to};
    parallel_for(tasks.count(), 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const auto [row, row_end, column_begin, column_end] = tasks[task];
        const int64_t valid = row_end - row;
        float* out = y + row * columns;
        for (int64_t c0 = column_begin; c0 < column_end; c0 += kColumns) {
          const int64_t c1 = std::min(column_end, c0 + kColumns);
          bool add = accumulate;
          if (bias) {
            for (int64_t i = 0; i < valid; ++i)
              for_lanes(c1 - c0, [&](int64_t c, int lanes) {
                float* sum = out + i * columns + c0 + c;
                store_any(sum, load(bias + c0 + c) + (add ? load_any(sum, lanes) : fvec{}), lanes);
              });
            add = true;
          }
          for (const auto& part : parts) {
            const float* x = (const float*)part.term->x + row * part.term->depth + part.first;
            for (int64_t c = c0; c < c1; c += kWide) {
              const float* panel = packed + (c - from) * deep + part.at * kWide;
              const float* next = c + kWide < c1           ? panel + deep * kWide
                                  : &part != &parts.back() ? packed + (c0 - from) * deep + (&part)[1].at * kWide
                                                           : panel;
              multiply_panel(valid, part.depth, x, part.term->depth, panel, next, {out, columns, columns, add}, c);
            }
            add = true;
          }
          for (int64_t c = c0; c < c1 && r; c += kWide)
            fma_columns<kTall, kVectors, false>(valid, r, h + row * ldh, ldh, b + c, padded(columns),
                                                Destination<float>{out, columns, columns, add}, c);
        }
      }
    });
  }
}

}  // namespace

void linear(DType t, const LinearTerm* terms, int64_t count, int64_t rows, int64_t columns, const float* h, int64_t ldh,
            int64_t r, const float* b, const float* bias, bool accumulate, void* y) {
#ifdef __AVX512F__
  if (t == DType::bf16) return amx::linear(terms, count, rows, columns, h, ldh, r, b, bias, accumulate, y);
#endif
  linear_fp32(terms, count, rows, columns, h, ldh, r, b, bias, accumulate, (float*)y);
}

}  // namespace pyfast::PYFAST_ISA
