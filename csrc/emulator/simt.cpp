#include "emulator/simt.h"

#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <random>

#include "cpu/parallel.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ASAN(...) __VA_ARGS__
#else
#define ASAN(...)
#endif

// A switch of stacks keeps what a function call must: the callee-saved registers. (swapcontext would also make a system
// call, a hundred times as long.)
extern "C" void simt_switch(void** from, void* to);
#if defined(__x86_64__)
__asm__(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
constexpr int kSavedWords = 6;
#else
#error "the emulator switches stacks in x86-64 assembly: add the same for this processor"
#endif

namespace simt {

thread_local Fiber* current = nullptr;
thread_local const Launch* launched = nullptr;

namespace {

constexpr size_t kStack = 256 << 10;

struct Failure {
  std::string message;
};

// What one OS thread needs to run clusters; kept between launches, since stacks are dear to make.
struct Scheduler {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Block> blocks;
  Barrier cluster_barrier;
  const std::function<void()>* body = nullptr;
  void* stack_pointer = nullptr;
  std::string failure;
  bool failed = false;
  void* sanitizer = nullptr;
  const void* own_stack = nullptr;
  size_t own_size = 0;

  ~Scheduler() {
    for (auto& f : fibers) munmap(f->stack, kStack);
  }
};
thread_local Scheduler scheduler;

void to_scheduler() {
  Fiber* self = current;
  ASAN(
      __sanitizer_start_switch_fiber(self->done ? nullptr : &self->sanitizer, scheduler.own_stack, scheduler.own_size);)
  simt_switch(&self->stack_pointer, scheduler.stack_pointer);
  ASAN(__sanitizer_finish_switch_fiber(self->sanitizer, &scheduler.own_stack, &scheduler.own_size);)
}

void to_fiber(Fiber& f) {
  current = &f;
  ASAN(__sanitizer_start_switch_fiber(&scheduler.sanitizer, f.stack, kStack);)
  simt_switch(&scheduler.stack_pointer, f.stack_pointer);
  ASAN(__sanitizer_finish_switch_fiber(scheduler.sanitizer, nullptr, nullptr);)
  current = nullptr;
}

std::string where(const Fiber& f) {
  const Index &b = f.block->index, &t = f.thread;
  const auto triple = [](const Index& i) {
    return std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z);
  };
  return "block (" + triple(b) + "), thread (" + triple(t) + ")";
}

void release_if_complete(Barrier& b, int expected) {
  if (b.arrived == 0 || b.arrived < expected) return;
  b.arrived = 0;
  ++b.phase;
}

int live_in_cluster() {
  int live = 0;
  for (const Block& b : scheduler.blocks) live += b.live;
  return live;
}

// What must hold when a block's last thread exits
void check_end(const Block& b) {
  if (!b.transfers.empty()) fail("a block exits before a tile that TMA brings has come");
  for (size_t w = 0; w + 1 < b.warps.size(); ++w) {
    if (w % 4 == 3) continue;
    if (b.warps[w].registers != b.warps[w + 1].registers) fail("setmaxnreg by some of a warp group's warps");
    if (b.warps[w].products != b.warps[w + 1].products) fail("the warps of a warp group differ in their wgmmas");
  }
}

void fiber_main() {
  ASAN(__sanitizer_finish_switch_fiber(nullptr, &scheduler.own_stack, &scheduler.own_size);)
  Fiber& self = *current;
  try {
    (*scheduler.body)();
    for (const auto& group : self.stores)
      if (!group.empty()) fail("a thread exits before shared memory that it stores has been read");
    if (self.block->live == 1) check_end(*self.block);
  } catch (const Failure& failure) {
    scheduler.failed = true;
    scheduler.failure = failure.message;
  }
  self.done = true;
  --self.block->live;
  self.warp->alive &= ~(1u << self.lane);
  Barrier& all = self.block->barriers[0];
  if (all.expected == 0) release_if_complete(all, self.block->live);
  release_if_complete(scheduler.cluster_barrier, live_in_cluster());
  to_scheduler();
  abort();  // a finished fiber is never resumed
}

// The stack as simt_switch leaves it, "called" from nowhere: it returns into fiber_main.
void* fresh_stack(char* stack) {
  void** top =
      reinterpret_cast<void**>(stack + kStack) - 2;  // fiber_main begins with the alignment of a called function
  top[0] = reinterpret_cast<void*>(&fiber_main);
  top[1] = nullptr;
  for (int i = 1; i <= kSavedWords; ++i) top[-i] = nullptr;
  return top - kSavedWords;
}

void prepare(const Launch& l, Block& b, int rank, size_t number) {
  const int threads = int(l.block.x * l.block.y * l.block.z);
  b = Block{};
  b.index = {unsigned(number % l.grid.x), unsigned(number / l.grid.x % l.grid.y),
             unsigned(number / (size_t(l.grid.x) * l.grid.y))};
  b.rank = rank, b.live = threads, b.cluster = scheduler.blocks.data(), b.cluster_size = l.cluster;
  b.warps.resize((threads + 31) / 32);
  b.cluster_barrier = &scheduler.cluster_barrier;
  b.shared_bytes = l.shared_bytes;
  // exactly as large as asked for, so that AddressSanitizer sees what lies beyond; NaN, so that an unwritten read shows
  if (posix_memalign(reinterpret_cast<void**>(&b.shared), 1024, std::max<size_t>(l.shared_bytes, 1))) abort();
  memset(b.shared, 0xFF, l.shared_bytes);
  if (options().architecture >= 90) {
    if (posix_memalign(reinterpret_cast<void**>(&b.async), 1024, std::max<size_t>(l.shared_bytes, 1))) abort();
    memset(b.async, 0xFF, l.shared_bytes);
  }
  // what ptxas gives a kernel of one block to a processor, in eights
  for (Warp& w : b.warps) w.registers = std::min(255, (64 << 10) / (int(b.warps.size()) * 32) / 8 * 8);
  while (scheduler.fibers.size() < size_t(threads) * l.cluster) {
    auto f = std::make_unique<Fiber>();
    f->stack = static_cast<char*>(
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    scheduler.fibers.push_back(std::move(f));
  }
  for (int i = 0; i < threads; ++i) {
    Fiber& f = *scheduler.fibers[rank * threads + i];
    char* stack = f.stack;
    f = Fiber{};
    ASAN(__asan_unpoison_memory_region(stack, kStack);)  // of frames that stood here and never returned
    f.stack = stack, f.stack_pointer = fresh_stack(stack), f.block = &b, f.warp = &b.warps[i / 32];
    f.thread = {i % l.block.x, i / l.block.x % l.block.y, i / (l.block.x * l.block.y)};
    f.linear = i, f.lane = i % 32;
    f.copies.resize(1);
    f.deferred.resize(1);
    f.stores.resize(1);
    f.warp->alive |= 1u << f.lane;
    b.fibers.push_back(&f);
  }
}

std::string deadlock(const std::vector<Fiber*>& fibers) {
  std::string message = "deadlock:";
  int named = 0;
  for (const Fiber* f : fibers) {
    if (f->done || (f->lane && f->linear + 1 != int(f->block->fibers.size()))) continue;
    if (++named > 8) return message.append(" ...");
    message.append(" ").append(where(*f)).append(" waits at ").append(f->waits_at).append(";");
  }
  return message;
}

// Runs the blocks of one cluster to their end, or to an error.
void run_cluster(const Launch& l, size_t number, const std::function<void()>& body) {
  scheduler.body = &body;
  scheduler.failed = false;
  scheduler.cluster_barrier = Barrier{};
  scheduler.blocks.clear();
  scheduler.blocks.resize(l.cluster);
  launched = &l;
  for (int r = 0; r < l.cluster; ++r) prepare(l, scheduler.blocks[r], r, number * l.cluster + r);
  std::vector<Fiber*> order;
  for (Block& b : scheduler.blocks) order.insert(order.end(), b.fibers.begin(), b.fibers.end());
  const std::vector<Fiber*> all = order;
  const Options& chosen = options();
  if (chosen.order == Order::reverse) std::reverse(order.begin(), order.end());
  std::mt19937 random(chosen.seed + unsigned(number) * 7919u);
  // at random, also unfair: half of the warps, or of the cluster's blocks, rest for some rounds, most often until
  // nobody else can move; so one may run far ahead of another
  uint64_t resting = 0;
  bool blocks_rest = false, hurry = false;  // hurry: nobody moved in the last round, so all may in this one
  while (!order.empty() && !scheduler.failed) {
    if (chosen.order == Order::random) {
      std::shuffle(order.begin(), order.end(), random);
      if (hurry)
        resting = 0;
      else if (!resting || random() % 8 == 0)
        resting = random() | uint64_t(random()) << 32, blocks_rest = random() % 2;
    }
    bool moved = false, finished = false;
    for (Fiber* f : order) {
      if (resting >> (blocks_rest ? f->block->rank : f->linear / 32 + 7 * f->block->rank) % 64 & 1) continue;
      if (f->phase && *f->phase == f->seen) continue;
      if (f->condition && !(*f->condition)()) continue;
      moved = true;
      to_fiber(*f);
      finished |= f->done;
      if (scheduler.failed) break;
    }
    if (finished)
      order.erase(std::remove_if(order.begin(), order.end(), [](Fiber* f) { return f->done; }), order.end());
    hurry = !moved && resting;
    if (!moved && !hurry) {
      scheduler.failed = true;
      scheduler.failure = deadlock(all);
    }
  }
  for (Block& b : scheduler.blocks) free(b.shared), free(b.async);
  launched = nullptr;
}

std::mutex error_lock;
std::string& error_message() {
  static std::string message;
  return message;
}

}  // namespace

Options& options() {
  static Options chosen;
  return chosen;
}

void fail(const std::string& message) {
  if (!current) abort();
  throw Failure{message + " (" + where(*current) + ")"};
}

void wait_phase(const uint64_t& phase, const char* what) {
  Fiber& f = *current;
  f.phase = &phase, f.seen = phase, f.waits_at = what;
  to_scheduler();
  f.phase = nullptr;
}

void wait_until(const std::function<bool()>& condition, const char* what) {
  if (condition()) return;
  Fiber& f = *current;
  f.condition = &condition, f.waits_at = what;
  to_scheduler();
  f.condition = nullptr;
}

namespace {
Barrier& barrier_of(int id) {
  if (id < 0 || id > 15) fail("barrier " + std::to_string(id) + " does not exist: there are 16");
  return current->block->barriers[id];
}
}  // namespace

void barrier_arrive(int id, int threads) {
  if (current->barriers_unfenced) fail("mbarriers were initialised, and no fence.mbarrier_init followed");
  if (threads % 32) fail("a barrier of " + std::to_string(threads) + " threads, which is no number of warps");
  Barrier& b = barrier_of(id);
  if (b.arrived && b.expected != threads) fail("threads meet at a barrier with different numbers of threads");
  b.expected = threads;
  ++b.arrived;
  release_if_complete(b, threads ? threads : current->block->live);
}

void barrier(int id, int threads) {
  const Barrier& b = barrier_of(id);
  const uint64_t before = b.phase;
  barrier_arrive(id, threads);
  if (b.phase == before) wait_phase(b.phase, "a barrier");
}

void cluster_barrier() {
  if (current->barriers_unfenced) fail("mbarriers were initialised, and no fence.mbarrier_init followed");
  Barrier& b = scheduler.cluster_barrier;
  ++b.arrived;
  const uint64_t before = b.phase;
  release_if_complete(b, live_in_cluster());
  if (b.phase == before) wait_phase(b.phase, "a cluster barrier");
}

void* map_shared(void* shared, int rank) {
  Block& own = *current->block;
  if (rank < 0 || rank >= own.cluster_size) fail("there is no block " + std::to_string(rank) + " in the cluster");
  check_shared(shared, 1, 1, "mapa");
  Block& other = own.cluster[rank];
  if (other.live == 0) fail("distributed shared memory of a block that has exited");
  return other.shared + (static_cast<uint8_t*>(shared) - own.shared);
}

void check_shared(const void* p, int bytes, int align, const char* what) {
  const Block& b = *current->block;
  const auto* at = static_cast<const uint8_t*>(p);
  if (at < b.shared || at + bytes > b.shared + b.shared_bytes) fail(std::string(what) + " outside shared memory");
  if ((at - b.shared) % align) fail(std::string(what) + ": not aligned to " + std::to_string(align) + " bytes");
}

void meet(uint32_t mask, const void* in, void* out, const std::function<void(Warp&)>& f, const char* what) {
  Fiber& self = *current;
  Warp& w = *self.warp;
  if (!(mask >> self.lane & 1)) fail(std::string(what) + ": the mask leaves out a lane that calls it");
  if (mask & ~w.alive) fail(std::string(what) + ": the mask names a lane that has exited or never was");
  size_t i = 0;
  while (i < w.meetings.size() && w.meetings[i].mask != mask) ++i;
  if (i == w.meetings.size()) {
    w.meetings.reserve(64);  // waiting lanes hold pointers to phases
    if (i == 64) fail("more than 64 different masks in one warp");
    w.meetings.emplace_back().mask = mask;
  }
  for (const Meeting& other : w.meetings)
    if (other.arrived && (other.mask & mask) && (other.mask != mask || strcmp(other.what, what)))
      fail("lanes of one warp meet in different collectives, " + std::string(other.what) + " and " + what);
  Meeting& m = w.meetings[i];
  m.what = what;
  w.in[self.lane] = in, w.out[self.lane] = out;
  m.arrived |= 1u << self.lane;
  if (m.arrived != mask) return wait_phase(m.phase, what);
  f(w);
  m.arrived = 0;
  ++m.phase;
}

int launch(const Launch& l, const std::function<void()>& body) {
  const size_t blocks = size_t(l.grid.x) * l.grid.y * l.grid.z, threads = size_t(l.block.x) * l.block.y * l.block.z;
  std::string message;
  if (threads == 0 || threads > 1024) message = "a block of " + std::to_string(threads) + " threads";
  if (l.grid.x % l.cluster) message = "a grid that is no number of clusters";
  if (blocks == 0) message = "an empty grid";
  const size_t limit = options().architecture == 80 ? 163 << 10 : 227 << 10;
  if (l.shared_bytes > limit) message = std::to_string(l.shared_bytes) + " bytes of shared memory in a block";
  if (l.cluster > 1 && options().architecture < 90) message = "clusters before sm_90";
  if (message.empty()) {
    pyfast::parallel_for(int64_t(blocks / l.cluster), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        run_cluster(l, size_t(i), body);
        if (!scheduler.failed) continue;
        std::lock_guard<std::mutex> guard(error_lock);
        message = scheduler.failure;
        return;
      }
    });
  }
  if (message.empty()) return 0;
  error_message() = message;
  return 1;
}

const char* last_error() { return error_message().c_str(); }

namespace {
void finish(const Copy& c) {
  memcpy(c.to, c.from, c.bytes);
  memset(static_cast<char*>(c.to) + c.bytes, 0, c.size - c.bytes);
}
}  // namespace

void async_copy(void* to, const void* from, int bytes, int size) {
  check_shared(to, size, size, "cp.async");
  if (bytes < 0 || bytes > size) fail("cp.async of more bytes than its size");
  if (bytes && reinterpret_cast<uintptr_t>(from) % size) fail("cp.async: the source is not aligned to its size");
  const Copy c{to, from, bytes, size};
  if (!options().lazy) return finish(c);
  memset(to, 0xFF, size);  // in flight: what is there is garbage
  current->copies.back().push_back(c);
}

void commit_copies() { current->copies.emplace_back(); }

void wait_copies(int left) {
  auto& groups = current->copies;  // the last one is open
  while (int(groups.size()) - 1 > left) {
    for (const Copy& c : groups.front()) finish(c);
    groups.erase(groups.begin());
  }
}

}  // namespace simt
