// LoRA's large products on sm_90a, 16-bit: what is of low rank is more depth of the frozen product, so that a result is
// written once and not read,
//   y_p = x W_p^T + t_p B_p^T + bias_p,   t = s h rounded, for all projections p of one x in one launch, and
//   dx  = sum_p dy_p W_p + dh A,          dh rounded, A being the adapters under each other, in one product.
// h, dh, dA and dB are lora.cuh's: one pass over x, one over dy, and one over x.
//
// Tiling, as CUTLASS's persistent warp-specialised kernels have it: a block stays on its processor and makes tile after
// tile of 128 x 256 elements, two warp groups 64 x 256 each by wgmma (m64n256k16); of a third one thread copies, and it
// gives them its registers. Steps of 64 in depth go through a ring of four stages, each with an mbarrier that its bytes
// end and one that the consumers' warps end; the ring runs on from tile to tile, so that the next one's operands come
// while a result is written. Two blocks make a cluster of 256 x 256: each copies half of their common b to both by
// multicast, so that a stage is free when the warps of both have read it. A term's last step multiplies only as many
// times 16 depths as it has: rank 16 is a quarter of a step. b's rows in memory are the result's columns (W forward),
// or depths (W backward, and A and B as they are packed); a term says which. Tiles are walked in groups of 8 x 256
// rows, rows first: the 66 clusters of an H100 work on some 2048 x 2112 elements at a time. A result leaves through
// shared memory, 64 rows x 128 columns of a warp group at a time, by TMA, which leaves out what is outside, and while
// the next tile is multiplied.
//
// Shared memory: ring 4 x 48 KB, results 2 x 16 KB, barriers: 224 KB, one block to a processor.
//
// Bound: tensor cores, and memory for the passes beside them: M = 8192 rows, rank 16, an H100 at 800 TFLOP/s and 3.0
// TB/s, parts of sums (lora.cuh) an eighth of a pass.
//   4096 -> 4096:  a frozen GEMM is 275 GFLOP, 344 us, forward, and again backward; x, y, dy or dx 67 MB, 22 us.
//     forward: reads x for h (25 us), multiplies 1.004 times the depth (345 us): 1.08 times the GEMM; backward: reads
//     dy for dh and dB (28), x for dA (25), multiplies 1.004 times the depth (345): 1.16.
//   4096 -> 14336: 962 GFLOP, 1203 us; y or dy 235 MB, 78 us. Forward 25 + 1207: 1.02; backward 91 + 25 + 1204: 1.10.
// Both directions 1.12 and 1.06, where torch's GEMM beside `up`, which writes y and dx before the GEMM adds to them,
// has 1.18 and 1.10; q, k and v as one node 1.03 forward, 1.12 backward. 1.05 would ask for h and dh inside the
// products; formed anew in each tile they are 16 more columns to 256, 6 %, as much as the passes.
// That holds if these products reach cuBLAS's speed, and they have less than 6 % to lose. What they must live with: a
// wgmma m64n256k16 takes 128 cycles and reads 10 KB of shared memory, and copies write 48 bytes a cycle, together all
// of its 128; a cluster's step reads 64 KB of L2 for 8.4 MFLOP, 6.3 TB/s at 800 TFLOP/s; storing a tile costs its warp
// groups some 1,500 cycles, 2 % of 65,536 for a depth of 4096; 7.8 rounds of clusters for 4096 columns leave 3 % idle.
// All of this is arithmetic: without a GPU nothing was timed.
#pragma once
#include "cuda/lora.h"
#include "cuda/ring90.cuh"

namespace pyfast::cuda {

struct Lora90Term {
  int depth;
  bool deep;
};
struct Lora90Result {
  const void* bias;
  int64_t columns, bias_stride;
  bool bias_wide;   // fp32
  int first, last;  // of its terms
};
struct Lora90Launch {
  TensorMap a[kLoraTerms], b[kLoraTerms], to[kLoraResults];
  Lora90Term terms[kLoraTerms];
  Lora90Result results[kLoraResults];
  int result_count;
  int row_tiles, column_tiles;  // of a cluster; the latter of all results
};

template <class T>
struct Lora90 {
  static constexpr int kRows = 128, kColumns = 256, kDepth = 64, kStages = 4, kBlocks = 2, kGroup = 8;
  static constexpr int kConsumers = 256, kThreads = kConsumers + 128, kSums = 128;
  static constexpr int kABytes = kRows * 128, kBBytes = kColumns * 128, kStageBytes = kABytes + kBBytes;
  static constexpr int kBoxBytes = 64 * 128, kOutBytes = 2 * kBoxBytes;  // a warp group's
  static constexpr int kOut = kStages * kStageBytes, kBarriers = kOut + 2 * kOutBytes;
  static constexpr int kSharedBytes = kBarriers + Ring<kStages, kBlocks>::kBytes;

  const Lora90Launch& l;
  unsigned char* const shared;
  const int rank = blockIdx.x % kBlocks;

  static int tiles(int64_t columns) { return int((columns + kColumns - 1) / kColumns); }

  __device__ __forceinline__ Ring<kStages, kBlocks> ring() const {
    return {reinterpret_cast<uint64_t*>(shared + kBarriers)};
  }

  // Calls work(result, row, column of the block's part of it) on each of the cluster's tiles
  template <class Work>
  __device__ __forceinline__ void walk(const Work& work) const {
    const int64_t tiles = int64_t(l.row_tiles) * l.column_tiles, of_group = int64_t(kGroup) * l.column_tiles;
    for (int64_t tile = blockIdx.x / kBlocks; tile < tiles; tile += gridDim.x / kBlocks) {
      const int first = int(tile / of_group) * kGroup, in_group = int(tile % of_group);
      const int rows = l.row_tiles - first < kGroup ? l.row_tiles - first : kGroup;
      int result = 0, column = in_group / rows * kColumns;
      for (; column >= this->columns(result); ++result) column -= this->columns(result);
      work(result, ((first + in_group % rows) * kBlocks + rank) * kRows, column);
    }
  }
  // of a result, in whole tiles
  __device__ int columns(int result) const {
    return int((l.results[result].columns + kColumns - 1) / kColumns) * kColumns;
  }

  // A barrier of the cluster follows
  __device__ __forceinline__ void begin() const {
    if (threadIdx.x == 0) {
      ring().begin(kConsumers / 32);
      fence_mbarrier_init();
    }
  }

  __device__ __forceinline__ void produce() const {
    give_registers<40>();
    if (threadIdx.x != kConsumers) return;
    int step = 0;
    walk([&](int result, int row, int column) {
      for (int i = l.results[result].first; i < l.results[result].last; ++i) {
        const Lora90Term& term = l.terms[i];
        for (int at = 0; at < term.depth; at += kDepth, ++step) {
          unsigned char *const a = shared + step % kStages * kStageBytes, *const b = a + kABytes;
          uint64_t* const there = ring().fill(step, kStageBytes);
          tma_load<2>(a, &l.a[i], there, {at, row});
          if (term.deep) {
#pragma unroll
            for (int box = 2 * rank; box < 2 * rank + 2; ++box)
              tma_load(b + box * kBoxBytes, &l.b[i], there, {column + box * 64, at}, (1 << kBlocks) - 1);
          } else {
            tma_load(b + rank * (kBBytes / 2), &l.b[i], there, {at, column + rank * (kColumns / 2)},
                     (1 << kBlocks) - 1);
          }
        }
      }
    });
  }

  __device__ __forceinline__ void consume() const {
    take_registers<232>();
    int step = 0;
    walk([&](int result, int row, int column) {
      float sums[kSums] = {};
      for (int i = l.results[result].first; i < l.results[result].last; ++i) {
        if (l.terms[i].deep)
          multiply<true>(l.terms[i].depth, step, sums);
        else
          multiply<false>(l.terms[i].depth, step, sums);
      }
      store(result, row + group() * 64, column, sums);
    });
    if (leads()) wait_stores<0>();
  }

 private:
  __device__ static int group() { return threadIdx.x / 128; }
  __device__ static bool leads() { return threadIdx.x % 128 == 0; }

  template <bool kDeep>
  __device__ __forceinline__ void multiply_step(int stage, int k, float (&sums)[kSums]) const {
    const unsigned char* const a = shared + stage * kStageBytes + group() * 64 * 128;
    const unsigned char* const b = shared + stage * kStageBytes + kABytes;
    const uint64_t left = wgmma_descriptor(a + k * 32);
    if constexpr (kDeep)
      wgmma<T, true>(sums, left, wgmma_descriptor(b + k * 16 * 128, kBoxBytes));
    else
      wgmma<T>(sums, left, wgmma_descriptor(b + k * 32));
  }

  template <bool kDeep>
  __device__ __forceinline__ void multiply(int depth, int& step, float (&sums)[kSums]) const {
    const int end = step + depth / kDepth;
    int read = step;  // the first step that is not yet released
    const auto wait = [&] {
      ring().wait(step);
      wgmma_fence();
    };
    while (step < end) {
      wait();
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) multiply_step<kDeep>(step % kStages, k, sums);
      wgmma_commit();
      wgmma_wait<1>();
      if (read < step) ring().release(read++);  // it has been multiplied
      ++step;
    }
    if (depth % kDepth) {
      wait();
#pragma unroll 1
      for (int k = 0; k < (depth % kDepth + 15) / 16; ++k) {
        wgmma_fence();  // ptxas adds one otherwise: the registers come round a loop
        multiply_step<kDeep>(step % kStages, k, sums);
        wgmma_commit();
      }
      ++step;
    }
    wgmma_wait<0>();
    hold(sums);
#pragma unroll 1
    while (read < step) ring().release(read++);
  }

  __device__ __forceinline__ void store(int number, int row, int column, float (&sums)[kSums]) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const Lora90Result& result = l.results[number];
    unsigned char* const out = shared + kOut + group() * kOutBytes;
    if (result.bias) {
#pragma unroll
      for (int j = 0; j < kSums / 4; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int64_t c = column + j * 8 + lane % 4 * 2 + e, i = c * result.bias_stride;
          if (c >= result.columns) continue;
          const float x = result.bias_wide ? static_cast<const float*>(result.bias)[i]
                                           : to_float(static_cast<const T*>(result.bias)[i]);
          sums[4 * j + e] += x, sums[4 * j + e + 2] += x;
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (leads()) wait_stores<0>();
      named_barrier(1 + group(), 128);  // what was there before has been read
#pragma unroll
      for (int j = 0; j < 16; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int i = (half * 16 + j) * 4 + 2 * h, r = warp * 16 + lane / 4 + h * 8;
          *reinterpret_cast<uint32_t*>(out + j / 8 * kBoxBytes + r * 128 + (j % 8 ^ r % 8) * 16 + lane % 4 * 4) =
              pack<T>(sums[i], sums[i + 1]);
        }
      }
      fence_async();
      named_barrier(1 + group(), 128);
      if (leads()) {
        for (int box = 0; box < 2; ++box)
          tma_store(&l.to[number], out + box * kBoxBytes, {column + half * 128 + box * 64, row});
        commit_stores();
      }
    }
  }
};

template <class T>
__global__ void __launch_bounds__(Lora90<T>::kThreads, 1) lora90_kernel(const __grid_constant__ Lora90Launch l) {
#if defined(PYFAST_EMULATOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  PYFAST_SHARED(shared);
  const Lora90<T> block{l, shared};
  block.begin();
  cluster_barrier();
  if (threadIdx.x >= Lora90<T>::kConsumers)
    block.produce();
  else
    block.consume();
  __syncwarp();
  cluster_barrier();  // no block leaves while the other may still write to it
#endif
}

// 0, or an error code
template <class T>
int launch_lora90(const LoraProduct& product, int processors, void* stream) {
  using L = Lora90<T>;
  const auto map = [](TensorMap& to, const void* data, int64_t columns, int64_t rows, int64_t ld, int box_rows) {
    constexpr DType type = std::is_same_v<T, bf16> ? DType::bf16 : DType::fp16;
    return make_tensor_map<2>(to, type, data, {columns, rows}, {2, ld * 2}, {64, box_rows});
  };
  for (int r = 0; r < product.result_count;) {
    Lora90Launch l{};
    l.row_tiles = int((product.rows + L::kBlocks * L::kRows - 1) / (L::kBlocks * L::kRows));
    int terms = 0;
    for (; r < product.result_count && l.result_count < kLoraResults; ++r, ++l.result_count) {
      const LoraResult& from = product.results[r];
      if (terms + from.term_count > kLoraTerms) break;
      Lora90Result& to = l.results[l.result_count];
      to.bias = from.bias, to.bias_stride = from.bias_stride, to.bias_wide = from.bias_dtype == DType::fp32;
      to.columns = from.columns, to.first = terms, to.last = terms + from.term_count;
      if (int e = map(l.to[l.result_count], from.data, from.columns, product.rows, from.columns, 64)) return e;
      for (int i = 0; i < from.term_count; ++i, ++terms) {
        const LoraTerm& t = from.terms[i];
        l.terms[terms].depth = int(t.depth), l.terms[terms].deep = t.deep;
        if (int e = map(l.a[terms], t.a, t.depth, product.rows, t.a_ld, L::kRows)) return e;
        if (int e = t.deep ? map(l.b[terms], t.b, from.columns, t.depth, t.b_ld, L::kDepth)
                           : map(l.b[terms], t.b, t.depth, from.columns, t.b_ld, L::kColumns / 2))
          return e;
      }
      l.column_tiles += L::tiles(from.columns);
    }
    const int64_t tiles = int64_t(l.row_tiles) * l.column_tiles, clusters = processors / L::kBlocks;
    const Shape shape{(tiles < clusters ? tiles : clusters) * L::kBlocks, L::kThreads, L::kSharedBytes, L::kBlocks};
    if (int e = launch(lora90_kernel<T>, shape, l, stream)) return e;
  }
  return 0;
}

// one per element type, each in a file of its own
int lora90_bf16(const LoraProduct& product, int processors, void* stream);
int lora90_fp16(const LoraProduct& product, int processors, void* stream);

}  // namespace pyfast::cuda
