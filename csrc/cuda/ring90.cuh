// A ring of tiles in shared memory on sm_90a, which one thread fills by TMA and warps of its block read (CUTLASS's
// PipelineTmaAsync): tile n stands in stage n % kStages, which has an mbarrier that its bytes end, and one that the
// consumers' warps end.
#pragma once
#include "cuda/ptx90.cuh"

namespace pyfast::cuda {

// kBlocks: of a cluster, each of which brings parts of the others' tiles, and fills a stage when the warps of all have
// read theirs
template <int kStages, int kBlocks = 1>
struct Ring {
  static constexpr int kBytes = 2 * kStages * 8;

  uint64_t* barriers;  // of kBytes

  // By one thread, before a fence_mbarrier_init and a barrier; `warps` of a block read
  __device__ __forceinline__ void begin(int warps) const {
    for (int n = 0; n < kStages; ++n) {
      mbarrier_init(full(n), 1);
      mbarrier_init(free(n), kBlocks * warps);
    }
  }
  // By the producer: waits until tile n's stage is free, and announces its bytes; returns what TMA tells of them
  __device__ __forceinline__ uint64_t* fill(int n, int bytes) const {
    if (n >= kStages) mbarrier_wait(free(n), n / kStages % 2 ^ 1);
    mbarrier_arrive_expect(full(n), bytes);
    return full(n);
  }
  // By the consumers: until tile n is there
  __device__ __forceinline__ void wait(int n) const { mbarrier_wait(full(n), n / kStages % 2); }
  // By a warp of theirs that has read it
  __device__ __forceinline__ void release(int n) const {
    const int lane = threadIdx.x % 32;
    __syncwarp();
    if constexpr (kBlocks == 1) {
      if (lane == 0) mbarrier_arrive(free(n));
    } else {
      if (lane < kBlocks) mbarrier_arrive(free(n), lane);
    }
  }

 private:
  __device__ __forceinline__ uint64_t* full(int n) const { return barriers + n % kStages; }
  __device__ __forceinline__ uint64_t* free(int n) const { return full(n) + kStages; }
};

}  // namespace pyfast::cuda
