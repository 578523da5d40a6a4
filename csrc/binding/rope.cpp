#include "cpu/rope.h"

#include "binding/binding.h"

namespace pyfast {
namespace {

Tensor rope_cpu(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved, bool inverse) {
  STD_TORCH_CHECK(x.dim() == 4 && cos.dim() == 3, "x ", shape_of(x), " must be (batch, heads, seq, dim) and cos ",
                  shape_of(cos), " (batch, seq, width)");
  int64_t batch = x.size(0), heads = x.size(1), seq = x.size(2), dim = x.size(3), width = cos.size(2);
  int64_t cos_batch = cos.size(0) == 1 ? 1 : batch;
  CHECK_SHAPE(cos, cos_batch, seq, width);
  check_like(cos, sin, "sin");
  STD_TORCH_CHECK(width % 2 == 0 && width <= dim, "cos is ", width, " wide, expected an even width of at most ", dim);
  STD_TORCH_CHECK(cos.scalar_type() == ScalarType::Float || cos.scalar_type() == x.scalar_type(),
                  "cos must be fp32 or in x's dtype");
  Tensor in = x.stride(3) == 1 ? x : torch::stable::contiguous(x), c = torch::stable::contiguous(cos),
         s = torch::stable::contiguous(sin);
  Tensor y = in_kept_memory(torch::stable::empty_like(x));  // keeps the order of x's dimensions in memory
  if (y.stride(3) != 1) y = new_contiguous(x);
  RopeShape shape{batch,
                  heads,
                  seq,
                  dim,
                  width,
                  {in.stride(0), in.stride(1), in.stride(2)},
                  {y.stride(0), y.stride(1), y.stride(2)},
                  cos_batch == 1 ? 0 : seq * width,
                  interleaved,
                  inverse};
  rope(dtype_of(x), dtype_of(cos), shape, in.const_data_ptr(), c.const_data_ptr(), s.const_data_ptr(),
       y.mutable_data_ptr());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfast_cpu, CPU, m) { m.impl("rope", TORCH_BOX(&rope_cpu)); }

}  // namespace pyfast
