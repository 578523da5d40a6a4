#include "binding/cross_entropy.h"

#include <cstring>

#include "binding/loss.h"
#include "cpu/cross_entropy.h"
#include "cpu/parallel.h"

namespace pyfast {
namespace {

std::tuple<Tensor, Tensor, Tensor> cross_entropy_cpu(const CrossEntropyCall& c) {
  Loss loss(c.target, c.rows, c.classes, c.weight, c.upstream, c.ignore_index, c.label_smoothing, c.softcap);
  Tensor dinput = c.upstream ? new_result(c.input, {c.rows, c.classes}) : make_empty(c.input, {0});
  cross_entropy(dtype_of(c.input), loss.rows, c.input.const_data_ptr(), c.input.stride(0), dinput.mutable_data_ptr(),
                c.classes);
  if (c.upstream) {
    char* d = static_cast<char*>(dinput.mutable_data_ptr());
    const size_t bytes = c.classes * size_of(dtype_of(c.input));
    const int64_t *y = loss.rows.target, ignore_index = c.ignore_index;
    parallel_for(c.rows, 16, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        if (y[i] == ignore_index) std::memset(d + i * bytes, 0, bytes);
    });
  }
  return {loss.loss, loss.lse, dinput};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfast_cpu, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy_op<cross_entropy_cpu>));
}

}  // namespace pyfast
