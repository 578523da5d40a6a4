// Small kernels that use one mechanism of CUDA each, correctly (bug 0) or with a planted error: tests/instructions.py
// has their inputs and results.
#include <cstring>
#include <string>

#include "cuda/ptx90.cuh"

using namespace pyfast;
using namespace pyfast::cuda;

namespace {

struct Call {
  const float* in;
  float* out;
  int n, bug;
};

// out = in reversed, through shared memory
__global__ void reverse(const Call c) {
  PYFAST_SHARED(shared);
  float* s = reinterpret_cast<float*>(shared);
  const int i = threadIdx.x;
  if (c.bug != 2 || i != 5) s[i] = c.in[i];  // bug 2: an element that nobody writes
  if (c.bug == 1) {                          // no barrier
  } else if (c.bug == 3 && i < 32) {
    named_barrier(1, blockDim.x);  // warp 0 waits at another barrier
  } else if (c.bug == 4) {
    named_barrier(1, i < 32 ? 64 : 96);  // not the same number of threads
  } else if (c.bug == 5) {
    named_barrier(16, blockDim.x);
  } else if (c.bug == 6) {
    named_barrier(1, 40);
  } else {
    __syncthreads();
  }
  c.out[i] = s[blockDim.x - 1 - i];
}

// each pair of warps reverses its own 64 elements, at its own barrier; the last warp has left
__global__ void reverse_pairs(const Call c) {
  PYFAST_SHARED(shared);
  float* s = reinterpret_cast<float*>(shared);
  const int i = threadIdx.x, pair = i / 64;
  if (i >= c.n) return;
  s[i] = c.in[i];
  named_barrier(c.bug == 1 ? 1 + i / 32 : 1 + pair, 64);  // bug 1: each warp alone at its barrier
  c.out[i] = s[pair * 64 + 63 - i % 64];
}

// out[i] = the sum of a warp's elements
__global__ void warp_sum(const Call c) {
  const int i = threadIdx.x, lane = i % 32;
  float x = c.in[i];
  if (c.bug == 1 && lane == 3) return;  // a lane of the mask has left
  const uint32_t mask = c.bug == 2 ? 0xFFFFFFFEu : ~0u;
  if (c.bug == 3) {  // half a warp, which reads the other half
    if (lane < 16) x += __shfl_xor_sync(0xFFFFu, x, 16);
  }
  if (c.bug == 4 && lane == 7) __ballot_sync(~0u, 1);  // one lane in another collective
  for (int by = c.bug == 5 ? 8 : 16; by; by /= 2) x += __shfl_xor_sync(mask, x, by);
  c.out[i] = x;
}

// out = in, a warp's elements at a time: the first warp puts them down and goes on, the second picks them up
__global__ void turns(const Call c) {
  PYFAST_SHARED(shared);
  float* s = reinterpret_cast<float*>(shared);
  const int lane = threadIdx.x % 32;
  for (int i = lane; i < c.n; i += 32)
    if (threadIdx.x < 32) {
      if (i >= 32 && c.bug != 1) named_barrier(2, 64);
      s[lane] = c.in[i];
      if (c.bug != 3) named_barrier_arrive(1, c.bug == 4 ? 96 : 64);
    } else {
      if (c.bug != 2) named_barrier(1, 64);
      c.out[i - lane + 31 - lane] = s[31 - lane];  // what another lane put down
      if (i + 32 < c.n) named_barrier_arrive(2, 64);
    }
}

// the inclusive sums of a warp's elements, by shuffles up; segments of 8, by width
__global__ void warp_scan(const Call c) {
  const int lane = threadIdx.x % 32;
  float x = c.in[threadIdx.x];
  for (int by = 1; by < 8; by *= 2) {
    const float below = __shfl_up_sync(~0u, x, by, 8);
    if (lane % 8 >= by) x += below;
  }
  const uint32_t odd = __ballot_sync(~0u, lane % 2);
  c.out[threadIdx.x] = odd == 0xAAAAAAAAu ? x + __shfl_down_sync(~0u, 0.f, 1) + 0.f * __shfl_sync(~0u, x, 9) : NAN;
}

// out[0] = the sum of all, out[1] = how many, as an int, out[2] = the largest as an int
__global__ void atomic_sum(const Call c) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(c.out, c.in[i]);
  atomicAdd(reinterpret_cast<int*>(c.out) + 1, 1);
  atomicMax(reinterpret_cast<int*>(c.out) + 2, i);
}

// out = in, copied in tiles of a block's size through a ring of three buffers
__global__ void pipeline(const Call c) {
  PYFAST_SHARED(shared);
  const int tile = blockDim.x * 4, tiles = (c.n + tile - 1) / tile, i = threadIdx.x;
  const auto load = [&](int t) {
    if (t < tiles) {
      const int at = t * tile + 4 * i, left = c.n - at;
      const int bytes = left >= 4 ? 16 : left > 0 ? 4 * left : 0;
      unsigned char* to = shared + (t % 3 * tile + 4 * i) * 4;
      if (c.bug == 4 && i == 9) to += 4;
      if (c.bug == 5 && i == 9) to += 4 * tile * 12;
      const float* from = bytes ? c.in + at : c.in;
      copy_async(to, c.bug == 6 && i == 9 ? from + 1 : from, bytes);
    }
    commit_copies();
  };
  load(0);
  load(1);
  for (int t = 0; t < tiles; ++t) {
    if (c.bug == 1)
      wait_copies<2>();
    else
      wait_copies<1>();
    if (c.bug != 2) __syncthreads();
    load(t + (c.bug == 3 ? 3 : 2));
    const float* s = reinterpret_cast<const float*>(shared) + t % 3 * tile;
    for (int k = 0; k < 4; ++k) {  // elements that other threads copied
      const int at = k * blockDim.x + (i + 37) % blockDim.x;
      if (t * tile + at < c.n)
        c.out[t * tile + at] = s[at];
      else if (s[at] != 0.f)
        c.out[0] = NAN;
    }
  }
}

// out (16 x 8) = in (16 x 16) times (16 x 8), given as its transpose (8 x 16) after it, both row-major
template <class T>
__global__ void matmul(const Call c) {
  PYFAST_SHARED(shared);
  T* s = reinterpret_cast<T*>(shared);
  const int lane = threadIdx.x;
  for (int i = lane; i < 24 * 16; i += 32) s[i / 16 * 24 + i % 16] = from_float<T>(c.in[i]);  // rows of 48 bytes
  __syncwarp();
  uint32_t a[4], b[4];
  load_matrices<false>(a, s + (lane % 16) * 24 + (c.bug == 1 ? lane / 16 * 4 : lane / 16 * 8));
  load_matrices<false>(b, s + (16 + lane % 8) * 24 + lane / 8 % 2 * 8);
  float d[4] = {};
  const uint32_t b2[2] = {b[0], c.bug == 2 ? b[0] : b[1]};
  mma<T>(d, a, b2);
  for (int i = 0; i < 4; ++i) c.out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// out = four 8 x 8 matrices, transposed: row r of matrix m stands at in[8 m + r]
__global__ void transpose(const Call c) {
  PYFAST_SHARED(shared);
  fp16* s = reinterpret_cast<fp16*>(shared);
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) s[i] = from_float<fp16>(c.in[i]);
  __syncwarp();
  uint32_t r[4];
  load_matrices<true>(r, s + lane * 8);
  for (int m = 0; m < 4; ++m)
    for (int h = 0; h < 2; ++h)
      c.out[64 * m + 8 * (lane / 4) + lane % 4 * 2 + h] = to_float(fp16{uint16_t(r[m] >> 16 * h)});
}

// out = in, 16 bytes at a time
__global__ void vectors(const Call c) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const Vector v = load_global(c.in + 4 * i + (c.bug == 1 && i == 3));
  store_global(c.out + 4 * i + (c.bug == 2 && i == 3), v);
}

// Each element rounded to both 16-bit types, alone and packed with the next, and two to its power; out[5 n] = where
// shared memory begins, modulo what its swizzle asks for
__global__ void conversions(const Call c) {
  PYFAST_SHARED(shared);
  const int i = threadIdx.x;
  const float x = c.in[i], next = c.in[(i + 1) % c.n];
  const uint32_t pairs[2] = {pack<bf16>(next, x), pack<fp16>(next, x)};
  c.out[i] = to_float(from_float<bf16>(x));
  c.out[c.n + i] = to_float(from_float<fp16>(x));
  c.out[2 * c.n + i] = to_float(bf16{uint16_t(pairs[0] >> 16)});
  c.out[3 * c.n + i] = to_float(fp16{uint16_t(pairs[1] >> 16)});
  c.out[4 * c.n + i] = exp2_approx(x);
#if defined(PYFAST_EMULATOR)
  if (i == 0) c.out[5 * c.n] = float(reinterpret_cast<uintptr_t>(shared) % 1024);
#else
  if (i == 0) c.out[5 * c.n] = float(shared_address(shared) % 1024);
#endif
}

// out[block] = the sum of in over the blocks of its cluster
__global__ void cluster_sum(const Call c) {
#if defined(PYFAST_CLUSTERS)
  PYFAST_SHARED(shared);
  float* s = reinterpret_cast<float*>(shared);
  const int size = c.n;
  if (threadIdx.x < 4) s[threadIdx.x] = c.in[blockIdx.x];
  if (c.bug != 1) cluster_barrier();
  float sum = 0.f;
  for (int r = 0; r < size; ++r) {
    const Vector v = load_cluster(s + (c.bug == 4 ? 1 : 0), c.bug == 3 ? r + 1 : r);
    float x;
    memcpy(&x, v.words, 4);
    sum += x;
  }
  if (c.bug != 2) cluster_barrier();  // bug 2: a block may exit while another reads its memory
  if (threadIdx.x == 0) c.out[blockIdx.x] = sum;
#endif
}

// The planted error: in the emulator alone where a kernel has wgmma, which ptxas would serialize at such branches
template <class Arguments>
__device__ __forceinline__ int planted(const Arguments& c) {
#if defined(PYFAST_EMULATOR)
  return c.bug;
#else
  return 0;
#endif
}

// out (64 x 128) = a b^T with a (64 x depth) and b (128 x depth) 16-bit, or, where b's rows in memory are depths, a b
// with b (depth x 128): a warp of producers fills a ring of two stages by TMA, a warp group multiplies
struct Product {
  TensorMap a, b;
  float* out;
  int depth, bug;
  const void* left = nullptr;
};
template <class T, bool kBDeep>
__global__ void __launch_bounds__(160) product(const __grid_constant__ Product c) {
#if defined(PYFAST_EMULATOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  PYFAST_SHARED(shared);
  const int bug = planted(c);
  constexpr int kA = 64 * 128, kB = 128 * 128, kStage = kA + kB;
  uint64_t* const full = reinterpret_cast<uint64_t*>(shared + 2 * kStage);
  uint64_t* const empty = full + 2;
  const int i = threadIdx.x, steps = (c.depth + 63) / 64;
  if (i == 0 && bug != 1) {
    for (int s = 0; s < 2; ++s) {
      mbarrier_init(full + s, 1);
      mbarrier_init(empty + s, bug == 2 ? 64 : 128);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  if (i >= 128) {
    if (i == 128)
      for (int k = 0; k < steps; ++k) {
        const int s = k % 2, phase = k / 2 % 2;
        if (bug != 3) mbarrier_wait(empty + s, phase ^ 1);  // passes at once for a fresh barrier
        mbarrier_arrive_expect(full + s, bug == 4 ? kA : kStage);
        unsigned char* const to = shared + s * kStage + (bug == 5 ? 128 : 0);
        tma_load<2>(to, &c.a, full + s, {k * 64, 0});
        if constexpr (kBDeep) {
          tma_load<2>(to + kA, &c.b, full + s, {0, k * 64});
          tma_load<2>(to + kA + kB / 2, &c.b, full + s, {64, k * 64});
        } else {
          tma_load<2>(to + kA, &c.b, full + s, {k * 64, 0});
        }
      }
    return;
  }
  float d[64] = {};
  for (int k = 0; k < steps; ++k) {
    const int s = k % 2, phase = k / 2 % 2;
    const unsigned char* const a = shared + s * kStage;
    if (bug != 6) mbarrier_wait(full + s, bug == 7 ? phase ^ 1 : phase);
    wgmma_fence();
    for (int step = 0; step < 4; ++step) {
      const uint64_t left = wgmma_descriptor(a + step * (bug == 8 || (bug == 12 && i == 5) ? 64 : 32));
      const uint64_t right = kBDeep ? wgmma_descriptor(a + kA + step * 16 * 128, bug == 10 ? 16 : kB / 2)
                                    : wgmma_descriptor(a + kA + (bug == 13 && i / 32 == 2 ? 0 : step * 32));
      if (step == 0 && bug == 11)
        wgmma<T, kBDeep, false>(d, left, right);
      else
        wgmma<T, kBDeep>(d, left, right);
    }
    wgmma_commit();
    if (bug != 9) wgmma_wait<0>();
    mbarrier_arrive(empty + s);
  }
  for (int j = 0; j < 64; ++j)
    c.out[(i / 32 * 16 + i % 32 / 4 + j % 4 / 2 * 8) * 128 + j / 4 * 8 + i % 4 * 2 + j % 2] = d[j];
#endif
}

// out (128 x 256) = a b^T, 16-bit, by a cluster of two blocks that have 64 rows of a each (128 x depth), and of which
// each copies half of b for both: (256 x depth), or, deep, (depth x 256). Out goes by TMA, half of the columns at a
// time.
struct Pair {
  TensorMap a, b, out;
  int depth, bug;
};
template <class T, bool kDeep>
__global__ void __launch_bounds__(160) pair(const __grid_constant__ Pair c) {
#if defined(PYFAST_EMULATOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  PYFAST_SHARED(shared);
  const int bug = planted(c);
  constexpr int kBox = 64 * 128, kA = kBox, kB = 4 * kBox, kStage = kA + kB;
  unsigned char* const out = shared + 2 * kStage;
  uint64_t* const full = reinterpret_cast<uint64_t*>(out + 2 * kBox);
  uint64_t* const empty = full + 2;
  const int i = threadIdx.x, rank = blockIdx.x % 2, steps = (c.depth + 63) / 64;
  if (i == 0) {
    for (int s = 0; s < 2; ++s) {
      mbarrier_init(full + s, 1);
      mbarrier_init(empty + s, 2);
    }
    fence_mbarrier_init();
  }
  cluster_barrier();
  if (i >= 128) {
    if (i == 128)
      for (int k = 0; k < steps; ++k) {
        const int s = k % 2;
        unsigned char *const a = shared + s * kStage, *const b = a + kA;
        const uint16_t both = bug == 3 ? 7 : bug == 4 ? 1 << rank : 3;
        mbarrier_wait(empty + s, k / 2 % 2 ^ 1);
        mbarrier_arrive_expect(full + s, bug == 5 ? kStage - 2 * kBox : kStage);
        tma_load<2>(a, &c.a, full + s, {k * 64, rank * 64});
        for (int box = 2 * rank; box < 2 * rank + 2; ++box)
          if (kDeep)
            tma_load(b + box * kBox, &c.b, full + s, {box * 64, k * 64}, both);
          else
            tma_load(b + box * kBox, &c.b, full + s, {k * 64, box * 64}, both);
      }
  } else {
    float d[128] = {};
    for (int k = 0; k < steps; ++k) {
      const int s = k % 2;
      const unsigned char *const a = shared + s * kStage, *const b = a + kA;
      mbarrier_wait(full + s, k / 2 % 2);
      wgmma_fence();
      for (int step = 0; step < 4; ++step)
        wgmma<T, kDeep>(
            d, wgmma_descriptor(a + step * 32),
            kDeep ? wgmma_descriptor(b + step * 2048, bug == 1 ? 16 : kBox) : wgmma_descriptor(b + step * 32));
      wgmma_commit();
      wgmma_wait<0>();
      for (int late = bug == 11 && rank ? 3 : 1; late; --late) named_barrier(1, 128);
      if (i < (bug == 2 ? 1 : 2)) mbarrier_arrive(empty + s, bug == 6 ? i + 1 : i);
    }
    if (bug == 11 && rank == 0) return;  // a block leaves while the other may arrive at its barriers
    for (int half = 0; half < 2; ++half) {
      if (i == 0 && bug != 7) wait_stores<0>();
      named_barrier(1, 128);
      for (int j = 0; j < 32; ++j) {
        const int r = i / 32 * 16 + i % 32 / 4 + j % 2 * 8, e = (half * 16 + j / 2) * 4 + j % 2 * 2;
        const uint32_t both = pack<T>(d[e], d[e + 1]);
        memcpy(out + j / 16 * kBox + r * 128 + ((j / 2 % 8) ^ (r % 8)) * 16 + i % 4 * 4, &both, 4);
      }
      if (bug != 8) fence_async();
      named_barrier(1, 128);
      if (i) continue;
      for (int box = 0; box < 2; ++box)
        tma_store(&c.out, out + box * kBox + (bug == 9 ? 128 : 0), {half * 128 + box * 64, rank * 64});
      commit_stores();
    }
    if (i == 0 && bug != 10) wait_stores<0>();
  }
  __syncwarp();
  if (bug != 11 || rank) cluster_barrier();
#endif
}

// out (64 x kColumns) = a b with a (64 x 64) in registers and b (64 x kColumns), whose rows are depths; b's map alone
template <class T, int kColumns>
__global__ void __launch_bounds__(128) register_product(const __grid_constant__ Product c) {
#if defined(PYFAST_EMULATOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  PYFAST_SHARED(shared);
  const int bug = planted(c);
  constexpr int kTile = 64 * 128;  // of 64 columns
  uint64_t* const full = reinterpret_cast<uint64_t*>(shared + kColumns / 64 * kTile);
  const int i = threadIdx.x, row = i / 32 * 16 + i % 32 / 4;
  if (i == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(full, kColumns / 64 * kTile);
    for (int t = 0; t < kColumns / 64; ++t) tma_load<2>(shared + t * kTile, &c.b, full, {64 * t, 0});
  }
  uint32_t a[4][4];
  for (int k = 0; k < 4; ++k)
    for (int r = 0; r < 4; ++r) {
      const int below = bug == 4 ? r / 2 : r % 2, right = bug == 4 ? r % 2 : r / 2;
      memcpy(&a[k][r], static_cast<const T*>(c.left) + (row + below * 8) * 64 + k * 16 + right * 8 + i % 4 * 2, 4);
    }
  __syncthreads();
  mbarrier_wait(full, 0);
  float d[kColumns / 2] = {};
  hold(d);
  for (int k = 0; k < 4; ++k) hold(a[k]);
  wgmma_fence();
  for (int k = 0; k < 4; ++k)
    wgmma<T, true>(d, a[k], wgmma_descriptor(shared + k * (bug == 5 ? 1024 : 2048), bug == 3 ? 16 : kTile));
  wgmma_commit();
  if (bug == 1) a[3][i % 4] ^= 1;
  if (bug != 2) wgmma_wait<0>();
  hold(d);
  for (int j = 0; j < kColumns / 2; ++j) c.out[(row + j % 4 / 2 * 8) * kColumns + j / 4 * 8 + i % 4 * 2 + j % 2] = d[j];
#endif
}

// out (128 x 128) = the sum over two tiles t of (a b_t^T) v_t, 16-bit, with a (128 x 64), b (128 x 64) and v (128 x
// 128) in tiles of 64 rows, of which those of v from `rows` on count as zeros: attention without a softmax. A third
// warp group copies, and gives its registers to the two that multiply.
struct Chain {
  TensorMap a, b, v;
  float* out;
  int rows, bug;
};
template <class T>
__global__ void __launch_bounds__(384, 1) chain(const __grid_constant__ Chain c) {
#if defined(PYFAST_EMULATOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  PYFAST_SHARED(shared);
  const int bug = planted(c);
  constexpr int kTile = 64 * 128;
  unsigned char *const b = shared + 2 * kTile, *const v = b + 2 * kTile;
  uint64_t* const full = reinterpret_cast<uint64_t*>(v + 4 * kTile);
  const int i = threadIdx.x, group = i / 128, lane = i % 32;
  if (i == 0) {
    for (int t = 0; t < 3; ++t) mbarrier_init(full + t, 1);
    if (bug != 1) fence_mbarrier_init();
  }
  __syncthreads();
  if (group == 2) {
    if (bug != 2 || i % 128 >= 32) give_registers<24>();
    if (i != 256) return;
    for (int t = 0; t < 2; ++t) {
      mbarrier_arrive_expect(full + t, t == 0 ? 5 * kTile : 3 * kTile);
      for (int half = 0; half < 2 && t == 0; ++half) tma_load<2>(shared + half * kTile, &c.a, full, {0, half * 64});
      tma_load<2>(b + t * kTile, &c.b, full + t, {0, t * 64});
      for (int half = 0; half < 2; ++half) tma_load<2>(v + (2 * t + half) * kTile, &c.v, full + t, {half * 64, t * 64});
    }
    if (bug == 3) mbarrier_arrive_expect(full + 2, kTile), tma_load<2>(b, &c.b, full + 2, {0, 0});  // nobody waits
    return;
  }
  if (bug == 7)
    take_registers<248>();
  else
    take_registers<240>();
  float s[32], sums[64] = {};
  uint32_t p[4][4];
  const auto begin_scores = [&](int t) {
    hold(s);
    if (bug != 4) wgmma_fence();
    for (int k = 0; k < 4; ++k) {
      const uint64_t left = wgmma_descriptor(shared + group * kTile + k * 32);
      const uint64_t right = wgmma_descriptor(b + t * kTile + k * 32);
      if (k == 0)
        wgmma<T, false, false>(s, left, right);
      else
        wgmma<T>(s, left, right);
    }
    wgmma_commit();
  };
  const auto begin_sums = [&](int t) {
    for (int k = 0; k < 4; ++k) hold(p[k]);
    hold(sums);
    wgmma_fence();
    for (int k = 0; k < 4; ++k) wgmma<T, true>(sums, p[k], wgmma_descriptor(v + 2 * t * kTile + k * 2048, kTile));
    wgmma_commit();
  };
  const auto make_operand = [&] {
    for (int k = 0; k < 4; ++k)
      for (int r = 0; r < 4; ++r) p[k][r] = pack<T>(s[8 * k + 2 * r], s[8 * k + 2 * r + 1]);
  };
  mbarrier_wait(full, 0);
  begin_scores(0);
  wgmma_wait<0>();
  hold(s);
  make_operand();
  mbarrier_wait(full + 1, 0);
  begin_scores(1);
  begin_sums(0);
  wgmma_wait<1>();  // the scores; the sums are in flight
  hold(s);
  wgmma_wait<0>();
  hold(sums);
  make_operand();
  for (int n = (c.rows - 64) * 8 + i % 128; n < 64 * 8; n += 128)  // 16 bytes each
    for (int half = 0; half < 2; ++half) *reinterpret_cast<Vector*>(v + (2 + half) * kTile + n * 16) = Vector{};
  if (bug != 5) fence_async();
  if (bug != 6) named_barrier(1 + group, 128);
  begin_sums(1);
  wgmma_wait<0>();
  hold(sums);
  const int row = i / 32 * 16 + lane / 4;
  for (int j = 0; j < 64; ++j) c.out[(row + j % 4 / 2 * 8) * 128 + j / 4 * 8 + lane % 4 * 2 + j % 2] = sums[j];
#endif
}

// out = the box (3 x 2 x 8 x 64) at (0, 2, 1, 0) of a tensor (3, 5, 9, n), 16-bit, out of its swizzled rows
struct Box {
  TensorMap map;
  float* out;
};
__global__ void box(const __grid_constant__ Box c) {
#if defined(PYFAST_EMULATOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  PYFAST_SHARED(shared);
  constexpr int kRows = 3 * 2 * 8;
  uint64_t* const full = reinterpret_cast<uint64_t*>(shared + kRows * 128);
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(full, kRows * 128);
    tma_load<4>(shared, &c.map, full, {0, 1, 2, 0});
  }
  __syncthreads();
  mbarrier_wait(full, 0);
  for (int i = threadIdx.x; i < kRows * 64; i += blockDim.x) {
    const int row = i / 64, column = i % 64;
    const uint16_t bits =
        reinterpret_cast<const uint16_t*>(shared)[row * 64 + ((column / 8) ^ (row % 8)) * 8 + column % 8];
    c.out[i] = to_float(fp16{bits});
  }
#endif
}

int finished(int code) {
#if !defined(PYFAST_EMULATOR)
  if (!code) return cudaDeviceSynchronize();
#endif
  return code;
}

}  // namespace

#define PYFAST_EXPORT extern "C" __attribute__((visibility("default")))

PYFAST_EXPORT int run_product(const void* a, const void* b, float* out, bool is_bf16, bool b_deep, int depth, int bug) {
  Product c{{}, {}, out, depth, bug};
  const DType type = is_bf16 ? DType::bf16 : DType::fp16;
  if (int e = make_tensor_map<2>(c.a, type, a, {depth, 64}, {2, depth * 2}, {64, 64})) return e;
  if (int e = b_deep ? make_tensor_map<2>(c.b, type, b, {128, depth}, {2, 256}, {64, 64})
                     : make_tensor_map<2>(c.b, type, b, {depth, 128}, {2, depth * 2}, {64, 128}))
    return e;
  const auto kernel = is_bf16 ? (b_deep ? product<bf16, true> : product<bf16, false>)
                              : (b_deep ? product<fp16, true> : product<fp16, false>);
  return finished(launch(kernel, {1, 160, 2 * 192 * 128 + 32}, c, nullptr));
}
PYFAST_EXPORT int run_pair(const void* a, const void* b, void* out, bool is_bf16, bool deep, int depth, int bug) {
  Pair c{{}, {}, {}, depth, bug};
  const DType type = is_bf16 ? DType::bf16 : DType::fp16;
  if (int e = make_tensor_map<2>(c.a, type, a, {depth, 128}, {2, depth * 2}, {64, 64})) return e;
  if (int e = deep ? make_tensor_map<2>(c.b, type, b, {256, depth}, {2, 512}, {64, 64})
                   : make_tensor_map<2>(c.b, type, b, {depth, 256}, {2, depth * 2}, {64, 64}))
    return e;
  if (int e = make_tensor_map<2>(c.out, type, out, {250, 120}, {2, 512}, {64, 64})) return e;
  const auto kernel =
      is_bf16 ? (deep ? pair<bf16, true> : pair<bf16, false>) : (deep ? pair<fp16, true> : pair<fp16, false>);
  return finished(launch(kernel, {2, 160, (2 * 5 + 2) * 64 * 128 + 32, 2}, c, nullptr));
}
PYFAST_EXPORT int run_register_product(const void* a, const void* b, float* out, bool is_bf16, int columns, int bug) {
  Product c{{}, {}, out, 64, bug, a};
  const DType type = is_bf16 ? DType::bf16 : DType::fp16;
  if (int e = make_tensor_map<2>(c.b, type, b, {columns, 64}, {2, columns * 2}, {64, 64})) return e;
  const auto kernel = columns == 64 ? (is_bf16 ? register_product<bf16, 64> : register_product<fp16, 64>)
                                    : (is_bf16 ? register_product<bf16, 128> : register_product<fp16, 128>);
  return finished(launch(kernel, {1, 128, columns * 128 + 8}, c, nullptr));
}
PYFAST_EXPORT int run_chain(const void* a, const void* b, const void* v, float* out, bool is_bf16, int rows, int bug) {
  Chain c{{}, {}, {}, out, rows, bug};
  const DType type = is_bf16 ? DType::bf16 : DType::fp16;
  if (int e = make_tensor_map<2>(c.a, type, a, {64, 128}, {2, 128}, {64, 64})) return e;
  if (int e = make_tensor_map<2>(c.b, type, b, {64, 128}, {2, 128}, {64, 64})) return e;
  if (int e = make_tensor_map<2>(c.v, type, v, {128, 128}, {2, 256}, {64, 64})) return e;
  return finished(launch(is_bf16 ? chain<bf16> : chain<fp16>, {1, 384, 8 * 64 * 128 + 24}, c, nullptr));
}
PYFAST_EXPORT int run_box(const void* x, float* out, int n) {
  Box c{{}, out};
  if (int e = make_tensor_map<4>(c.map, DType::fp16, x, {n, 9, 5, 3}, {2, n * 2, n * 18, n * 90}, {64, 8, 2, 3}))
    return e;
  return finished(launch(box, {1, 64, 48 * 128 + 16}, c, nullptr));
}
PYFAST_EXPORT int run(const float* in, float* out, const char* name, int n, int bug, int64_t blocks, int threads,
                      int shared, int cluster) {
  const Call call{in, out, n, bug};
  const struct {
    const char* name;
    void (*kernel)(Call);
  } all[] = {{"reverse", reverse},          {"reverse_pairs", reverse_pairs}, {"warp_sum", warp_sum},
             {"warp_scan", warp_scan},      {"atomic_sum", atomic_sum},       {"pipeline", pipeline},
             {"matmul_bf16", matmul<bf16>}, {"matmul_fp16", matmul<fp16>},    {"transpose", transpose},
             {"vectors", vectors},          {"cluster_sum", cluster_sum},     {"turns", turns},
             {"conversions", conversions}};
  for (const auto& k : all)
    if (!strcmp(k.name, name))
      return finished(launch<Call>(k.kernel, {blocks, threads, shared, cluster}, call, nullptr));
  return -1;
}
PYFAST_EXPORT const char* error(int code) { return error_string(code); }
#if defined(PYFAST_EMULATOR)
PYFAST_EXPORT void emulate(int order, unsigned seed, bool lazy, int architecture) {
  simt::options() = {simt::Order(order), seed, lazy, architecture};
}
#endif
