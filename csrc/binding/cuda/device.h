// What the bindings of CUDA kernels share. They are compiled twice: for `_cuda`, which serves CUDA tensors, and with
// PYFAST_EMULATOR for `_emu`, which runs the same kernels on CPU tensors. No CUDA header: the kernels are plain C, and
// torch's stream is looked up where torch has CUDA, so that one build loads under every torch.
#pragma once
#include "binding/binding.h"
#include "cuda/error.h"

#if defined(PYFAST_EMULATOR)
#define PYFAST_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(pyfast_emu, CPU, m)
#else
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#define PYFAST_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(pyfast_cuda, CUDA, m)
#endif

namespace pyfast {

#if !defined(PYFAST_EMULATOR)
// A function of torch's C shim that lies in libtorch_cuda: naming it at link time would keep `_cuda` from loading where
// torch has no CUDA
inline void* cuda_symbol(const char* name) {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  void* symbol = library ? dlsym(library, name) : nullptr;
  STD_TORCH_CHECK(symbol, "this torch has no ", name, " (it needs CUDA)");
  return symbol;
}
#endif

// Makes a tensor's device the current one, and knows its current stream.
class OnDevice {
 public:
#if defined(PYFAST_EMULATOR)
  explicit OnDevice(const Tensor&) {}
  void* stream() const { return nullptr; }
#else
  explicit OnDevice(const Tensor& t) : index_(t.get_device_index()), guard_(index_) {}
  void* stream() const {
    static const auto current = (int32_t (*)(int32_t, void**))cuda_symbol("aoti_torch_get_current_cuda_stream");
    void* stream = nullptr;
    STD_TORCH_CHECK(current(index_, &stream) == 0, "torch did not tell its CUDA stream");
    return stream;
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

inline void check_launch(int code, const char* op) {
  STD_TORCH_CHECK(code == 0, op, ": the CUDA kernel failed: ", pyfast_cuda_error(code));
}

}  // namespace pyfast
