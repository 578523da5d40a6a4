// What sm_90 adds to simt.h: mbarriers, tiles copied by TMA, and wgmma. In the lazy mode a tile arrives when a thread
// waits for it and not before, and a product is formed when its group is waited for.
#pragma once
#include "emulator/simt.h"

namespace simt {

// ---- mbarrier: 8 bytes of shared memory. A phase ends when all arrivals and all bytes that they announced have come.
void mbarrier_init(uint64_t* barrier, int arrivals);
void fence_mbarrier_init();  // by the thread that initialised them, before it meets others or asks for a tile
void mbarrier_arrive(uint64_t* barrier, int bytes);         // and announces so many bytes
void mbarrier_arrive_cluster(uint64_t* barrier, int rank);  // at that block's barrier in the same place
void mbarrier_wait(uint64_t* barrier, int parity);          // until the phase of this parity has ended

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
// The box at `at`, zeros outside the tensor, to shared memory; tells the barrier its bytes. With `blocks`, to the same
// place in each block of the cluster whose bit is set, and to its barrier.
void tma_load(void* to, const TensorMap* map, uint64_t* barrier, const int (&at)[4], uint16_t blocks = 0);

// What was written to shared memory so far, other than by TMA, is seen by TMA and wgmma from here on. (Of the writing
// threads, one stands for all.)
void fence_async();
// A box of shared memory to the tensor, without what lies outside of it, in the calling thread's open group; in the
// lazy mode it is read when it is waited for.
void tma_store(const TensorMap* map, const void* from, const int (&at)[4]);
void commit_stores();
void wait_stores(int left);

// ---- setmaxnreg: the block began with as many registers as there are for its threads, in eights; `more` waits until
// others have given back so many
void set_registers(int count, bool more);

// ---- wgmma: asynchronous work of one thread, in groups. It must have fenced its registers since it last waited, and
// the lanes of a warp, and the warps of a group, name the same operands.
void fence_registers();
void defer(uint64_t operands, std::function<void()> work);
void commit_deferred();
void wait_deferred(int left);

// The 16 elements of a row of a wgmma operand that a descriptor names, with 128-byte swizzle, K-major or, where its
// rows in memory are depths, MN-major (PTX ISA, "Matrix Descriptor Format" and "Strides": a row's 64 neighbours lie in
// rows of 128 bytes, one per depth, 8 of them to a group, the stride's bytes to the next; the leading dimension's bytes
// lead to the next 64 rows)
void descriptor_row(uint64_t descriptor, int row, bool deep, uint16_t (&elements)[16]);

}  // namespace simt
