#include "emulator/hopper.h"

#include <array>
#include <utility>
#include <vector>

namespace simt {
namespace {

struct State {
  uint16_t arrivals, pending;
  int32_t bytes : 31;
  uint32_t phase : 1;
};
static_assert(sizeof(State) == 8);

State* state_of(uint64_t* barrier, const char* what) {
  check_shared(barrier, 8, 8, what);
  auto* s = reinterpret_cast<State*>(barrier);
  if (s->arrivals == 0xFFFF) fail(std::string(what) + " of a barrier that was not initialised");
  return s;
}

void end_if_complete(State& s) {
  if (s.pending || s.bytes) return;
  s.pending = s.arrivals;
  s.phase ^= 1;
}

void arrive(State& s, int bytes) {
  if (s.pending == 0) fail("mbarrier.arrive: more arrivals than the barrier expects");
  s.bytes += bytes;
  --s.pending;
  end_if_complete(s);
}

// f(element's bytes in the tensor, or null outside of it, and in shared memory) for all of a box
template <class F>
void for_box(const TensorMap& m, const int (&begin)[4], uint64_t place, F f) {
  int at[4];
  for (at[3] = 0; at[3] < m.box[3]; ++at[3])
    for (at[2] = 0; at[2] < m.box[2]; ++at[2])
      for (at[1] = 0; at[1] < m.box[1]; ++at[1])
        for (at[0] = 0; at[0] < m.box[0]; ++at[0], place += m.element_bytes) {
          bool inside = true;
          int64_t offset = 0;
          for (int i = 0; i < 4; ++i) {
            const int64_t x = int64_t(begin[i]) + at[i];
            inside = inside && x >= 0 && x < m.sizes[i];
            offset += x * m.strides[i];
          }
          f(inside ? m.base + offset : nullptr, m.swizzled ? place ^ (place >> 7 & 7) << 4 : place);
        }
}

int box_bytes(const TensorMap& m) { return m.box[0] * m.box[1] * m.box[2] * m.box[3] * m.element_bytes; }

void copy_tile(const TensorMap& m, const int (&begin)[4], uint64_t to, uint8_t* shared, uint8_t* async, State& s) {
  for_box(m, begin, to, [&](const uint8_t* from, uint64_t place) {
    for (uint8_t* memory : {shared, async})
      if (from)
        memcpy(memory + place, from, m.element_bytes);
      else
        memset(memory + place, 0, m.element_bytes);
  });
  s.bytes -= box_bytes(m);
  end_if_complete(s);
}

// Shared memory as TMA and wgmma read it
void read_async(void* to, const Block& b, uint64_t place, int bytes, const char* what) {
  memcpy(to, b.async + place, bytes);
  if (memcmp(to, b.shared + place, bytes))
    fail(std::string(what) + " reads what was written without fence.proxy.async, or while it reads");
}

uint64_t hash(uint64_t before, uint64_t x) { return (before ^ x) * 0x9E3779B97F4A7C15 + 1; }

using Groups = std::vector<std::vector<std::function<void()>>>;  // the last one is open
void wait_groups(Groups& groups, int left) {
  while (int(groups.size()) - 1 > left) {
    for (const auto& work : groups.front()) work();
    groups.erase(groups.begin());
  }
}

}  // namespace

void mbarrier_init(uint64_t* barrier, int arrivals) {
  check_shared(barrier, 8, 8, "mbarrier.init");
  if (arrivals < 1 || arrivals > 1024) fail("mbarrier.init for " + std::to_string(arrivals) + " arrivals");
  const State s{uint16_t(arrivals), uint16_t(arrivals), 0, 0};
  memcpy(barrier, &s, 8);
  current->barriers_unfenced = true;
}
void fence_mbarrier_init() { current->barriers_unfenced = false; }

void mbarrier_arrive(uint64_t* barrier, int bytes) { arrive(*state_of(barrier, "mbarrier.arrive"), bytes); }
void mbarrier_arrive_cluster(uint64_t* barrier, int rank) {
  state_of(barrier, "mbarrier.arrive");
  arrive(*static_cast<State*>(map_shared(barrier, rank)), 0);
}

void mbarrier_wait(uint64_t* barrier, int parity) {
  State* s = state_of(barrier, "mbarrier.try_wait");
  auto& transfers = current->block->transfers;
  wait_until(
      [=, &transfers] {
        if (int(s->phase) != parity) return true;
        for (size_t i = 0; i < transfers.size(); ++i)
          if (transfers[i].barrier == s) {  // the oldest of its tiles arrives
            const Transfer t = transfers[i];
            transfers.erase(transfers.begin() + i);
            t.finish();
            break;
          }
        return int(s->phase) != parity;
      },
      "an mbarrier");
}

int encode_tensor_map(TensorMap& m) {
  for (int i = m.rank; i < 4; ++i) m.sizes[i] = m.box[i] = 1, m.strides[i] = 0;
  m.strides[0] = m.element_bytes;
  if (reinterpret_cast<uintptr_t>(m.base) % 16 || m.box[0] * m.element_bytes % 16) return 1;
  if (m.swizzled && m.box[0] * m.element_bytes > 128) return 1;
  for (int i = 0; i < m.rank; ++i) {
    if (m.box[i] < 1 || m.box[i] > 256 || m.sizes[i] < 1 || m.sizes[i] > int64_t(1) << 32) return 1;
    // no stride shorter than the rows of dimension 0: the documents say how strides come about, not what is refused
    if (i && (m.strides[i] % 16 || m.strides[i] < m.sizes[0] * m.element_bytes || m.strides[i] >> 40)) return 1;
  }
  return 0;
}

void tma_load(void* to, const TensorMap* map, uint64_t* barrier, const int (&at)[4], uint16_t blocks) {
  const int bytes = box_bytes(*map);
  check_shared(to, bytes, map->swizzled ? 1024 : 128, "TMA");
  state_of(barrier, "TMA");
  if (current->barriers_unfenced) fail("mbarriers were initialised, and no fence.mbarrier_init followed");
  const Block& own = *current->block;
  if (blocks >> own.cluster_size) fail("TMA to a block that the cluster does not have");
  for (int rank = 0; rank < own.cluster_size; ++rank) {
    if (blocks ? !(blocks >> rank & 1) : rank != own.rank) continue;
    Block& other = own.cluster[rank];
    auto* const there = static_cast<uint8_t*>(map_shared(to, rank));
    auto* const state = static_cast<State*>(map_shared(barrier, rank));
    // the map by value: it is a kernel's argument, and this copy of it may be gone when the tile arrives
    auto finish = [m = *map, begin = std::array{at[0], at[1], at[2], at[3]}, place = uint64_t(there - other.shared),
                   shared = other.shared, async = other.async,
                   state] { copy_tile(m, {begin[0], begin[1], begin[2], begin[3]}, place, shared, async, *state); };
    if (!options().lazy) {
      finish();
      continue;
    }
    memset(there, 0xFF, bytes);  // in flight: what is there is garbage
    memset(other.async + (there - other.shared), 0xFF, bytes);
    other.transfers.push_back({state, finish});
  }
}

void fence_async() { memcpy(current->block->async, current->block->shared, current->block->shared_bytes); }
void tma_store(const TensorMap* map, const void* from, const int (&at)[4]) {
  check_shared(from, box_bytes(*map), map->swizzled ? 1024 : 128, "TMA");
  auto store = [m = *map, begin = std::array{at[0], at[1], at[2], at[3]}, from = static_cast<const uint8_t*>(from),
                &block = *current->block] {
    for_box(m, {begin[0], begin[1], begin[2], begin[3]}, from - block.shared, [&](const uint8_t* to, uint64_t place) {
      if (to) read_async(const_cast<uint8_t*>(to), block, place, m.element_bytes, "a TMA store");
    });
  };
  if (!options().lazy) return store();
  current->stores.back().push_back(store);
}
void commit_stores() { current->stores.emplace_back(); }
void wait_stores(int left) { wait_groups(current->stores, left); }

void set_registers(int count, bool more) {
  if (count % 8 || count < 24 || count > 256) fail("setmaxnreg to " + std::to_string(count) + " registers");
  int& spare = current->block->spare_registers;
  meet(
      ~0u, nullptr, nullptr,
      [&](Warp& w) {
        if (more ? count < w.registers : count > w.registers)
          fail("setmaxnreg from " + std::to_string(w.registers) + " to " + std::to_string(count) + " registers");
        spare += 32 * (w.registers - count);
        w.registers = count;
      },
      "setmaxnreg");
  if (more) wait_until([&] { return spare >= 0; }, "setmaxnreg");
}

void fence_registers() { current->registers_fenced = true; }
void defer(uint64_t operands, std::function<void()> work) {
  current->products = hash(current->products, operands);
  if (!current->registers_fenced) fail("wgmma without wgmma.fence since registers were last free to be written");
  if (options().lazy)
    current->deferred.back().push_back(std::move(work));
  else
    work();
}
void commit_deferred() {
  const uint64_t products = std::exchange(current->products, 0);
  Warp& warp = *current->warp;
  collective<uint64_t, int>(
      ~0u, products,
      [&](auto in, auto&&) {
        for (int lane = 1; lane < 32; ++lane)
          if (in(lane) != in(0)) fail("the lanes of a warp differ in their wgmmas");
        warp.products = hash(warp.products, in(0));
      },
      "wgmma.commit_group");
  current->deferred.emplace_back();
}
void wait_deferred(int left) {
  wait_groups(current->deferred, left);
  current->registers_fenced = false;
}

void descriptor_row(uint64_t descriptor, int row, bool deep, uint16_t (&elements)[16]) {
  if (descriptor >> 62 != 1) fail("wgmma: only operands with 128-byte swizzle are emulated");
  const uint64_t start = (descriptor & 0x3FFF) << 4, group = (descriptor >> 32 & 0x3FFF) << 4;
  const uint64_t next = (descriptor >> 16 & 0x3FFF) << 4;
  const int each = deep ? 1 : 8;  // elements that lie together: one of each depth, or a chunk
  for (int k = 0; k < 16; k += each) {
    uint64_t at = start + (deep ? row / 64 * next + k / 8 * group + k % 8 * 128 + row % 64 * 2
                                : row / 8 * group + row % 8 * 128 + k * 2);
    at ^= (at >> 7 & 7) << 4;
    check_shared(current->block->shared + at, 2 * each, 2 * each, "a wgmma operand");
    read_async(elements + k, *current->block, at, 2 * each, "wgmma");
  }
}

}  // namespace simt
