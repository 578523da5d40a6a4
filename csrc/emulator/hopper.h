// What sm_90 adds to simt.h: mbarriers, tiles copied by TMA, and wgmma. In the lazy mode a tile arrives when a thread
// waits for it and not before, and a product is formed when its group is waited for.
#pragma once
#include "emulator/simt.h"

namespace simt {

// ---- mbarrier: 8 bytes of shared memory. A phase ends when all arrivals and all bytes that they announced have come.
void mbarrier_init(uint64_t* barrier, int arrivals);
void mbarrier_arrive(uint64_t* barrier, int bytes);  // and announces so many bytes
void mbarrier_wait(uint64_t* barrier, int parity);   // until the phase of this parity has ended

// ---- TMA
struct TensorMap {
  const uint8_t* base;
  int rank, element_bytes;
  int64_t sizes[4], strides[4];  // of dimension 0 first, which is contiguous; strides in bytes
  int box[4];
  bool swizzled;  // 128-byte rows whose 16-byte chunks stand at chunk ^ (row % 8)
};
// 0, or 1 for what the driver refuses
int encode_tensor_map(TensorMap& map);
// The box at `at`, zeros outside the tensor, to shared memory; tells the barrier its bytes
void tma_load(void* to, const TensorMap* map, uint64_t* barrier, const int (&at)[4]);

// ---- asynchronous work of one thread, in groups
void defer(std::function<void()> work);
void commit_deferred();
void wait_deferred(int left);

// The element of a wgmma operand that a descriptor names: row r, depth k, with 128-byte swizzle, K-major or, where its
// rows in memory are depths, not
const void* descriptor_element(uint64_t descriptor, int row, int k, bool deep);

}  // namespace simt
