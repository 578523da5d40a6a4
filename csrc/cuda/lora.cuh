// The low-rank products of LoRA (Hu et al. 2021) and of its gradients, each of which reads one large activation, or
// writes one, once. The frozen products are cuBLAS's, through torch (or lora90.cuh's, which then forms y and dx whole);
// what stands here adds to them, forward
//   h = D(x) A^T for the adapters of all projections of x, and y = s h B^T + bias, to which cuBLAS adds x W^T;
// and backward
//   dh = s dy B, dB = s dy^T h and the bias's gradient in one pass over dy,
//   dx = D(dh A) and dA = dh^T D(x) in one pass over x, and cuBLAS adds dy W to dx.
// D is dropout, drawn anew from its seed (common/philox.h), once for all that needs it. A bias is one more row of B,
// and one more column of h: of ones.
//
// Tiling: a block takes a strip of 256 rows (fp32: 128), 32 (16) to a warp, and walks over a part of the columns in
// tiles of 64. `down` (h, dh) sums over columns: its 16 to 64 panel rows stay in registers, and a part of the columns
// gives a part of the sum. `outer` (dA, dB) sums over rows: a strip gives a part of it. Parts are added in a fixed
// order by lora_sum_kernel: the same inputs give the same bits. `up` (y, dx) sums over the rank alone. More than 64
// rows of a panel (fp32: 32) take several passes.
//
// Shared memory, 16-bit with R = 16, 32 or 64 rows of the panel: h 512 R, a ring of two tiles of x and of the panel,
// 2 (32 KB + 128 R), so 76, 88 or 112 KB: two blocks per processor on sm_90; dropout adds 40 KB, writing y alone takes
// 12 to 48. fp32: 87 or 103 KB, dropout 38 more.
//
// Bound: memory, at 3.0 TB/s on an H100. Of a layer with M rows, K = N = 4096 and 16-bit elements a frozen GEMM takes
// 2 M K N FLOP, 42 us per 1024 rows at 800 TFLOP/s; forward reads x (2.8 us) and writes y (2.8 us), and the GEMM reads
// y again in its epilogue; backward reads dy, reads x and writes dx (8.4 us), and writes and sums parts of dA and dB, R
// fp32 per 256 rows and column, 3 % of a pass for each 4 of R. So with r = 16 at best 1.13 times the GEMM forward,
// 1.25 backward. The alternative, W and B in one wider matrix (bordered), trades the pass over y for a copy of x: no
// gain unless what writes x leaves it in the wider rows, and a second copy of every frozen weight; lora90.cuh, on
// sm_90a, goes over both matrices in one product instead. Without a GPU these are bounds on paper.
#pragma once
#include "common/philox.h"
#include "cuda/lora.h"
#include "cuda/tile.cuh"

namespace pyfast::cuda {

constexpr int kLoraThreads = 256, kLoraWarps = kLoraThreads / 32;
constexpr int kLoraMostGranules = 4;  // of a launch

struct LoraLaunch {
  Lora a;
  LoraGranule granules[kLoraMostGranules];
  int count, first;  // how many they are, and which of all is the first
  int ones;          // the row of these, or -1
  int64_t strips, columns_per_part;
  bool x_aligned, y_aligned;
};

// What a kernel for element T and kRank rows of a panel holds in shared memory: h, two tiles of the panel, with dropout
// the masks and a tile with zeros where x was dropped, and, where it is read, two tiles of x.
template <class T, int kRank, bool kDropout>
struct LoraTiles {
  static constexpr int kRows = sizeof(T) == 2 ? 256 : 128, kColumns = int(kLoraColumns);
  static constexpr int kBlocks = kRows / kLoraWarps / 16;  // of 16 rows, in a warp
  static constexpr int kGranules = kRank / kLoraGranule;
  using H = Tile<T, kRows, kRank>;
  using Panel = Tile<T, kRank, kColumns>;
  using X = Tile<T, kRows, kColumns>;
  static constexpr int kMask = kRows * kColumns / 8;  // a bit per element
  static constexpr int kPanels = H::kBytes, kMasks = kPanels + 2 * Panel::kBytes;
  static constexpr int kDropped = kMasks + (kDropout ? kLoraMostGranules * kMask : 0);
  static constexpr int kTiles = kDropped + (kDropout ? X::kBytes : 0);
  static constexpr int shared_bytes(bool reads_x) { return kTiles + (reads_x ? 2 * X::kBytes : 0); }
};

// Whether each of 8 logical indices from e on is kept, in a bit each
__device__ __forceinline__ uint32_t kept_bits(uint64_t seed, uint32_t threshold, uint64_t e) {
  uint32_t bits = 0;
  const int blocks = e % 4 ? 3 : 2;
#pragma unroll
  for (int b = 0; b < 3; ++b) {
    if (b >= blocks) break;
    uint32_t words[4];
    philox4x32<1>(seed, e / 4 + b, words);
#pragma unroll
    for (int i = 0; i < 4; ++i) bits |= uint32_t(words[i] >= threshold) << (4 * b + i);
  }
  return bits >> (e % 4) & 0xFF;
}

// The elements of 8 bits that are set, zero for the others, `vector` being the first or second 16 bytes of them
template <class T>
__device__ __forceinline__ Vector kept_elements(Vector v, uint32_t bits, int vector) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 2)
      v.words[i] &= (bits >> (2 * i) & 1 ? 0xFFFFu : 0u) | (bits >> (2 * i + 1) & 1 ? 0xFFFF0000u : 0u);
    else
      v.words[i] &= bits >> (4 * vector + i) & 1 ? ~0u : 0u;
  }
  return v;
}

template <class T, int kRank, bool kUp, bool kDropout>
__global__ void __launch_bounds__(kLoraThreads, sizeof(T) == 4 && kDropout ? 1 : 2)
    lora_kernel(const __grid_constant__ LoraLaunch l) {
  PYFAST_SHARED(shared);
  using Tiles = LoraTiles<T, kRank, kDropout>;
  using H = typename Tiles::H;
  using Panel = typename Tiles::Panel;
  using X = typename Tiles::X;
  constexpr int kRows = Tiles::kRows, kColumns = Tiles::kColumns, kGranules = Tiles::kGranules;
  const Lora& a = l.a;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int64_t strip = blockIdx.x % l.strips, part = blockIdx.x / l.strips, first_row = strip * kRows;
  const int rows = int(a.rows - first_row < kRows ? a.rows - first_row : kRows);
  const int64_t begin = part * l.columns_per_part, rest = a.columns - begin;
  const int64_t end = begin + (rest < l.columns_per_part ? rest : l.columns_per_part);

  const H h{reinterpret_cast<T*>(shared)};
  const auto panel = [&](int stage) {
    return Panel{reinterpret_cast<T*>(shared + Tiles::kPanels + stage * Panel::kBytes)};
  };
  const auto mask = [&](int adapter) { return shared + Tiles::kMasks + adapter * Tiles::kMask; };
  const X dropped{reinterpret_cast<T*>(shared + Tiles::kDropped)};
  const auto x = [&](int stage) { return X{reinterpret_cast<T*>(shared + Tiles::kTiles + stage * X::kBytes)}; };

  const bool outer = (kUp || !kDropout) && a.outer;
  if (kUp || outer) {
    for (int i = tid; i < kRows * kRank; i += kLoraThreads) {
      const int row = i / kRank, j = i % kRank, g = j / kLoraGranule, k = j % kLoraGranule;
      float value = 0.f;
      if (row < rows && g < l.count) {
        if (j == l.ones)
          value = 1.f;
        else if (k < l.granules[g].count && a.h)
          value = l.granules[g].scale * a.h[(first_row + row) * a.rank + l.granules[g].column + k];
      }
      h.chunk(row, j / H::kChunk)[j % H::kChunk] = from_float<T>(value);
    }
  }

  const auto load = [&](int64_t at, int stage) {
    const T* from = static_cast<const T*>(a.panel) + l.first * kLoraGranule * a.ld + at;
    panel(stage).load(from, a.ld, int(a.ld - at), true, [&](int row) { return row < l.count * kLoraGranule; });
    if (a.x)
      x(stage).load(static_cast<const T*>(a.x) + first_row * a.columns + at, a.columns, int(a.columns - at),
                    l.x_aligned, [&](int row) { return row < rows; });
  };

  // Masks of all adapters for the tile at column `at`
  const auto draw = [&](int64_t at) {
    const uint32_t threshold = uint32_t(a.dropout_p * 4294967296.0);
    for (int g = 0; g < l.count; ++g) {
      if (g && l.granules[g].adapter == l.granules[g - 1].adapter) continue;
      const uint64_t seed = uint64_t(*l.granules[g].seed);
      for (int i = tid; i < rows * kColumns / 8; i += kLoraThreads)
        mask(g)[i] = uint8_t(
            kept_bits(seed, threshold, uint64_t(first_row + i / 8) * uint64_t(a.columns) + uint64_t(at + i % 8 * 8)));
    }
  };
  // x without what the adapter of granule g drops
  const auto drop = [&](int g, int stage) {
    for (int i = tid; i < kRows * kColumns / 8; i += kLoraThreads) {
      const uint32_t bits = i / 8 < rows ? mask(g)[i] : 0;
#pragma unroll
      for (int v = 0; v < int(8 * sizeof(T) / 16); ++v) {
        const int chunk = i % 8 * 8 / X::kChunk + v;
        Vector elements;
        memcpy(&elements, x(stage).chunk(i / 8, chunk), 16);
        elements = kept_elements<T>(elements, bits, v);
        memcpy(dropped.chunk(i / 8, chunk), &elements, 16);
      }
    }
  };

  float sums[Tiles::kBlocks][kGranules][2][4] = {};  // of down

  // down and outer, from a tile that holds what granules first to last - 1 are multiplied with
  const auto multiply_x = [&](const X& tile, int64_t at, int stage, int first, int last) {
    if constexpr (!kUp) {
#pragma unroll
      for (int m = 0; m < Tiles::kBlocks; ++m) {
        const int row = (warp * Tiles::kBlocks + m) * 16;
        if (row >= rows || !a.down) continue;
        if constexpr (sizeof(T) == 2) {
#pragma unroll(kRank == 64 ? 2 : 4)  // more takes too many registers
          for (int k = 0; k < kColumns; k += 16) {
            uint32_t block[4];
            load_rows<false>(block, tile, row, k);
#pragma unroll
            for (int g = 0; g < kGranules; ++g)
              if (g >= first && g < last) multiply_step<T, false>(sums[m][g], block, panel(stage), g * kLoraGranule, k);
          }
        } else {
#pragma unroll
          for (int g = 0; g < kGranules; ++g)
            if (g >= first && g < last)
              multiply<T, false, kColumns>(sums[m][g], tile, row, panel(stage), g * kLoraGranule);
        }
      }
    }
    if (outer) {
      constexpr int kWarps = kLoraWarps / kGranules, kWidth = kColumns / kWarps;  // warps per granule, their columns
      constexpr int kStep = kWidth < 16 ? kWidth : 16;
      const int g = warp / kWarps, row = g * kLoraGranule;
      if (g < first || g >= last) return;
      float* const to = a.outer + ((strip * a.granule_count + l.first) * kLoraGranule + row + lane / 4) * a.ld + at;
#pragma unroll 1  // more takes too many registers
      for (int column = warp % kWarps * kWidth, step = 0; step < kWidth; step += kStep, column += kStep) {
        float acc[kStep / 8][4] = {};
        multiply_transposed<T>(acc, h, row, tile, column, (rows + 31) / 32 * 32);
#pragma unroll
        for (int j = 0; j < kStep / 8; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int c = column + 8 * j + lane % 4 * 2 + e % 2;
            if (at + c < a.columns) to[e / 2 * 8 * a.ld + c] = acc[j][e];
          }
      }
    }
  };

  const auto multiply_h = [&](int64_t at, int stage) {  // up
#pragma unroll
    for (int m = 0; m < Tiles::kBlocks; ++m) {
      const int row = (warp * Tiles::kBlocks + m) * 16;
      if (row >= rows || !a.y) continue;
      constexpr int kTiles = kColumns / 8;
      float acc[kTiles][4] = {};
      int adapter = 0;  // the first granule of this one's adapter
#pragma unroll
      for (int g = 0; g < kGranules; ++g) {
        if (g >= l.count) break;
        if (l.granules[g].adapter != l.granules[adapter].adapter) adapter = g;
        float product[kDropout ? kTiles : 1][4] = {};
        const auto multiply_into = [&](float (&to)[kTiles][4]) {
          if constexpr (sizeof(T) == 2) {
            uint32_t block[4];
            load_rows<false>(block, h, row, g * 16);
            multiply_step<T, true>(to, block, panel(stage), 0, g * kLoraGranule);
          } else {
            const H left{h.data + g * kLoraGranule};
            const Panel right{panel(stage).data + g * kLoraGranule * Panel::kStride};
            multiply<T, true, kLoraGranule>(to, left, row, right, 0);
          }
        };
        if constexpr (kDropout) {
          multiply_into(product);
#pragma unroll
          for (int j = 0; j < kTiles; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int i = row + lane / 4 + e / 2 * 8;
              if (i < rows && mask(adapter)[i * 8 + j] >> (lane % 4 * 2 + e % 2) & 1) acc[j][e] += product[j][e];
            }
        } else {
          multiply_into(acc);
        }
      }
      T* const y = static_cast<T*>(a.y) + first_row * a.columns;
      if (a.accumulate) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int i = row + lane / 4 + e / 2 * 8;
            const int64_t c = at + 8 * j + lane % 4 * 2 + e % 2;
            if (i < rows && c < a.columns) acc[j][e] += to_float(y[i * a.columns + c]);
          }
      }
      const float one[2] = {1.f, 1.f};
      store_rows(acc, one, y + at, a.columns, row, rows, 0, int(a.columns - at), l.y_aligned);
    }
  };

  walk<kColumns, 2>(int(begin), int(end), load, [&](int at, int stage) {
    if constexpr (!kDropout) {
      if (!kUp || outer) multiply_x(x(stage), at, stage, 0, l.count);
      if constexpr (kUp) multiply_h(at, stage);
    } else {
      draw(at);
      __syncthreads();
      if constexpr (kUp) multiply_h(at, stage);
      if (!kUp || outer) {
        for (int g = 0, next; g < l.count; g = next) {
          for (next = g + 1; next < l.count && l.granules[next].adapter == l.granules[g].adapter;) ++next;
          drop(g, stage);
          __syncthreads();
          multiply_x(dropped, at, stage, g, next);
          __syncthreads();  // all are done with it before the next adapter's
        }
      }
    }
  });

  if constexpr (!kUp) {
    if (!a.down) return;
#pragma unroll
    for (int m = 0; m < Tiles::kBlocks; ++m)
#pragma unroll
      for (int g = 0; g < kGranules; ++g)
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int row = (warp * Tiles::kBlocks + m) * 16 + lane / 4 + e / 2 % 2 * 8;
          const int k = e / 4 * 8 + lane % 4 * 2 + e % 2;
          if (row < rows && g < l.count && k < l.granules[g].count)
            a.down[(part * a.rows + first_row + row) * a.down_rank + l.granules[g].column - a.down_column + k] =
                l.granules[g].scale * sums[m][g][e / 4][e % 4];
        }
  }
}

template <class T, int kRank, bool kUp>
int launch_lora_pass(const LoraLaunch& l, void* stream) {
  const Lora& a = l.a;
  const int shared =
      a.dropout ? LoraTiles<T, kRank, true>::shared_bytes(a.x) : LoraTiles<T, kRank, false>::shared_bytes(a.x);
  const int64_t parts = lora_parts(a.dtype, a.rows, a.columns);
  return launch(a.dropout ? lora_kernel<T, kRank, kUp, true> : lora_kernel<T, kRank, kUp, false>,
                Shape{l.strips * parts, kLoraThreads, shared}, l, stream);
}

template <class T, bool kUp>
int launch_lora(const Lora& a, void* stream) {
  if (a.rows == 0 || (kUp && a.columns == 0)) return 0;
  constexpr int kMost = sizeof(T) == 2 ? 4 : 2;
  const int64_t parts = lora_parts(a.dtype, a.rows, a.columns), tiles = lora_tiles(a.columns);
  LoraLaunch l{a};
  l.strips = lora_strips(a.dtype, a.rows);
  l.columns_per_part = (tiles + parts - 1) / parts * kLoraColumns;
  const int64_t row_bytes = a.columns * int64_t(sizeof(T));
  l.x_aligned = reinterpret_cast<uintptr_t>(a.x) % 16 == 0 && row_bytes % 16 == 0;
  l.y_aligned = reinterpret_cast<uintptr_t>(a.y) % 4 == 0 && row_bytes % 4 == 0;
  for (l.first = 0; l.first < a.granule_count; l.first += l.count) {
    l.count = a.granule_count - l.first < kMost ? a.granule_count - l.first : kMost;
    for (int g = 0; g < l.count; ++g) l.granules[g] = a.granules[l.first + g];
    const int64_t ones = a.ones - l.first * kLoraGranule;
    l.ones = a.ones >= 0 && ones >= 0 && ones < l.count * kLoraGranule ? int(ones) : -1;
    int e;
    if (l.count == 1)
      e = launch_lora_pass<T, 16, kUp>(l, stream);
    else if (kMost == 2 || l.count == 2)
      e = launch_lora_pass<T, 32, kUp>(l, stream);
    else
      e = launch_lora_pass<T, kMost * kLoraGranule, kUp>(l, stream);
    if (e) return e;
    l.a.accumulate = true;
  }
  return 0;
}

// one per element type, each in a file of its own: they take longest to compile
int lora_fp32(const Lora& a, bool up, void* stream);
int lora_bf16(const Lora& a, bool up, void* stream);
int lora_fp16(const Lora& a, bool up, void* stream);

}  // namespace pyfast::cuda
