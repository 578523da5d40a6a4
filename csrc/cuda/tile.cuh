// Tiles in shared memory and products of them, 16-bit on tensor cores (mma.sync m16n8k16), fp32 by FMA. Both spread a
// product over a warp alike: of a 16 x 8 block a lane holds rows g, g, g + 8, g + 8 at columns 2t, 2t + 1, 2t, 2t + 1,
// with g = lane / 4 and t = lane % 4.
#pragma once
#include "cuda/ptx.cuh"

namespace pyfast::cuda {

// Rows of 16-byte chunks. For 16-bit elements chunk c of a row stands at c ^ (row % 8) (rows shorter than 128 bytes:
// likewise among their chunks), so that ldmatrix, which reads a chunk of 8 rows at once, meets every bank once; fp32
// rows are padded by a chunk.
template <class T, int kRows, int kColumns>
struct Tile {
  static constexpr int kChunk = 16 / sizeof(T), kChunks = kColumns / kChunk;
  static constexpr int kStride = sizeof(T) == 2 ? kColumns : kColumns + kChunk;
  static constexpr int kBytes = kRows * kStride * sizeof(T);
  static constexpr int kRowsPerSwizzle = kChunks < 8 ? 8 / kChunks : 1;
  T* data;

  __device__ __forceinline__ T* chunk(int row, int c) const {
    return data + row * kStride +
           (sizeof(T) == 2 ? c ^ (row / kRowsPerSwizzle & (8 / kRowsPerSwizzle - 1)) : c) * kChunk;
  }
  __device__ __forceinline__ T at(int row, int column) const { return data[row * kStride + column]; }  // fp32 only

  // Begins to copy rows `stride` elements apart, those for which there(row), and columns before dim; zeros elsewhere.
  // Every thread of the block takes part; commit_copies and a barrier follow.
  template <class There>
  __device__ __forceinline__ void load(const T* from, int64_t stride, int dim, bool aligned, There there) const {
    for (int i = threadIdx.x; i < kRows * kChunks; i += blockDim.x) {
      const int row = i / kChunks, c = i % kChunks, column = c * kChunk;
      const int count = column < dim && there(row) ? (dim - column < kChunk ? dim - column : kChunk) : 0;
      const T* p = count ? from + row * stride + column : from;
      if (aligned) {
        copy_async(chunk(row, c), p, count * int(sizeof(T)));
      } else {
        alignas(16) T elements[kChunk] = {};
#pragma unroll
        for (int e = 0; e < kChunk; ++e)
          if (e < count) elements[e] = p[e];
        memcpy(chunk(row, c), elements, 16);
      }
    }
  }
};

// Operands of mma from tiles: 16 rows of a and 16 depths, or 16 depths and 16 columns of b, which is two of its
// operands. kDeep: the tile's rows are depths.
template <bool kDeep, class A>
__device__ __forceinline__ void load_rows(uint32_t (&r)[4], const A& a, int row, int k) {
  const int lane = threadIdx.x % 32;
  if constexpr (kDeep)
    load_matrices<true>(r, a.chunk(k + lane / 16 * 8 + lane % 8, row / 8 + lane / 8 % 2));
  else
    load_matrices<false>(r, a.chunk(row + lane % 16, k / 8 + lane / 16));
}
template <bool kDeep, class B>
__device__ __forceinline__ void load_columns(uint32_t (&r)[4], const B& b, int column, int k) {
  const int lane = threadIdx.x % 32, matrix = lane / 8, within = lane % 8;
  if constexpr (kDeep)
    load_matrices<true>(r, b.chunk(k + matrix % 2 * 8 + within, column / 8 + matrix / 2));
  else
    load_matrices<false>(r, b.chunk(column + matrix / 2 * 8 + within, k / 8 + matrix % 2));
}

// One step of a 16-bit product: the 16 x 16 block in a's registers, b's rows or columns k to k + 15
template <class T, bool kDepthFirst, int kTiles, class B>
__device__ __forceinline__ void multiply_step(float (&acc)[kTiles][4], const uint32_t (&a)[4], const B& b, int column,
                                              int k) {
#pragma unroll
  for (int j = 0; j < kTiles; j += 2) {
    uint32_t r[4];
    load_columns<kDepthFirst>(r, b, column + 8 * j, k);
    const uint32_t first[2] = {r[0], r[1]}, second[2] = {r[2], r[3]};
    mma<T>(acc[j], a, first);
    mma<T>(acc[j + 1], a, second);
  }
}

// acc (16 x 8 kTiles) += rows `row` to row + 15 of a (rows, depth) times columns `column` on of b: (depth, columns) if
// kDepthFirst, else (columns, depth)
template <class T, bool kDepthFirst, int kDepth, int kTiles, class A, class B>
__device__ __forceinline__ void multiply(float (&acc)[kTiles][4], const A& a, int row, const B& b, int column) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t block[4];
      load_rows<false>(block, a, row, k);
      multiply_step<T, kDepthFirst>(acc, block, b, column, k);
    }
  } else {
    // 8 terms at a time, so that few roundings are of large sums
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    constexpr int kGroup = kTiles < 8 ? kTiles : 8;
#pragma unroll
    for (int first = 0; first < kTiles; first += kGroup)
      for (int begin = 0; begin < kDepth; begin += 8) {
        float part[kGroup][4] = {};
#pragma unroll 4
        for (int k = begin; k < begin + 8; ++k) {
          const float upper = a.at(row + g, k), lower = a.at(row + g + 8, k);
#pragma unroll
          for (int j = 0; j < kGroup; ++j) {
            const int n = column + 8 * (first + j) + 2 * t;
            const float left = kDepthFirst ? b.at(k, n) : b.at(n, k);
            const float right = kDepthFirst ? b.at(k, n + 1) : b.at(n + 1, k);
            part[j][0] = fmaf(upper, left, part[j][0]);
            part[j][1] = fmaf(upper, right, part[j][1]);
            part[j][2] = fmaf(lower, left, part[j][2]);
            part[j][3] = fmaf(lower, right, part[j][3]);
          }
        }
#pragma unroll
        for (int j = 0; j < kGroup; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[first + j][e] += part[j][e];
      }
  }
}

// acc (16 x 8 kTiles) += columns `row` to row + 15 of a (depth, rows), transposed, times columns `column` on of b
// (depth, columns); depth is a multiple of 32
template <class T, int kTiles, class A, class B>
__device__ __forceinline__ void multiply_transposed(float (&acc)[kTiles][4], const A& a, int row, const B& b,
                                                    int column, int depth) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
#pragma unroll 1
    for (int k = 0; k < depth; k += 32) {
      uint32_t block[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) load_rows<true>(block[half], a, row, k + 16 * half);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        uint32_t r[4];  // 32 x 8 of b
        load_matrices<true>(r, b.chunk(k + lane, column / 8 + j));
        const uint32_t first[2] = {r[0], r[1]}, second[2] = {r[2], r[3]};
        mma<T>(acc[j], block[0], first);
        mma<T>(acc[j], block[1], second);
      }
    }
  } else {
    const int g = lane / 4, t = lane % 4;
    for (int begin = 0; begin < depth; begin += 8) {
      float part[kTiles][4] = {};
#pragma unroll
      for (int k = begin; k < begin + 8; ++k) {
        const float upper = a.at(k, row + g), lower = a.at(k, row + g + 8);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const float left = b.at(k, column + 8 * j + 2 * t), right = b.at(k, column + 8 * j + 2 * t + 1);
          part[j][0] = fmaf(upper, left, part[j][0]);
          part[j][1] = fmaf(upper, right, part[j][1]);
          part[j][2] = fmaf(lower, left, part[j][2]);
          part[j][3] = fmaf(lower, right, part[j][3]);
        }
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[j][e] += part[j][e];
    }
  }
}

// acc += p b, where p (16 x kDepth) is itself the result of a product, and b (depth, columns). The registers of two
// blocks of a result are those of one operand; fp32 goes through `scratch`, a Tile<T, 16, kDepth> of this warp's own.
template <class T, int kDepth, int kTiles, class B>
__device__ __forceinline__ void multiply(float (&acc)[kTiles][4], const float (&p)[kDepth / 8][4], T* scratch,
                                         const B& b, int column) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      const float (&left)[4] = p[k / 8], (&right)[4] = p[k / 8 + 1];
      const uint32_t block[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]), pack<T>(right[0], right[1]),
                                 pack<T>(right[2], right[3])};
      multiply_step<T, true>(acc, block, b, column, k);
    }
  } else {
    const Tile<T, 16, kDepth> tile{scratch};
    const int lane = threadIdx.x % 32;
    __syncwarp();  // the last product has read what is there
#pragma unroll
    for (int j = 0; j < kDepth / 8; ++j)
      for (int e = 0; e < 4; ++e)
        tile.data[(lane / 4 + e / 2 * 8) * tile.kStride + 8 * j + lane % 4 * 2 + e % 2] = p[j][e];
    __syncwarp();
    multiply<T, true, kDepth>(acc, tile, 0, b, column);
  }
}

// Writes a warp's result (16 x 8 kTiles, columns from `column`) times a factor per row
template <class T, int kTiles>
__device__ __forceinline__ void store_rows(const float (&acc)[kTiles][4], const float (&factor)[2], T* to,
                                           int64_t stride, int row, int rows, int column, int dim, bool aligned) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = row + lane / 4 + 8 * h;
    if (i >= rows) continue;
    T* const line = to + i * stride;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int c = column + 8 * j + lane % 4 * 2;
      const float x = acc[j][2 * h] * factor[h], y = acc[j][2 * h + 1] * factor[h];
      if constexpr (sizeof(T) == 2) {
        if (aligned && c + 1 < dim) {
          *reinterpret_cast<uint32_t*>(line + c) = pack<T>(x, y);
          continue;
        }
      }
      if (c < dim) line[c] = from_float<T>(x);
      if (c + 1 < dim) line[c + 1] = from_float<T>(y);
    }
  }
}

// Tiles in a ring of kStages: walk(begin, end, load, work) asks for the tiles from begin on, kInner apart, up to end -
// 1, and calls work(where it begins, stage) on each, when it is there.
template <int kInner, int kStages, class Load, class Work>
__device__ __forceinline__ void walk(int begin, int end, const Load& load, const Work& work) {
  if constexpr (kStages == 2) {
    if (begin < end) load(begin, 0);
    commit_copies();
  }
  int stage = 0;
  for (int at = begin; at < end; at += kInner) {
    if constexpr (kStages == 2) {
      if (at + kInner < end) load(at + kInner, stage ^ 1);
      commit_copies();
      wait_copies<1>();
    } else {
      load(at, 0);
      commit_copies();
      wait_copies<0>();
    }
    __syncthreads();
    work(at, stage);
    __syncthreads();  // all are done with the tile before it is filled anew
    stage = kStages == 2 ? stage ^ 1 : 0;
  }
}

}  // namespace pyfast::cuda
