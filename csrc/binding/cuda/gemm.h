// torch's matrix products through its C shim, below the dispatcher, so that an ambient autocast or grad mode does not
// interfere: cuBLAS for CUDA tensors, looked up at run time as OnDevice does the stream, and under the emulator the
// CPU's.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#if defined(PYFAST_EMULATOR)
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#endif

#include "binding/cuda/device.h"

namespace pyfast {

// out = a b, or out += a b; any strides
inline void matmul_out(Tensor& out, const Tensor& a, const Tensor& b, bool accumulate = false) {
#if defined(PYFAST_EMULATOR)
  const auto mm = aoti_torch_cpu_mm_out;
  const auto addmm = aoti_torch_cpu_addmm_out;
#else
  using Product = AOTITorchError (*)(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle);
  using Sum =
      AOTITorchError (*)(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, double, double);
  static const auto mm = Product(cuda_symbol("aoti_torch_cuda_mm_out"));
  static const auto addmm = Sum(cuda_symbol("aoti_torch_cuda_addmm_out"));
#endif
  TORCH_ERROR_CODE_CHECK(accumulate ? addmm(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0)
                                    : mm(out.get(), a.get(), b.get()));
}

}  // namespace pyfast
