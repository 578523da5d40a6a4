#include "cpu/activation.h"

#include "binding/activation.h"
#include "binding/binding.h"

namespace pyfast {
namespace {

Tensor gated_cpu(const Tensor& gate, const Tensor& up, std::string activation) {
  check_like(gate, up, "up");
  RowsOf g = rows_of(gate), u = rows_of(up);
  Tensor y = new_contiguous(gate);
  gated(dtype_of(gate), activation_of(activation), g, u, contiguous_rows(y, g), g.rows, g.cols);
  return y;
}

std::tuple<Tensor, Tensor> gated_backward_cpu(const Tensor& dy, const Tensor& gate, const Tensor& up,
                                              std::string activation) {
  check_like(gate, up, "up");
  check_like(gate, dy, "dy");
  RowsOf d = rows_of(dy), g = rows_of(gate), u = rows_of(up);
  Tensor dgate = new_contiguous(gate), dup = new_contiguous(up);
  gated_backward(dtype_of(gate), activation_of(activation), d, g, u, contiguous_rows(dgate, g), contiguous_rows(dup, g),
                 g.rows, g.cols);
  return {dgate, dup};
}

void check_bias(const Tensor& x, const Tensor& bias) {
  STD_TORCH_CHECK(x.dim() > 0, "x must not be a scalar");
  CHECK_SHAPE(bias, x.size(x.dim() - 1));
}

Tensor activate_cpu(const Tensor& x, const Tensor& bias, std::string activation) {
  check_bias(x, bias);
  RowsOf r = rows_of(x);
  Tensor y = new_contiguous(x), b = to_fp32(bias);
  activate(dtype_of(x), activation_of(activation), r, (const float*)b.const_data_ptr(), contiguous_rows(y, r), r.rows,
           r.cols);
  return y;
}

std::tuple<Tensor, Tensor> activate_backward_cpu(const Tensor& dy, const Tensor& x, const Tensor& bias,
                                                 std::string activation, bool bias_gradient) {
  check_bias(x, bias);
  check_like(x, dy, "dy");
  RowsOf d = rows_of(dy), r = rows_of(x);
  Tensor dx = new_contiguous(x), b = to_fp32(bias);
  Tensor dbias = make_empty(bias, {bias_gradient ? r.cols : 0});
  Tensor partial = new_fp32(x, {bias_gradient ? row_blocks(r.rows) : 0, r.cols});
  activate_backward(dtype_of(x), activation_of(activation), d, r, (const float*)b.const_data_ptr(),
                    contiguous_rows(dx, r), {nullptr, 0}, (float*)partial.mutable_data_ptr(), dtype_of(bias),
                    bias_gradient ? dbias.mutable_data_ptr() : nullptr, r.rows, r.cols);
  return {dx, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfast_cpu, CPU, m) {
  m.impl("gated", TORCH_BOX(&gated_cpu));
  m.impl("gated_backward", TORCH_BOX(&gated_backward_cpu));
  m.impl("activate", TORCH_BOX(&activate_cpu));
  m.impl("activate_backward", TORCH_BOX(&activate_backward_cpu));
}

}  // namespace pyfast
