// Runs CUDA kernels on a CPU, for tests: every CUDA thread is a fiber, the blocks of a cluster share one OS thread, and
// clusters are spread over torch's threads. Fibers switch only where a thread waits: at barriers, warp collectives and
// asynchronous copies. The order in which they run is chosen by Options, and an error of the kernel's (a deadlock, a
// wrong mask, a misaligned address) ends the launch and comes back as a message.
//
// Not modelled: time, bank conflicts, the weak memory order of a GPU, and single instructions of a warp in lockstep
// (between two collectives a lane runs alone, as independent thread scheduling allows).
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

namespace simt {

struct Index {
  unsigned x, y, z;
};

enum class Order : int { forward, reverse, random };
struct Options {
  Order order = Order::forward;
  unsigned seed = 1;  // of the random order
  bool lazy = true;   // asynchronous copies and products happen as late as the kernel's waits allow, else at once
  int architecture = 80;
};
Options& options();

struct Block;

// A copy to shared memory in flight: `bytes` from `from`, then zeros up to `size`
struct Copy {
  void* to;
  const void* from;
  int bytes, size;
};

// A tile on its way to shared memory by TMA: what remains to be done, and the mbarrier that waits for it
struct Transfer {
  const void* barrier;
  std::function<void()> finish;
};

// A collective of some of a warp's lanes that not all have reached yet
struct Meeting {
  uint32_t mask = 0, arrived = 0;
  uint64_t phase = 0;
  const char* what = "";
};
struct Warp {
  const void* in[32];
  void* out[32];
  uint32_t alive = 0;
  int registers = 0;      // of a thread
  uint64_t products = 0;  // a hash of the descriptors of its wgmmas
  std::vector<Meeting> meetings;
};
struct Barrier {
  int arrived = 0, expected = 0;
  uint64_t phase = 0;
};

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* sanitizer = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  Index thread{};
  int linear = 0, lane = 0;
  bool done = false;
  const char* waits_at = "";
  const uint64_t* phase = nullptr;  // waits until *phase differs from seen,
  uint64_t seen = 0;
  const std::function<bool()>* condition = nullptr;          // or until this holds
  std::vector<std::vector<Copy>> copies;                     // cp.async groups, the last one open
  std::vector<std::vector<std::function<void()>>> deferred;  // wgmma groups, likewise
  std::vector<std::vector<std::function<void()>>> stores;    // TMA's, likewise
  uint64_t products = 0;                                     // a hash of the descriptors in its open group of wgmmas
  bool registers_fenced = false;                             // for wgmma, since it last waited for products
  bool barriers_unfenced = false;                            // it has initialised mbarriers that others may not see yet
};

struct Block {
  Index index{};
  std::vector<Fiber*> fibers;
  std::vector<Warp> warps;
  Barrier barriers[16];
  Barrier* cluster_barrier = nullptr;
  uint8_t* shared = nullptr;
  uint8_t* async = nullptr;  // what TMA and wgmma see of it: what was written there reaches them by fence.proxy.async
  size_t shared_bytes = 0;
  int live = 0, rank = 0;
  int spare_registers = 0;   // given back by warps, or, below 0, still to be given to them
  Block* cluster = nullptr;  // the first of the cluster's blocks
  int cluster_size = 1;
  std::vector<Transfer> transfers;
};

struct Launch {
  Index grid, block;
  size_t shared_bytes = 0;
  int cluster = 1;  // blocks along x that run together
};

extern thread_local Fiber* current;
extern thread_local const Launch* launched;

// Ends the launch with this message; does not return.
[[noreturn]] void fail(const std::string& message);

void wait_phase(const uint64_t& phase, const char* what);
void wait_until(const std::function<bool()>& condition, const char* what);
void barrier(int id, int threads);         // threads 0: all that have not exited
void barrier_arrive(int id, int threads);  // does not wait
void cluster_barrier();
void* map_shared(void* shared, int rank);  // the same place in another block of the cluster
void check_shared(const void* p, int bytes, int align, const char* what);  // within this block's shared memory

// A warp collective: every lane of `mask` brings `in`; when the last has come, f(inputs, outputs, mask) runs once, with
// an entry per lane.
void meet(uint32_t mask, const void* in, void* out, const std::function<void(Warp&)>& f, const char* what);
template <class In, class Out, class F>
Out collective(uint32_t mask, const In& in, F f, const char* what) {
  Out out;
  const std::function<void(Warp&)> run = [&](Warp& w) {
    f([&](int lane) -> const In& { return *static_cast<const In*>(w.in[lane]); },
      [&](int lane) -> Out& { return *static_cast<Out*>(w.out[lane]); });
  };
  meet(mask, &in, &out, run, what);
  return out;
}

// Runs the kernel's body once per thread. Returns 0, or 1 with the message in last_error().
int launch(const Launch& launch, const std::function<void()>& body);
const char* last_error();

// ---- cp.async
void async_copy(void* to, const void* from, int bytes, int size);
void commit_copies();
void wait_copies(int left);  // until at most so many groups are in flight

}  // namespace simt
