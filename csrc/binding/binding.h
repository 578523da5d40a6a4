// What every binding needs: torch's stable ABI, checks that print shapes by name, and dtype conversion.
// Python (pyfast/ops/<op>.py) has already refused bad input with a ValueError; these checks keep a direct call through
// torch.ops.pyfast_* from reading out of bounds.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "binding/blocks.h"
#include "common/huge_pages.h"
#include "common/types.h"
#include "cpu/rows.h"

namespace pyfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& t) {
  std::string s = "(";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + ")";
}

// CHECK_SHAPE(x, rows, k): x has exactly these sizes; the message prints the shape and the names
#define CHECK_SHAPE(tensor, ...) ::pyfast::check_shape(tensor, #tensor, {__VA_ARGS__}, #__VA_ARGS__)
inline void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> expected, const char* names) {
  bool same = t.dim() == int64_t(expected.size());
  int64_t i = 0;
  for (int64_t e : expected) same = same && t.size(i++) == e;
  STD_TORCH_CHECK(same, name, " has shape ", shape_of(t), ", expected (", names, ")");
}

// other has x's shape and dtype
inline void check_like(const Tensor& x, const Tensor& other, const char* name) {
  bool same = x.dim() == other.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = x.size(i) == other.size(i);
  STD_TORCH_CHECK(same, name, " has shape ", shape_of(other), ", expected ", shape_of(x));
  STD_TORCH_CHECK(x.scalar_type() == other.scalar_type(), name, " differs in dtype from the tensor beside it");
}

#define CHECK_CONTIGUOUS(tensor) STD_TORCH_CHECK(tensor.is_contiguous(), #tensor, " must be contiguous")

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::fp32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::fp16;
    default:
      STD_TORCH_CHECK(false, "pyfast kernels serve float32, bfloat16 and float16 tensors only");
  }
  return DType::fp32;
}

// For tests: make_empty goes through torch's dispatcher, which fills new memory with NaN where it is told to.
#if defined(PYFAST_EMULATOR)
constexpr bool allocate_by_dispatcher = true;
#else
inline bool allocate_by_dispatcher = false;
#endif

// A contiguous tensor on like's device, not written yet. By the C shim: torch::stable::new_empty looks its operator up
// by name, which costs a microsecond a call.
inline Tensor make_empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                         std::optional<ScalarType> dtype = std::nullopt) {
  if (allocate_by_dispatcher) return torch::stable::new_empty(like, sizes, dtype);
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  int32_t device, type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  if (dtype) {
    type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &type));
  }
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), type, device,
                                                  like.get_device_index(), &made));
  return Tensor(made);
}

// A kernel's optional parameter of this element type and shape, contiguous; null where it is not given
template <class T>
const T* optional_values(const std::optional<Tensor>& t, ScalarType type, const char* name,
                         std::initializer_list<int64_t> shape, const char* names) {
  if (!t) return nullptr;
  check_shape(*t, name, shape, names);
  STD_TORCH_CHECK(t->scalar_type() == type && t->is_contiguous(), name, " has another dtype, or is not contiguous");
  return static_cast<const T*>(t->const_data_ptr());
}

// A tensor (..., n) as rows of n contiguous elements one stride apart; copied only where it is not.
struct RowsOf {
  Tensor tensor;
  int64_t rows, cols, stride;
  operator Rows() const { return {tensor.const_data_ptr(), stride}; }
};
inline RowsOf rows_of(const Tensor& t) {
  int64_t last = t.dim() - 1, cols = last < 0 ? 1 : t.size(last), stride = cols;
  int64_t rows = cols ? t.numel() / cols : 0;
  if (t.is_contiguous()) return {t, rows, cols, cols};
  bool regular = cols == 1 || t.stride(last) == 1, found = false;
  int64_t expected = 0;
  for (int64_t i = last - 1; i >= 0 && regular; --i) {
    if (t.size(i) == 1) continue;
    if (!found) stride = expected = t.stride(i);
    regular = t.stride(i) == expected;
    found = true;
    expected *= t.size(i);
  }
  if (regular) return {t, rows, cols, stride};
  return {torch::stable::contiguous(t), rows, cols, cols};
}
// `small`, not written yet, where it is small; otherwise a tensor like it in a block of memory that is kept between
// calls.
inline Tensor in_kept_memory(Tensor small) {
  size_t bytes = size_t(small.numel()) * small.element_size();
  if (bytes < kLargeBytes) {
    ask_huge_pages(small.mutable_data_ptr(), bytes);
    return small;
  }
  void* block = take_block(bytes);
  STD_TORCH_CHECK(block, "there is no memory for a result of ", bytes, " bytes");
  return torch::stable::from_blob(block, small.sizes(), small.strides(), small.device(), small.scalar_type(),
                                  [bytes](void* p) { give_back_block(p, bytes); });
}
// For every result that may be large
inline Tensor new_result(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  return in_kept_memory(make_empty(like, sizes));
}
inline Tensor new_contiguous(const Tensor& like) { return new_result(like, like.sizes()); }
inline MutableRows contiguous_rows(Tensor& t, const RowsOf& like) { return {t.mutable_data_ptr(), like.cols}; }

// A parameter as contiguous fp32 values plus `offset`: norm weights and biases, which may be fp32 beside bf16 inputs.
inline Tensor to_fp32(const Tensor& parameter, float offset = 0.f) {
  Tensor p = torch::stable::contiguous(parameter);
  if (p.scalar_type() == ScalarType::Float && offset == 0.f) return p;
  Tensor wide = make_empty(p, p.sizes(), ScalarType::Float);
  widen(dtype_of(p), p.const_data_ptr(), offset, (float*)wide.mutable_data_ptr(), p.numel());
  return wide;
}
inline Tensor new_fp32(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return make_empty(like, {sizes.begin(), sizes.size()}, ScalarType::Float);
}

#define CHECK_SAME_DTYPE(a, b) STD_TORCH_CHECK((a).scalar_type() == (b).scalar_type(), #a " and " #b " differ in dtype")

}  // namespace pyfast
