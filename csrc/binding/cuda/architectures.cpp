// What `_cuda` holds machine code for.
#include "binding/cuda/device.h"

#if !defined(PYFAST_EMULATOR)
namespace pyfast {
namespace {

std::string architectures() { return PYFAST_ARCHITECTURES; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfast_cuda, CompositeExplicitAutograd, m) {
  m.impl("architectures", TORCH_BOX(&architectures));
}

}  // namespace pyfast
#endif
