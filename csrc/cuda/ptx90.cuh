// The PTX instructions of sm_90a, each in one small function, with its meaning for the emulator: mbarriers, tiles
// copied by TMA, both ways, and wgmma. Operands of wgmma lie in rows of 128 bytes with 128-byte swizzle, as TMA leaves
// them: a row of the operand, K-major, or, of b, 64 of its columns of one depth.
#pragma once
#include "cuda/ptx.cuh"
#if defined(PYFAST_EMULATOR)
#include "emulator/hopper.h"
#else
#include <cuda.h>

#include <cstdio>
#endif

namespace pyfast::cuda {

// ---- tensor maps, made on the host

#if defined(PYFAST_EMULATOR)
using TensorMap = simt::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

// A 16-bit tensor of 2 to 4 dimensions in boxes, dimension 0 first, which is contiguous and, in a box, 128 bytes or
// less; strides in bytes. 0, or an error code.
template <int kRank>
int make_tensor_map(TensorMap& map, DType type, const void* base, const int64_t (&sizes)[kRank],
                    const int64_t (&strides)[kRank], const int (&box)[kRank]) {
  static_assert(kRank >= 2 && kRank <= 4);
#if defined(PYFAST_EMULATOR)
  (void)type;
  map = {static_cast<const uint8_t*>(base), kRank, 2, {}, {}, {}, true};
  for (int i = 0; i < kRank; ++i) map.sizes[i] = sizes[i], map.strides[i] = strides[i], map.box[i] = box[i];
  return simt::encode_tensor_map(map);
#else
  void* encode = nullptr;
  cudaDriverEntryPointQueryResult found;
  if (int e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found))
    return e;
  if (!encode) return cudaErrorSymbolNotFound;
  cuuint64_t n[kRank], pitch[kRank];
  cuuint32_t boxes[kRank], steps[kRank];
  for (int i = 0; i < kRank; ++i) n[i] = sizes[i], pitch[i] = strides[i], boxes[i] = box[i], steps[i] = 1;
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
      &map, type == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, kRank,
      const_cast<void*>(base), n, pitch + 1, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
#endif
}

// ---- mbarriers

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
#if defined(PYFAST_EMULATOR)
  simt::mbarrier_init(barrier, arrivals);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}
// After the inits, before TMA or other blocks use the barriers
__device__ __forceinline__ void fence_mbarrier_init() {
#if defined(PYFAST_EMULATOR)
  simt::fence_mbarrier_init();
#else
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
#if defined(PYFAST_EMULATOR)
  simt::mbarrier_arrive(barrier, 0);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}
// Arrives at the barrier that stands there in a block of the cluster. Nothing but the phase is told to it: a release to
// the cluster would wait for all of this thread's memory.
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier, int rank) {
#if defined(PYFAST_EMULATOR)
  simt::mbarrier_arrive_cluster(barrier, rank);
#else
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
#endif
}
// Arrives, and announces bytes that TMA will bring
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
#if defined(PYFAST_EMULATOR)
  simt::mbarrier_arrive(barrier, bytes);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}
// Until the phase of this parity has ended: the first has parity 0. A build with -DPYFAST_WATCHDOG, for debugging, says
// who waits for longer than some seconds, and ends the kernel.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, int parity) {
#if defined(PYFAST_EMULATOR)
  simt::mbarrier_wait(barrier, parity);
#elif defined(PYFAST_WATCHDOG)
  const long long begin = clock64();
  for (uint32_t done = 0; !done;) {
    asm volatile(
        "{\n.reg .pred done;\nmbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    if (done || clock64() - begin < 4'000'000'000) continue;
    printf("block %d, thread %d: no end of the mbarrier's phase at shared address %u, parity %d: %llx\n",
           int(blockIdx.x), int(threadIdx.x), shared_address(barrier), parity,
           *reinterpret_cast<unsigned long long*>(barrier));
    __trap();
  }
#else
  asm volatile(
      "{\n.reg .pred done;\nAGAIN%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra AGAIN%=;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

// ---- TMA: the box at coordinates x, y, ..., dimension 0 first; one thread asks for it. `shared` at a multiple of
// 1024.
template <int kRank>
__device__ __forceinline__ void tma_load(void* shared, const TensorMap* map, uint64_t* barrier,
                                         const int (&at)[kRank]) {
#if defined(PYFAST_EMULATOR)
  int all[4] = {};
  for (int i = 0; i < kRank; ++i) all[i] = at[i];
  simt::tma_load(shared, map, barrier, all);
#else
  const uint32_t to = shared_address(shared), b = shared_address(barrier);
  if constexpr (kRank == 2)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            to),
        "l"(map), "r"(b), "r"(at[0]), "r"(at[1])
        : "memory");
  else if constexpr (kRank == 3)
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
        "[%2];" ::"r"(to),
        "l"(map), "r"(b), "r"(at[0]), "r"(at[1]), "r"(at[2])
        : "memory");
  else
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
        "[%2];" ::"r"(to),
        "l"(map), "r"(b), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
        : "memory");
#endif
}

// The same to the same place in each block of the cluster whose bit is set, whose barriers there each learn of it
__device__ __forceinline__ void tma_load(void* shared, const TensorMap* map, uint64_t* barrier, const int (&at)[2],
                                         uint16_t blocks) {
#if defined(PYFAST_EMULATOR)
  simt::tma_load(shared, map, barrier, {at[0], at[1], 0, 0}, blocks);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "h"(blocks)
      : "memory");
#endif
}

// ---- TMA back to global memory: shared memory, laid out as tma_load leaves it, to the box at x, y; what lies outside
// the tensor is left out. One thread asks for it, after all that wrote there have fenced, and met at a barrier.

// Before TMA or wgmma reads what this thread wrote to shared memory (PTX ISA, "Async proxy")
__device__ __forceinline__ void fence_async() {
#if defined(PYFAST_EMULATOR)
  simt::fence_async();
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
__device__ __forceinline__ void tma_store(const TensorMap* map, const void* shared, const int (&at)[2]) {
#if defined(PYFAST_EMULATOR)
  simt::tma_store(map, shared, {at[0], at[1], 0, 0});
#else
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(shared_address(shared)), "r"(at[0]), "r"(at[1])
               : "memory");
#endif
}
__device__ __forceinline__ void commit_stores() {
#if defined(PYFAST_EMULATOR)
  simt::commit_stores();
#else
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}
// Until the shared memory of this thread's stores has been read, but for the last kLeft groups; before it is written
// again, and before the block ends
template <int kLeft>
__device__ __forceinline__ void wait_stores() {
#if defined(PYFAST_EMULATOR)
  simt::wait_stores(kLeft);
#else
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kLeft) : "memory");
#endif
}

// ---- registers: from here on a warp group's threads have so many each, no more than the block began with in all

template <int kCount>
__device__ __forceinline__ void take_registers() {
#if defined(PYFAST_EMULATOR)
  simt::set_registers(kCount, true);
#else
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}
template <int kCount>
__device__ __forceinline__ void give_registers() {
#if defined(PYFAST_EMULATOR)
  simt::set_registers(kCount, false);
#else
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

// ---- wgmma

// Of a tile in rows of 128 bytes, 8 rows to a group of 1024 bytes; 16 elements further in depth is 32 bytes further.
// Where rows are depths, 2048 bytes further, and `next` bytes away is the tile of the next 64 columns.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* shared, int next = 16) {
#if defined(PYFAST_EMULATOR)
  const uint64_t address = static_cast<const uint8_t*>(shared) - simt::current->block->shared;
#else
  const uint64_t address = shared_address(shared);
#endif
  return (address & 0x3FFFF) >> 4 | uint64_t(next >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
// Before the first product, and after registers of a product were written
__device__ __forceinline__ void wgmma_fence() {
#if defined(PYFAST_EMULATOR)
  simt::fence_registers();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void wgmma_commit() {
#if defined(PYFAST_EMULATOR)
  simt::commit_deferred();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int kLeft>
__device__ __forceinline__ void wgmma_wait() {
#if defined(PYFAST_EMULATOR)
  simt::wait_deferred(kLeft);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
#endif
}

// From here on registers of a product hold what was waited for, or, before a fence, what was written to them: the
// compiler moves no use of them past this.
template <class Number, int kCount>
__device__ __forceinline__ void hold(Number (&registers)[kCount]) {
#if !defined(PYFAST_EMULATOR)
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if constexpr (std::is_same_v<Number, float>)
      asm volatile("" : "+f"(registers[i])::"memory");
    else
      asm volatile("" : "+r"(registers[i])::"memory");
#endif
}

#if defined(PYFAST_EMULATOR)
template <class T>
void operand_row(uint64_t descriptor, int row, bool deep, float (&to)[16]) {
  uint16_t bits[16];
  simt::descriptor_row(descriptor, row, deep, bits);
  for (int k = 0; k < 16; ++k) to[k] = to_float(T{bits[k]});
}
// A thread's part of a product: `left` its two rows of a
template <class T, bool kBDeep, bool kAdd, int kCount>
void emulated_wgmma(float* d, const float (&left)[2][16], uint64_t b) {
  const int lane = simt::current->lane;
  for (int i = 0; i < kCount / 2; ++i) {
    float right[16];
    operand_row<T>(b, i / 2 * 8 + lane % 4 * 2 + i % 2, kBDeep, right);
    for (int h = 0; h < 2; ++h) {
      float sum = 0.f;
      for (int k = 0; k < 16; ++k) sum += left[h][k] * right[k];
      float& to = d[i / 2 * 4 + h * 2 + i % 2];
      to = kAdd ? to + sum : sum;
    }
  }
}
#else
#define PYFAST_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PYFAST_D32(i)                                                                                        \
  PYFAST_D4(i), PYFAST_D4(i + 4), PYFAST_D4(i + 8), PYFAST_D4(i + 12), PYFAST_D4(i + 16), PYFAST_D4(i + 20), \
      PYFAST_D4(i + 24), PYFAST_D4(i + 28)
#define PYFAST_0_TO_31                                                                                             \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
  "%30,%31"
#define PYFAST_32_TO_63                                                                                              \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59," \
  "%60,%61,%62,%63"
#define PYFAST_64_TO_127                                                                                             \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91," \
  "%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115," \
  "%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#endif

// d (64 x 2 kCount) = or, with kAdd, += a (64 x 16) b (2 kCount x 16)^T by a warp group; with kBDeep b's rows in memory
// are depths. A thread of warp w holds rows 16 w + lane / 4 and 8 below, columns 8 j + 2 (lane % 4) and the next:
// d[4 j], d[4 j + 1], and below d[4 j + 2], d[4 j + 3].
template <class T, bool kBDeep = false, bool kAdd = true, int kCount>
__device__ __forceinline__ void wgmma(float (&d)[kCount], uint64_t a, uint64_t b) {
  static_assert(kCount == 32 || kCount == 64 || kCount == 128);
#if defined(PYFAST_EMULATOR)
  float* const to = d;
  simt::defer(a * 31 + b, [=] {
    const int row = simt::current->linear / 32 % 4 * 16 + simt::current->lane / 4;
    float left[2][16];
    for (int h = 0; h < 2; ++h) operand_row<T>(a, row + h * 8, false, left[h]);
    emulated_wgmma<T, kBDeep, kAdd, kCount>(to, left, b);
  });
#else
#define PYFAST_WGMMA32(types)                                                          \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." types " {" PYFAST_0_TO_31 \
               "}, %32, %33, %34, 1, 1, 0, %35;"                                       \
               : PYFAST_D32(0)                                                         \
               : "l"(a), "l"(b), "n"(int(kAdd)), "n"(int(kBDeep)))
#define PYFAST_WGMMA64(types)                                                                               \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." types " {" PYFAST_0_TO_31 "," PYFAST_32_TO_63 \
               "}, %64, %65, %66, 1, 1, 0, %67;"                                                            \
               : PYFAST_D32(0), PYFAST_D32(32)                                                              \
               : "l"(a), "l"(b), "n"(int(kAdd)), "n"(int(kBDeep)))
#define PYFAST_WGMMA128(types)                                                                              \
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." types " {" PYFAST_0_TO_31 "," PYFAST_32_TO_63 \
               "," PYFAST_64_TO_127 "}, %128, %129, %130, 1, 1, 0, %131;"                                   \
               : PYFAST_D32(0), PYFAST_D32(32), PYFAST_D32(64), PYFAST_D32(96)                              \
               : "l"(a), "l"(b), "n"(int(kAdd)), "n"(int(kBDeep)))
  if constexpr (kCount == 32) {
    if constexpr (std::is_same_v<T, bf16>)
      PYFAST_WGMMA32("bf16.bf16");
    else
      PYFAST_WGMMA32("f16.f16");
  } else if constexpr (kCount == 64) {
    if constexpr (std::is_same_v<T, bf16>)
      PYFAST_WGMMA64("bf16.bf16");
    else
      PYFAST_WGMMA64("f16.f16");
  } else {
    if constexpr (std::is_same_v<T, bf16>)
      PYFAST_WGMMA128("bf16.bf16");
    else
      PYFAST_WGMMA128("f16.f16");
  }
#undef PYFAST_WGMMA32
#undef PYFAST_WGMMA64
#undef PYFAST_WGMMA128
#endif
}

// The same with a in registers, laid out as mma.sync has it: a thread's two rows at columns 2 (lane % 4) and the next,
// then 8 further. They are read while the product is in flight.
template <class T, bool kBDeep, int kCount>
__device__ __forceinline__ void wgmma(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b) {
  static_assert(kCount == 64 || kCount == 32);
#if defined(PYFAST_EMULATOR)
  struct Rows {
    float left[2][16];
    uint32_t own[4];
  };
  // PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16": the four lanes of a row hold its 16 elements
  const Rows rows = simt::collective<const uint32_t*, Rows>(
      ~0u, a,
      [](auto in, auto out) {
        for (int lane = 0; lane < 32; ++lane) {
          memcpy(out(lane).own, in(lane), sizeof out(lane).own);
          for (int i = 0; i < 32; ++i) {
            const int h = i / 16, k = i % 16;
            const uint32_t pair = in(lane / 4 * 4 + k % 8 / 2)[k / 8 * 2 + h];
            out(lane).left[h][k] = to_float(T{uint16_t(pair >> k % 2 * 16)});
          }
        }
      },
      "wgmma");
  float* const to = d;
  const uint32_t* const from = a;
  simt::defer(b, [=] {
    if (memcmp(from, rows.own, sizeof rows.own)) simt::fail("wgmma: registers of a were changed while it read them");
    emulated_wgmma<T, kBDeep, true, kCount>(to, rows.left, b);
  });
#else
#define PYFAST_WGMMA64(types)                                                                               \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." types " {" PYFAST_0_TO_31 "," PYFAST_32_TO_63 \
               "}, {%64, %65, %66, %67}, %68, 1, 1, 1, %69;"                                                \
               : PYFAST_D32(0), PYFAST_D32(32)                                                              \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(kBDeep)))
#define PYFAST_WGMMA32(types)                                                          \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." types " {" PYFAST_0_TO_31 \
               "}, {%32, %33, %34, %35}, %36, 1, 1, 1, %37;"                           \
               : PYFAST_D32(0)                                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(kBDeep)))
  if constexpr (kCount == 64) {
    if constexpr (std::is_same_v<T, bf16>)
      PYFAST_WGMMA64("bf16.bf16");
    else
      PYFAST_WGMMA64("f16.f16");
  } else {
    if constexpr (std::is_same_v<T, bf16>)
      PYFAST_WGMMA32("bf16.bf16");
    else
      PYFAST_WGMMA32("f16.f16");
  }
#undef PYFAST_WGMMA64
#undef PYFAST_WGMMA32
#endif
}
#undef PYFAST_D4
#undef PYFAST_D32
#undef PYFAST_0_TO_31
#undef PYFAST_32_TO_63
#undef PYFAST_64_TO_127

}  // namespace pyfast::cuda
