#include "binding/blocks.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <map>
#include <mutex>

#include "binding/binding.h"

namespace pyfast {
namespace {

constexpr size_t kPage = 2 << 20;

// Sizes in steps of an eighth, so that results of about the same size share blocks; what lies beyond a result is never
// touched.
size_t rounded(size_t bytes) {
  size_t step = std::max(std::bit_floor(bytes) / 8, kPage);
  return (bytes + step - 1) / step * step;
}

struct Kept {
  std::mutex mutex;
  std::multimap<size_t, void*> blocks;
  size_t bytes = 0;
  const size_t limit = size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGE_SIZE)) / 16;
};
Kept& kept() {
  static Kept* all = new Kept;  // never destroyed: tensors may outlive static objects
  return *all;
}

void* map(size_t bytes) {
  void* p = mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  size_t head = (kPage - uintptr_t(p) % kPage) % kPage;
  char* begin = static_cast<char*>(p) + head;
  if (head) munmap(p, head);
  munmap(begin + bytes, kPage - head);
  ask_huge_pages(begin, bytes);
  return begin;
}

}  // namespace

void free_kept_blocks() {
  Kept& all = kept();
  std::lock_guard lock(all.mutex);
  for (auto [bytes, block] : all.blocks) munmap(block, bytes);
  all.blocks.clear();
  all.bytes = 0;
}

void* take_block(size_t bytes) {
  bytes = rounded(bytes);
  Kept& all = kept();
  {
    std::lock_guard lock(all.mutex);
    auto after = all.blocks.upper_bound(bytes);
    if (after != all.blocks.begin() && std::prev(after)->first == bytes) {  // the last one given back: it may be cached
      void* block = std::prev(after)->second;
      all.blocks.erase(std::prev(after));
      all.bytes -= bytes;
      return block;
    }
  }
  return map(bytes);
}

void give_back_block(void* block, size_t bytes) {
  bytes = rounded(bytes);
  Kept& all = kept();
  madvise(block, bytes, MADV_FREE);
  std::lock_guard lock(all.mutex);
  if (all.bytes + bytes > all.limit) {
    munmap(block, bytes);
    return;
  }
  all.blocks.emplace(bytes, block);
  all.bytes += bytes;
}

STABLE_TORCH_LIBRARY_IMPL(pyfast_cpu, CompositeExplicitAutograd, m) {
  m.impl("empty_cache", TORCH_BOX(&free_kept_blocks));
}

}  // namespace pyfast
