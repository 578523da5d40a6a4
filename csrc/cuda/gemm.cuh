// Products of matrices, A (m, depth) times B (depth, n), summed in fp32: 16-bit on tensor cores (mma.sync m16n8k16),
// fp32 by FMA and with Kahan's sum. What becomes of a block's sums is the calling kernel's affair.
//
// Tiling: a block of 4 warps makes 128 x 128 elements, each warp 64 x 64 of them in registers (fp32: 64 x 64 and 32 x
// 32). Steps of 64 (32) in depth go through a ring of two stages that cp.async fills, one barrier to a step.
// Shared memory: 64 KB, so that an A100 and an H100 hold two blocks (fp32: 36 KB).
// Bound: tensor cores. A step takes 128 mma, 8 cycles each on an A100's SM quarter, beside 32 ldmatrix of a warp: 128
// of shared memory's 256 cycles. mma.sync reaches some 60 % of an H100's peak, which is wgmma's.
#pragma once
#include "cuda/tile.cuh"

namespace pyfast::cuda {

// A matrix whose rows are a tile's rows, in elements
struct Operand {
  const void* data;
  int64_t row_stride, column_stride;
  const int64_t* index;  // where row i stands, or null
  bool vectors;          // contiguous rows, each from a multiple of 16 bytes on

  Operand() = default;
  template <class T>
  Operand(const T* data, int64_t row_stride, int64_t column_stride, const int64_t* index = nullptr)
      : data(data),
        row_stride(row_stride),
        column_stride(column_stride),
        index(index),
        vectors(column_stride == 1 && row_stride * int64_t(sizeof(T)) % 16 == 0 &&
                reinterpret_cast<uintptr_t>(data) % 16 == 0) {}
};

struct Term {
  Operand a, b;
  int64_t depth;
};

struct Product {
  int64_t m, n;
  Term terms[2];  // the sum of both; depth 0 where there is none
  int splits;     // the depth is cut into so many parts, each a block's own
  // Of the rows that count, `counted` in all, those from `begin` on are here: they are A's rows, or with kADeep its
  // depth, and what lies behind them is neither read nor computed.
  const int64_t* counted;
  int64_t begin;

  __device__ __forceinline__ int64_t here(int64_t rows) const {
    const int64_t left = *counted - begin;
    return left < 0 ? 0 : left < rows ? left : rows;
  }
};

// kADeep, kBDeep: the operand's rows are the depth, else its columns are
template <class T, bool kADeep, bool kBDeep>
struct Gemm {
  static constexpr int kBlock = sizeof(T) == 2 ? 128 : 64, kDepth = sizeof(T) == 2 ? 64 : 32, kStages = 2;
  static constexpr int kThreads = 128, kPart = kBlock / 2;  // a warp makes kPart x kPart
  static constexpr int kRows = kPart / 16, kColumns = kPart / 8;
  using A = std::conditional_t<kADeep, Tile<T, kDepth, kBlock>, Tile<T, kBlock, kDepth>>;
  using B = std::conditional_t<kBDeep, Tile<T, kDepth, kBlock>, Tile<T, kBlock, kDepth>>;
  static constexpr int kSharedBytes = kStages * (A::kBytes + B::kBytes);
  using Sums = float[kRows][kColumns][4];

  int64_t m, n, depth;  // m and depth without what does not count
  int64_t row, column;  // of the block
  int64_t begin, end;   // steps
  int split, lane, warp_row, warp_column;

  static int64_t blocks(const Product& p) {
    return (p.m + kBlock - 1) / kBlock * ((p.n + kBlock - 1) / kBlock) * p.splits;
  }

  // Neighbouring blocks go along the side with fewer tiles, whose operand then stays in L2 while the other is read once
  __device__ explicit Gemm(const Product& p) : m(p.m), n(p.n), depth(p.terms[0].depth) {
    const int64_t tiles_m = (m + kBlock - 1) / kBlock, tiles_n = (n + kBlock - 1) / kBlock;
    const int64_t tile = blockIdx.x % (tiles_m * tiles_n);
    row = (tiles_m < tiles_n ? tile % tiles_m : tile / tiles_n) * kBlock;
    column = (tiles_m < tiles_n ? tile / tiles_m : tile % tiles_n) * kBlock;
    split = int(blockIdx.x / (tiles_m * tiles_n));
    (kADeep ? depth : m) = p.here(kADeep ? depth : m);
    const int64_t steps = steps_of(depth) + steps_of(p.terms[1].depth), each = (steps + p.splits - 1) / p.splits;
    begin = split * each, end = begin + each < steps ? begin + each : steps;
    lane = threadIdx.x % 32;
    warp_row = threadIdx.x / 64 * kPart, warp_column = threadIdx.x / 32 % 2 * kPart;
  }
  __device__ static int64_t steps_of(int64_t depth) { return (depth + kDepth - 1) / kDepth; }
  __device__ bool empty() const { return row >= m; }

  // Row and column, within the product, of element e of sums[i][j]
  __device__ __forceinline__ int64_t row_of(int i, int e) const {
    return row + warp_row + 16 * i + lane / 4 + e / 2 * 8;
  }
  __device__ __forceinline__ int64_t column_of(int j, int e) const {
    return column + warp_column + 8 * j + lane % 4 * 2 + e % 2;
  }

  __device__ __forceinline__ void run(const Product& p, unsigned char* shared, Sums& sums) const {
    const int64_t first_steps = steps_of(depth);
    const auto a = [&](int stage) { return A{reinterpret_cast<T*>(shared + stage * (A::kBytes + B::kBytes))}; };
    const auto b = [&](int stage) {
      return B{reinterpret_cast<T*>(shared + stage * (A::kBytes + B::kBytes) + A::kBytes)};
    };
    const auto load = [&](int64_t step, int stage) {
      if (step >= end) return;
      const bool second = step >= first_steps;
      const Term& t = p.terms[second];
      const int64_t at = (second ? step - first_steps : step) * kDepth, deep = second ? t.depth : depth;
      if constexpr (kADeep)
        copy(a(stage), t.a, at, deep, row, m);
      else
        copy(a(stage), t.a, row, m, at, deep);
      if constexpr (kBDeep)
        copy(b(stage), t.b, at, deep, column, n);
      else
        copy(b(stage), t.b, column, n, at, deep);
    };
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      load(begin + s, s);
      commit_copies();
    }
    [[maybe_unused]] Sums lost = {};  // of fp32
    int stage = 0;
    for (int64_t step = begin; step < end; ++step) {
      wait_copies<kStages - 2>();
      __syncthreads();  // this step's tiles are there, and all are done with the stage that is filled next
      load(step + kStages - 1, (stage + kStages - 1) % kStages);
      commit_copies();
      multiply(sums, lost, a(stage), b(stage));
      stage = (stage + 1) % kStages;
    }
  }

 private:
  // Begins to copy rows `row` and on, columns `column` and on, of a matrix of so many rows and columns; zeros elsewhere
  template <int kTileRows, int kTileColumns>
  __device__ static __forceinline__ void copy(const Tile<T, kTileRows, kTileColumns>& tile, const Operand& from,
                                              int64_t row, int64_t rows, int64_t column, int64_t columns) {
    using To = Tile<T, kTileRows, kTileColumns>;
    constexpr int kChunk = To::kChunk, kCopies = kTileRows * To::kChunks / kThreads;
    const T* const data = static_cast<const T*>(from.data);
    const int here = rows - row < kTileRows ? int(rows - row) : kTileRows;
    const int across = columns - column < kTileColumns ? int(columns - column) : kTileColumns;
    if (from.vectors) {
#pragma unroll 4  // all at once, their addresses would take too many registers
      for (int i = 0; i < kCopies; ++i) {
        const int at = threadIdx.x + i * kThreads, r = at / To::kChunks, c = at % To::kChunks;
        const int left = r < here ? across - c * kChunk : 0, count = left <= 0 ? 0 : left < kChunk ? left : kChunk;
        const int64_t source = count && from.index ? from.index[row + r] : row + r;
        const T* p = count ? data + source * from.row_stride + column + c * kChunk : data;
        copy_async(tile.chunk(r, c), p, count * int(sizeof(T)));
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kCopies; ++i) {
        const int at = threadIdx.x + i * kThreads, r = at / To::kChunks, c = at % To::kChunks;
        alignas(16) T elements[kChunk] = {};
        if (r < here) {
          const int64_t source = from.index ? from.index[row + r] : row + r;
#pragma unroll
          for (int e = 0; e < kChunk; ++e)
            if (c * kChunk + e < across)
              elements[e] = data[source * from.row_stride + (column + c * kChunk + e) * from.column_stride];
        }
        memcpy(tile.chunk(r, c), elements, 16);
      }
    }
  }

  __device__ __forceinline__ void multiply(Sums& sums, Sums& lost, const A& a, const B& b) const {
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int k = 0; k < kDepth; k += 16) {
        uint32_t left[kRows][4];
#pragma unroll
        for (int i = 0; i < kRows; ++i) load_rows<kADeep>(left[i], a, warp_row + 16 * i, k);
#pragma unroll
        for (int j = 0; j < kColumns; j += 2) {
          uint32_t r[4];
          load_columns<kBDeep>(r, b, warp_column + 8 * j, k);
          const uint32_t first[2] = {r[0], r[1]}, second[2] = {r[2], r[3]};
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            mma<T>(sums[i][j], left[i], first);
            mma<T>(sums[i][j + 1], left[i], second);
          }
        }
      }
    } else {
      // 4 terms at a time, and what adding them rounds off is kept for the next four: Kahan's sum
      const int g = lane / 4, t = lane % 4;
#pragma unroll 1
      for (int begin = 0; begin < kDepth; begin += 4) {
        Sums part = {};
#pragma unroll
        for (int k = begin; k < begin + 4; ++k) {
          float left[kRows][2], right[kColumns][2];
#pragma unroll
          for (int i = 0; i < 2 * kRows; ++i) {
            const int r = warp_row + 8 * i + g;
            left[i / 2][i % 2] = kADeep ? a.at(k, r) : a.at(r, k);
          }
#pragma unroll
          for (int j = 0; j < 2 * kColumns; ++j) {
            const int c = warp_column + j / 2 * 8 + 2 * t + j % 2;
            right[j / 2][j % 2] = kBDeep ? b.at(k, c) : b.at(c, k);
          }
#pragma unroll
          for (int i = 0; i < kRows; ++i)
#pragma unroll
            for (int j = 0; j < kColumns; ++j)
#pragma unroll
              for (int e = 0; e < 4; ++e) part[i][j][e] = fmaf(left[i][e / 2], right[j][e % 2], part[i][j][e]);
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int j = 0; j < kColumns; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const float term = part[i][j][e] - lost[i][j][e], sum = sums[i][j][e] + term;
              lost[i][j][e] = (sum - sums[i][j][e]) - term;
              sums[i][j][e] = sum;
            }
      }
    }
  }
};

struct alignas(8) Pair {
  float x, y;
};

// Where a product goes
struct Output {
  void* data;
  int64_t stride;        // of its rows, in elements
  const int64_t* index;  // where row i goes, or null
  int64_t split_stride;  // from one split's sums to the next's
  bool wide;             // fp32, else T
  bool add;              // to what is there, in fp32
};
struct GemmLaunch {
  Product p;
  Output out;
};

// Writes a thread's part of the sums; G knows where they belong
template <class T, class G>
__device__ __forceinline__ void store_sums(const G& gemm, const typename G::Sums& sums, const Output& out) {
  const bool pairs = out.stride % 2 == 0 && reinterpret_cast<uintptr_t>(out.data) % 8 == 0;
#pragma unroll
  for (int i = 0; i < G::kRows; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t r = gemm.row_of(i, 2 * h);
      if (r >= gemm.m) continue;
      const int64_t line = gemm.split * out.split_stride + (out.index ? out.index[r] : r) * out.stride;
#pragma unroll
      for (int j = 0; j < G::kColumns; ++j) {
        const int64_t c = gemm.column_of(j, 0);
        float x = sums[i][j][2 * h], y = sums[i][j][2 * h + 1];
        if (out.wide || sizeof(T) == 4) {
          float* const to = static_cast<float*>(out.data) + line + c;
          if (pairs && c + 1 < gemm.n) {
            Pair* const pair = reinterpret_cast<Pair*>(to);
            if (out.add) x += pair->x, y += pair->y;
            *pair = {x, y};
          } else {
            if (c < gemm.n) to[0] = out.add ? to[0] + x : x;
            if (c + 1 < gemm.n) to[1] = out.add ? to[1] + y : y;
          }
        } else if constexpr (sizeof(T) == 2) {
          T* const to = static_cast<T*>(out.data) + line + c;
          if (pairs && c + 1 < gemm.n) {
            *reinterpret_cast<uint32_t*>(to) = pack<T>(x, y);
          } else {
            if (c < gemm.n) to[0] = from_float<T>(x);
            if (c + 1 < gemm.n) to[1] = from_float<T>(y);
          }
        }
      }
    }
}

template <class T, bool kADeep, bool kBDeep>
__global__ void __launch_bounds__(Gemm<T, kADeep, kBDeep>::kThreads) gemm_kernel(const __grid_constant__ GemmLaunch l) {
  PYFAST_SHARED(shared);
  using G = Gemm<T, kADeep, kBDeep>;
  const G gemm(l.p);
  if (gemm.empty()) return;
  typename G::Sums sums = {};
  gemm.run(l.p, shared, sums);
  store_sums<T>(gemm, sums, l.out);
}

template <class T, bool kADeep, bool kBDeep>
int launch_gemm(const Product& p, const Output& out, void* stream) {
  using G = Gemm<T, kADeep, kBDeep>;
  const Shape shape{G::blocks(p), G::kThreads, G::kSharedBytes};
  return shape.blocks == 0 ? 0 : launch(gemm_kernel<T, kADeep, kBDeep>, shape, GemmLaunch{p, out}, stream);
}

}  // namespace pyfast::cuda
