// Memory for large results, kept between calls. From 32 MB on, malloc maps fresh memory at every call and unmaps it at
// every free, and the system clears each page that is touched: 256 MB cost 20 ms of one core, more than a kernel's pass
// over them. A block that is given back stays mapped, with huge pages under it, for the next result of its size; the
// system may take its pages meanwhile (MADV_FREE).
#pragma once
#include <cstddef>

namespace pyfast {

constexpr size_t kLargeBytes = size_t(32) << 20;  // glibc's highest threshold for mapping memory apart

void* take_block(size_t bytes);  // null where there is no memory
void give_back_block(void* block, size_t bytes);
void free_kept_blocks();

}  // namespace pyfast
