// torch's matrix products on CPU through its C shim: below the dispatcher, so that an ambient autocast or grad mode
// does not interfere.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "binding/binding.h"

namespace pyfast {

// The transpose of a matrix, as a view.
inline Tensor transposed(const Tensor& m) {
  int64_t sizes[] = {m.size(1), m.size(0)}, strides[] = {m.stride(1), m.stride(0)};
  AtenTensorHandle view;  // the 0 below is added to m's own storage offset
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(m.get(), 2, sizes, strides, 0, &view));
  return Tensor(view);
}

// out = a b, or out += a b
inline void matmul_out(Tensor& out, const Tensor& a, const Tensor& b, bool accumulate = false) {
  TORCH_ERROR_CODE_CHECK(accumulate ? aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0)
                                    : aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

}  // namespace pyfast
