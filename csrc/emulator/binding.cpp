// How the emulator runs kernels, for tests: torch.ops.pyfast_emu.emulate.
#include "binding/binding.h"

#include "emulator/simt.h"

namespace pyfast {
namespace {

// pyfast/emulator.py checks the names
void emulate(std::string order, int64_t seed, bool lazy, std::string arch) {
  const auto chosen = order == "forward"   ? simt::Order::forward
                      : order == "reverse" ? simt::Order::reverse
                                           : simt::Order::random;
  simt::options() = {chosen, unsigned(seed), lazy, arch == "sm_80" ? 80 : 90};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfast_emu, CompositeExplicitAutograd, m) { m.impl("emulate", TORCH_BOX(&emulate)); }

}  // namespace pyfast
