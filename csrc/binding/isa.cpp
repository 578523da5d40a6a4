// Which instruction set the kernels use: chosen once from the CPU, lowered by use_backend("cpu", arch=...).
#include "cpu/isa.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>

#include "binding/binding.h"

namespace pyfast {
namespace {

bool has_amx_bf16() {
#if defined(__x86_64__)
  unsigned a = 7, b, c = 0, d;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  if (!((d >> 22) & 1) || !((d >> 24) & 1)) return false;     // AMX-BF16, AMX-TILE
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // Linux gives tile state only to processes that ask
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

std::atomic<Isa>& state() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

}  // namespace

Isa best_isa() {
  static const Isa best = [] {
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx2 && avx512 && has_amx_bf16()) return Isa::amx;
    return !avx2 ? Isa::none : avx512 ? Isa::avx512 : Isa::avx2;
  }();
  return best;
}
Isa current_isa() { return state().load(std::memory_order_relaxed); }
bool set_isa(Isa isa) {
  if (isa > best_isa()) return false;
  state().store(isa, std::memory_order_relaxed);
  return true;
}

namespace {

constexpr const char* kNames[] = {"none", "avx2", "avx512", "amx"};

std::string get_isa_name() { return kNames[int(current_isa())]; }
void set_isa_name(std::string name) {
  for (int i = 1; i < 4; ++i)
    if (name == kNames[i] && set_isa(Isa(i))) return;
  STD_TORCH_CHECK(name == "best" && set_isa(best_isa()), "this CPU has no ", name, ": its best is ",
                  kNames[int(best_isa())]);
}

void set_by_dispatcher(bool on) { allocate_by_dispatcher = on; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfast_cpu, CompositeExplicitAutograd, m) {
  m.impl("get_isa", TORCH_BOX(&get_isa_name));
  m.impl("set_isa", TORCH_BOX(&set_isa_name));
  m.impl("allocate_by_dispatcher", TORCH_BOX(&set_by_dispatcher));
}

}  // namespace pyfast
