#include "cpu/cross_entropy.h"

#include <cstring>

#include "binding/loss.h"
#include "cpu/parallel.h"

namespace pyfast {
namespace {

std::tuple<Tensor, Tensor, Tensor> cross_entropy_cpu(const Tensor& input, const Tensor& target,
                                                     const std::optional<Tensor>& weight,
                                                     const std::optional<Tensor>& upstream, int64_t ignore_index,
                                                     double label_smoothing, std::optional<double> softcap) {
  STD_TORCH_CHECK(input.dim() == 2 && (input.stride(1) == 1 || input.size(1) == 1), "input has shape ", shape_of(input),
                  ", expected (rows, classes) with contiguous rows");
  int64_t rows = input.size(0), classes = input.size(1);
  Loss loss(target, rows, classes, weight, upstream, ignore_index, label_smoothing, softcap);
  Tensor dinput = upstream ? new_result(input, {rows, classes}) : make_empty(input, {0});
  cross_entropy(dtype_of(input), loss.rows, input.const_data_ptr(), input.stride(0), dinput.mutable_data_ptr(),
                classes);
  if (upstream) {
    char* d = static_cast<char*>(dinput.mutable_data_ptr());
    size_t bytes = classes * size_of(dtype_of(input));
    const int64_t* y = loss.rows.target;
    parallel_for(rows, 16, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        if (y[i] == ignore_index) std::memset(d + i * bytes, 0, bytes);
    });
  }
  return {loss.loss, loss.lse, dinput};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfast_cpu, CPU, m) { m.impl("cross_entropy", TORCH_BOX(&cross_entropy_cpu)); }

}  // namespace pyfast
