// What the losses' bindings share: checks of the targets and options, and the rows that count.
#pragma once
#include <cstring>

#include "binding/binding.h"
#include "cpu/cross_entropy.h"

namespace pyfast {

struct Loss {
  std::vector<int64_t> index;
  Tensor loss, lse;
  LossRows rows{};

  Loss(const Tensor& target, int64_t n, int64_t classes, const std::optional<Tensor>& weight,
       const std::optional<Tensor>& upstream, int64_t ignore_index, double label_smoothing,
       std::optional<double> softcap)
      : loss(make_empty(target, {n}, ScalarType::Double)), lse(make_empty(target, {n}, ScalarType::Double)) {
    CHECK_SHAPE(target, n);
    CHECK_CONTIGUOUS(target);
    STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long, "target must be int64");
    STD_TORCH_CHECK(classes > 0, "there are no classes");
    rows.classes = classes;
    rows.target = static_cast<const int64_t*>(target.const_data_ptr());
    rows.weight = weight ? values<float>(*weight, "weight", {classes}) : nullptr;
    rows.upstream = upstream ? values<double>(*upstream, "upstream", {n, 2}) : nullptr;
    rows.label_smoothing = label_smoothing;
    rows.softcap = float(softcap.value_or(0.0));
    rows.scale = 1.f;
    rows.loss = static_cast<double*>(loss.mutable_data_ptr());
    rows.lse = static_cast<double*>(lse.mutable_data_ptr());
    for (int64_t i = 0; i < n; ++i) {
      int64_t y = rows.target[i];
      if (y == ignore_index) {
        rows.loss[i] = rows.lse[i] = 0.f;
        continue;
      }
      STD_TORCH_CHECK(y >= 0 && y < classes, "target ", y, " is out of range: expected 0 to ", classes - 1,
                      ", or ignore_index ", ignore_index);
      index.push_back(i);
    }
    rows.index = index.data();
    rows.rows = int64_t(index.size());
  }
  Loss(const Loss&) = delete;

  template <class T>
  static const T* values(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
    constexpr bool fp32 = std::is_same_v<T, float>;
    check_shape(t, name, shape, fp32 ? "classes" : "rows, 2");
    STD_TORCH_CHECK(t.scalar_type() == (fp32 ? ScalarType::Float : ScalarType::Double), name, " must be ",
                    fp32 ? "fp32" : "fp64");
    STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
    return static_cast<const T*>(t.const_data_ptr());
  }
};

}  // namespace pyfast
