// How the emulator runs kernels, for tests: torch.ops.pyfast_cuda.emulate.
#include "binding/binding.h"

#include "emulator/simt.h"

namespace pyfast {
namespace {

void emulate(std::string order, int64_t seed, bool lazy, std::string arch) {
  simt::Options& o = simt::options();
  const char* const orders[] = {"forward", "reverse", "random"};
  int found = -1;
  for (int i = 0; i < 3; ++i)
    if (order == orders[i]) found = i;
  STD_TORCH_CHECK(found >= 0, "order is ", order, ", expected forward, reverse or random");
  STD_TORCH_CHECK(arch == "sm_80" || arch == "sm_90a", "arch is ", arch, ", expected sm_80 or sm_90a");
  o = {simt::Order(found), unsigned(seed), lazy, arch == "sm_80" ? 80 : 90};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfast_cuda, CompositeExplicitAutograd, m) { m.impl("emulate", TORCH_BOX(&emulate)); }

}  // namespace pyfast
