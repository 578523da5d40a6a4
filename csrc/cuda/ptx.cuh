// Every PTX instruction that the kernels use, each in one small function; under the emulator its documented meaning
// (PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions", "Data Movement and Conversion Instructions").
#pragma once
#include <cstring>

#include "cuda/runtime.cuh"

namespace pyfast::cuda {

#if !defined(PYFAST_EMULATOR)
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

// ---- conversions, to nearest even

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
__device__ __forceinline__ float to_float(fp16 x) {
#if defined(PYFAST_EMULATOR)
  _Float16 h;
  memcpy(&h, &x.bits, 2);
  return float(h);
#else
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
  return f;
#endif
}

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
#if defined(PYFAST_EMULATOR)
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return {0x7FFF};
  return {uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
#else
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#endif
}
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float x) {
  fp16 y;
#if defined(PYFAST_EMULATOR)
  const _Float16 h = _Float16(x);
  memcpy(&y.bits, &h, 2);
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#endif
  return y;
}

// Two elements in one register, `low` first in memory
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
#if defined(PYFAST_EMULATOR)
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
#else
  uint32_t y;
  if constexpr (std::is_same_v<T, bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
#endif
}

// 2^x, within 2 ulp; 0 for -inf, NaN for NaN
__device__ __forceinline__ float exp2_approx(float x) {
#if defined(PYFAST_EMULATOR)
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// ---- 16 bytes at once

struct __attribute__((aligned(16))) Vector {
  uint32_t words[4];
};
// ... through the read-only path: nothing may write there while the kernel runs
__device__ __forceinline__ Vector load_global(const void* p) {
#if defined(PYFAST_EMULATOR)
  if (reinterpret_cast<uintptr_t>(p) % 16) simt::fail("a 16-byte load from an address that is not aligned to 16");
  Vector v;
  memcpy(&v, p, 16);
#else
  Vector v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
               : "l"(p));
#endif
  return v;
}
__device__ __forceinline__ void store_global(void* p, const Vector& v) {
#if defined(PYFAST_EMULATOR)
  if (reinterpret_cast<uintptr_t>(p) % 16) simt::fail("a 16-byte store to an address that is not aligned to 16");
  memcpy(p, &v, 16);
#else
  asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.words[0]), "r"(v.words[1]),
               "r"(v.words[2]), "r"(v.words[3])
               : "memory");
#endif
}

// ---- asynchronous copies from global to shared memory

// 16 bytes, of which only the first `bytes` are read; the others become zero
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes = 16) {
#if defined(PYFAST_EMULATOR)
  simt::async_copy(shared, global, bytes, 16);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
#endif
}
__device__ __forceinline__ void commit_copies() {
#if defined(PYFAST_EMULATOR)
  simt::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most kLeft groups of this thread's are in flight
template <int kLeft>
__device__ __forceinline__ void wait_copies() {
#if defined(PYFAST_EMULATOR)
  simt::wait_copies(kLeft);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

// ---- barriers

// A barrier of `threads` threads of the block, a number of whole warps
__device__ __forceinline__ void named_barrier(int id, int threads) {
#if defined(PYFAST_EMULATOR)
  simt::barrier(id, threads);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// Counts this warp among a barrier's threads without waiting there
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
#if defined(PYFAST_EMULATOR)
  simt::barrier_arrive(id, threads);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// ---- clusters (sm_90)

#if defined(PYFAST_EMULATOR) || __CUDA_ARCH__ >= 900
#define PYFAST_CLUSTERS 1
__device__ __forceinline__ void cluster_barrier() {
#if defined(PYFAST_EMULATOR)
  simt::cluster_barrier();
#else
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// 16 bytes of another block's shared memory, where `shared` lies in this one's
__device__ __forceinline__ Vector load_cluster(const void* shared, int rank) {
  Vector v;
#if defined(PYFAST_EMULATOR)
  simt::check_shared(shared, 16, 16, "ld.shared::cluster");
  memcpy(&v, simt::map_shared(const_cast<void*>(shared), rank), 16);
#else
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %4, %5;\n"
      "ld.shared::cluster.v4.b32 {%0, %1, %2, %3}, [remote];\n}"
      : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
      : "r"(shared_address(shared)), "r"(rank)
      : "memory");
#endif
  return v;
}
#endif

// ---- tensor cores (sm_80)

// Four 8 x 8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8, 16 bytes. Of each
// matrix a lane receives row l / 4, columns 2 (l % 4) and the next; transposed, of its transpose.
template <bool kTranspose>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
#if defined(PYFAST_EMULATOR)
  simt::check_shared(row, 16, 16, "ldmatrix");
  struct Registers {
    uint32_t r[4];
  };
  const auto result = simt::collective<const void*, Registers>(
      ~0u, row,
      [](auto in, auto out) {
        for (int lane = 0; lane < 32; ++lane)
          for (int m = 0; m < 4; ++m) {
            uint16_t half[2];
            for (int h = 0; h < 2; ++h) {
              const int major = lane / 4, minor = lane % 4 * 2 + h;
              const int i = kTranspose ? minor : major, j = kTranspose ? major : minor;
              half[h] = static_cast<const uint16_t*>(in(m * 8 + i))[j];
            }
            out(lane).r[m] = half[0] | uint32_t(half[1]) << 16;
          }
      },
      "ldmatrix");
  memcpy(r, result.r, sizeof r);
#else
  if constexpr (kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

// d (16 x 8) += a (16 x 16) b (16 x 8). With g = lane / 4 and t = lane % 4 a lane holds
//   a: rows g, g + 8, g, g + 8 at columns 2t, 2t, 2t + 8, 2t + 8, two elements each;
//   b: column g at rows 2t and 2t + 8, two elements each;   d: rows g, g, g + 8, g + 8 at columns 2t, 2t + 1, ...
#if defined(PYFAST_EMULATOR)
void emulated_mma(const float (*a)[16], const float (*b)[16], float (*d)[8]);
#endif
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(PYFAST_EMULATOR)
  struct In {
    const uint32_t *a, *b;
    const float* d;
  };
  struct Out {
    float d[4];
  };
  const Out result = simt::collective<In, Out>(
      ~0u, In{a, b, d},
      [](auto in, auto out) {
        float A[16][16], B[8][16], D[16][8];
        const auto put = [](float* to, uint32_t packed) {
          to[0] = to_float(T{uint16_t(packed)});
          to[1] = to_float(T{uint16_t(packed >> 16)});
        };
        for (int lane = 0; lane < 32; ++lane) {
          const In& x = in(lane);
          const int g = lane / 4, t = lane % 4;
          for (int i = 0; i < 4; ++i) put(&A[g + i % 2 * 8][2 * t + i / 2 * 8], x.a[i]);
          for (int i = 0; i < 2; ++i) put(&B[g][2 * t + i * 8], x.b[i]);
          for (int i = 0; i < 4; ++i) D[g + i / 2 * 8][2 * t + i % 2] = x.d[i];
        }
        emulated_mma(A, B, D);
        for (int lane = 0; lane < 32; ++lane)
          for (int i = 0; i < 4; ++i) out(lane).d[i] = D[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
      },
      "mma.sync");
  memcpy(d, result.d, sizeof d);
#else
  if constexpr (std::is_same_v<T, bf16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace pyfast::cuda
