// How `linear` (cpu/linear.h) is cut: the depth of its terms into parts, its columns into chunks whose weight is packed
// at a time, its results into tasks.
#pragma once
#include <algorithm>
#include <vector>

#include "cpu/linear.h"

namespace pyfast::PYFAST_ISA {
namespace {

constexpr int64_t kColumns = 256;           // of a task's sums in L2
constexpr int64_t kTasks = 64;              // or more, if there are so many blocks
constexpr int64_t kPackedBytes = 16 << 20;  // of the weight's panels at a time, but kColumns at least

int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Parts of the terms' depth, each of at most `most` and a multiple of `unit`, as the terms' depths are; `at`: how much
// depth is before this one
struct LinearParts {
  struct Part {
    const LinearTerm* term;
    int64_t first, depth, at;
  };
  std::vector<Part> parts;
  int64_t deep = 0;

  LinearParts(const LinearTerm* terms, int64_t count, int64_t most, int64_t unit) {
    for (const LinearTerm* term = terms; term < terms + count; deep += term++->depth) {
      const int64_t units = term->depth / unit, pieces = blocks(term->depth, most);
      for (int64_t i = 0; i < pieces; ++i) {
        const int64_t first = units * i / pieces * unit, last = units * (i + 1) / pieces * unit;
        parts.push_back({term, first, last - first, deep + first});
      }
    }
  }
};

// Columns of a chunk, in whole panels; a column of the weight takes `bytes` when packed
inline int64_t chunk_of(int64_t columns, int64_t bytes, int64_t panel) {
  return std::min(std::max(kPackedBytes / bytes / kColumns * kColumns, kColumns), blocks(columns, panel) * panel);
}

// Blocks of `height` rows by some of the columns [from, to): by all of them where that makes tasks enough
struct LinearTasks {
  int64_t rows, height, from, to;
  int64_t tall = blocks(rows, height), wide = blocks(to - from, kColumns);
  int64_t together = std::clamp<int64_t>(tall * wide / kTasks, 1, wide), across = blocks(wide, together);

  int64_t count() const { return tall * across; }
  struct Task {
    int64_t row_begin, row_end, column_begin, column_end;
  };
  Task operator[](int64_t i) const {
    const int64_t row = i / across * height, column = from + i % across * together * kColumns;
    return {row, std::min(rows, row + height), column, std::min(to, column + together * kColumns)};
  }
};

}  // namespace
}  // namespace pyfast::PYFAST_ISA
