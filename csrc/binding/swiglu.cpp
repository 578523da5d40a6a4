#include "cpu/swiglu.h"

#include "binding/binding.h"

namespace pyfast {
namespace {

void check(const Tensor& gate, const Tensor& up) {
  CHECK_CONTIGUOUS(gate);
  CHECK_CONTIGUOUS(up);
  CHECK_SAME_DTYPE(gate, up);
  STD_TORCH_CHECK(gate.numel() == up.numel(), "gate ", shape_of(gate), " and up ", shape_of(up), " differ in shape");
}

Tensor swiglu_cpu(const Tensor& gate, const Tensor& up) {
  check(gate, up);
  Tensor y = torch::stable::empty_like(gate);
  swiglu(dtype_of(gate), gate.const_data_ptr(), up.const_data_ptr(), y.mutable_data_ptr(), gate.numel());
  return y;
}

std::tuple<Tensor, Tensor> swiglu_backward_cpu(const Tensor& dy, const Tensor& gate, const Tensor& up) {
  check(gate, up);
  check(dy, gate);
  Tensor dgate = torch::stable::empty_like(gate), dup = torch::stable::empty_like(up);
  swiglu_backward(dtype_of(gate), dy.const_data_ptr(), gate.const_data_ptr(), up.const_data_ptr(),
                  dgate.mutable_data_ptr(), dup.mutable_data_ptr(), gate.numel());
  return {dgate, dup};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfast_cpu, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu_cpu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward_cpu));
}

}  // namespace pyfast
