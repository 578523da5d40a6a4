// The same products on sm_90a, 16-bit, where both operands can be copied by TMA.
//
// Tiling: a block makes 256 x 128 elements: two warp groups 128 x 128 each by wgmma (m64n128k16, two rows of them),
// and a third that copies, and gives them its registers. Steps of 64 in depth go through a ring of four stages, each
// with an mbarrier that its bytes end and one that the consumers' eight warps end; one wgmma group stays in flight.
// Shared memory: 4 x 48 KB, so one block to a processor.
// Bound: tensor cores. A wgmma m64n128k16 takes 64 cycles, and reads 6 KB of shared memory, 96 of 128 bytes a cycle.
#pragma once
#include "cuda/gemm.cuh"
#include "cuda/ring90.cuh"

namespace pyfast::cuda {

// Boxes of a product's operands: of a 256 rows, of b 128, or, where b's rows are depths, 64 columns of 64 depths
struct Boxes {
  TensorMap a[2], b[2];
};

template <class T, bool kBDeep>
struct Gemm90 {
  static constexpr int kBlock = 256, kColumnsOfBlock = 128, kDepth = 64, kStages = 4;
  static constexpr int kConsumers = 256, kThreads = kConsumers + 128;
  static constexpr int kPart = kColumnsOfBlock, kRows = 2, kColumns = 16;
  static constexpr int kABytes = kBlock * 128, kBBytes = kColumnsOfBlock * 128, kStageBytes = kABytes + kBBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes + Ring<kStages>::kBytes;
  using Sums = float[kRows][kColumns][4];

  int64_t m, n, row, column;
  int first_steps, begin, steps;  // of the first term; this block's first step, and how many it has
  int split, lane, warp_row, warp_column = 0;

  static int64_t blocks(const Product& p) {
    return (p.m + kBlock - 1) / kBlock * ((p.n + kColumnsOfBlock - 1) / kColumnsOfBlock) * p.splits;
  }
  __device__ explicit Gemm90(const Product& p) : m(p.here(p.m)), n(p.n) {
    const int64_t tiles_m = (p.m + kBlock - 1) / kBlock, tiles_n = (n + kColumnsOfBlock - 1) / kColumnsOfBlock;
    const int64_t tile = blockIdx.x % (tiles_m * tiles_n);
    row = (tiles_m < tiles_n ? tile % tiles_m : tile / tiles_n) * kBlock;
    column = (tiles_m < tiles_n ? tile / tiles_m : tile % tiles_n) * kColumnsOfBlock;
    split = int(blockIdx.x / (tiles_m * tiles_n)), first_steps = steps_of(p.terms[0].depth);
    const int all = first_steps + steps_of(p.terms[1].depth), each = (all + p.splits - 1) / p.splits;
    begin = split * each, steps = begin >= all ? 0 : begin + each < all ? each : all - begin;
    lane = threadIdx.x % 32;
    warp_row = threadIdx.x / 128 * 128 + threadIdx.x / 32 % 4 * 16;
  }
  __device__ bool empty() const { return row >= m; }

  __device__ __forceinline__ int64_t row_of(int i, int e) const {
    return row + warp_row + 64 * i + lane / 4 + e / 2 * 8;
  }
  __device__ __forceinline__ int64_t column_of(int j, int e) const { return column + 8 * j + lane % 4 * 2 + e % 2; }

  // The whole block starts; then the third warp group produces, and ends, and the others multiply
  __device__ __forceinline__ void start(unsigned char* shared) const {
    if (threadIdx.x == 0) {
      ring(shared).begin(kConsumers / 32);
      fence_mbarrier_init();
    }
    __syncthreads();
  }
  __device__ static bool produces() { return threadIdx.x >= kConsumers; }

  __device__ __forceinline__ void produce(const Product& p, const Boxes& boxes, unsigned char* shared) const {
    give_registers<40>();
    if (threadIdx.x != kConsumers) return;
    for (int step = 0; step < steps; ++step) {
      const bool second = begin + step >= first_steps;
      const int at = (begin + step - (second ? first_steps : 0)) * kDepth;
      unsigned char *const a = shared + step % kStages * kStageBytes, *const b = a + kABytes;
      uint64_t* const there = ring(shared).fill(step, kStageBytes);
      tma_load<2>(a, &boxes.a[second], there, {at, int(row)});
      if constexpr (kBDeep) {
        tma_load<2>(b, &boxes.b[second], there, {int(column), at});
        tma_load<2>(b + kBBytes / 2, &boxes.b[second], there, {int(column) + 64, at});
      } else {
        tma_load<2>(b, &boxes.b[second], there, {at, int(column)});
      }
    }
  }

  __device__ __forceinline__ void multiply(unsigned char* shared, Sums& sums) const {
    take_registers<232>();
    for (int step = 0; step < steps; ++step) {
      const int stage = step % kStages;
      const unsigned char* const a = shared + stage * kStageBytes + warp_row / 128 * 128 * 128;
      const unsigned char* const b = shared + stage * kStageBytes + kABytes;
      ring(shared).wait(step);
      if (step == 0) hold(reinterpret_cast<float (&)[kRows * 64]>(sums));
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k)
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          float (&d)[64] = reinterpret_cast<float (&)[64]>(sums[i]);
          const uint64_t left = wgmma_descriptor(a + i * 64 * 128 + k * 32);
          if constexpr (kBDeep)
            wgmma<T, true>(d, left, wgmma_descriptor(b + k * 16 * 128, kBBytes / 2));
          else
            wgmma<T>(d, left, wgmma_descriptor(b + k * 32));
        }
      wgmma_commit();
      wgmma_wait<1>();
      if (step > 0) ring(shared).release(step - 1);  // it has been multiplied
    }
    wgmma_wait<0>();
    hold(reinterpret_cast<float (&)[kRows * 64]>(sums));
  }

 private:
  __device__ static int steps_of(int64_t depth) { return int((depth + kDepth - 1) / kDepth); }
  __device__ static Ring<kStages> ring(unsigned char* shared) {
    return {reinterpret_cast<uint64_t*>(shared + kStages * kStageBytes)};
  }
};

// Maps of an operand's memory, (rows, columns); 0, or an error code
template <class T>
int make_boxes(TensorMap& map, const Operand& from, int64_t rows, int64_t columns, int box_rows) {
  const DType type = std::is_same_v<T, bf16> ? DType::bf16 : DType::fp16;
  return make_tensor_map<2>(map, type, from.data, {columns, rows}, {2, from.row_stride * 2}, {64, box_rows});
}
template <class T, bool kBDeep>
int make_boxes(Boxes& boxes, const Product& p) {
  using G = Gemm90<T, kBDeep>;
  for (int i = 0; i < 2; ++i) {
    const Term& t = p.terms[i];
    if (t.depth == 0) continue;
    if (int e = make_boxes<T>(boxes.a[i], t.a, p.m, t.depth, G::kBlock)) return e;
    if (int e = kBDeep ? make_boxes<T>(boxes.b[i], t.b, t.depth, p.n, G::kDepth)
                       : make_boxes<T>(boxes.b[i], t.b, p.n, t.depth, G::kColumnsOfBlock))
      return e;
  }
  return 0;
}
// Whether TMA can copy an operand whose rows have so many elements: they may not overlap
inline bool box_serves(const Operand& x, int64_t columns) { return x.vectors && !x.index && x.row_stride >= columns; }
// Whether it can copy what a product reads, b's rows being depths
inline bool boxes_serve(const Product& p) {
  for (const Term& t : p.terms)
    if (t.depth && !(box_serves(t.a, t.depth) && box_serves(t.b, p.n))) return false;
  return p.terms[0].depth > 0;
}

struct Gemm90Launch {
  Boxes boxes;
  Product p;
  Output out;
};
template <class T, bool kBDeep>
__global__ void __launch_bounds__(Gemm90<T, kBDeep>::kThreads, 1)
    gemm90_kernel(const __grid_constant__ Gemm90Launch l) {
#if defined(PYFAST_EMULATOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  PYFAST_SHARED(shared);
  using G = Gemm90<T, kBDeep>;
  const G gemm(l.p);
  if (gemm.empty()) return;
  gemm.start(shared);
  if (G::produces()) return gemm.produce(l.p, l.boxes, shared);
  typename G::Sums sums = {};
  gemm.multiply(shared, sums);
  store_sums<T>(gemm, sums, l.out);
#endif
}
template <class T, bool kBDeep>
int launch_gemm90(const Product& p, const Output& out, void* stream) {
  using G = Gemm90<T, kBDeep>;
  Gemm90Launch l{{}, p, out};
  if (int e = make_boxes<T, kBDeep>(l.boxes, p)) return e;
  const Shape shape{G::blocks(p), G::kThreads, G::kSharedBytes};
  return shape.blocks == 0 ? 0 : launch(gemm90_kernel<T, kBDeep>, shape, l, stream);
}

}  // namespace pyfast::cuda
