// What the bindings of lora_linears and lora_mlp, for CPUs and for GPUs, share: their arguments, checked.
#pragma once
#include "binding/binding.h"

namespace pyfast {

using Tensors = std::vector<Tensor>;
using Optionals = std::vector<std::optional<Tensor>>;

struct Projection {
  const Tensor& weight;
  const std::optional<Tensor>&lora_A, &lora_B, &bias;
  double scaling;
  const int64_t* seed;   // where the tensors are; null where nothing is dropped
  int64_t n, r, offset;  // offset: this adapter's first column in H
};

struct Projections {
  std::vector<Projection> each;
  int64_t rank = 0, k = 0;  // rank: of all adapters together
  DType dtype;
  double dropout_p;

  // columns: of every weight but those that have none
  Projections(std::optional<int64_t> columns, const Tensors& weight, const Optionals& lora_A, const Optionals& lora_B,
              const std::vector<double>& scaling, const Optionals& bias, double dropout_p, const Optionals& seed)
      : dropout_p(dropout_p) {
    const size_t count = weight.size();
    STD_TORCH_CHECK(count > 0 && lora_A.size() == count && lora_B.size() == count && scaling.size() == count &&
                        bias.size() == count && seed.size() == count,
                    "weight, lora_A, lora_B, scaling, bias and seed differ in length, or are empty");
    STD_TORCH_CHECK(dropout_p >= 0 && dropout_p < 1, "expected 0 <= dropout_p < 1");
    dtype = dtype_of(weight[0]);
    STD_TORCH_CHECK(weight[0].dim() == 2, "weight has shape ", shape_of(weight[0]), ", expected (n, k)");
    k = columns.value_or(weight[0].size(1));
    for (size_t i = 0; i < count; ++i) {
      CHECK_SAME_DTYPE(weight[i], weight[0]);
      STD_TORCH_CHECK(weight[i].dim() == 2, "weight has shape ", shape_of(weight[i]), ", expected (n, k)");
      const int64_t n = weight[i].size(0);
      if (!(columns && weight[i].size(1) == 0)) CHECK_SHAPE(weight[i], n, k);
      STD_TORCH_CHECK(lora_A[i].has_value() == lora_B[i].has_value(), "lora_A and lora_B go together");
      int64_t r = 0;
      const int64_t* at = nullptr;
      if (lora_A[i]) {
        const Tensor &A = *lora_A[i], &B = *lora_B[i];
        STD_TORCH_CHECK(A.dim() == 2 && A.size(0) > 0, "lora_A has shape ", shape_of(A), ", expected (r, k), r > 0");
        r = A.size(0);
        CHECK_SHAPE(A, r, k);
        CHECK_SHAPE(B, n, r);
        if (dropout_p > 0) {
          STD_TORCH_CHECK(seed[i] && seed[i]->numel() == 1 && seed[i]->scalar_type() == ScalarType::Long,
                          "seed must be one int64 where dropout_p > 0");
          at = static_cast<const int64_t*>(seed[i]->const_data_ptr());
        }
      }
      if (bias[i]) CHECK_SHAPE(*bias[i], n);
      each.push_back({weight[i], lora_A[i], lora_B[i], bias[i], scaling[i], at, n, r, rank});
      rank += r;
    }
  }

  void check_input(const Tensor& x) const {
    STD_TORCH_CHECK(x.dim() == 2, "x has shape ", shape_of(x), ", expected (rows, k)");
    CHECK_SHAPE(x, x.size(0), k);
    CHECK_CONTIGUOUS(x);
    STD_TORCH_CHECK(dtype_of(x) == dtype, "x and weight differ in dtype");
  }

  // wanted: dx, then per projection dweight, dlora_A, dlora_B, dbias
  void check_gradients(const Tensors& dy, const std::optional<Tensor>& h, const std::vector<bool>& wanted) const {
    const size_t count = each.size();
    STD_TORCH_CHECK(dy.size() == count && wanted.size() == 1 + 4 * count && dy[0].dim() == 2,
                    "dy and wanted do not fit the number of weights, or dy[0] is no matrix");
    const int64_t rows = dy[0].size(0);
    if (h) {
      CHECK_SHAPE(*h, rows, rank);
      CHECK_CONTIGUOUS(h.value());
      STD_TORCH_CHECK(h->scalar_type() == ScalarType::Float, "h must be float32");
    }
    for (size_t i = 0; i < count; ++i) {
      const Projection& p = each[i];
      CHECK_SHAPE(dy[i], rows, p.n);
      CHECK_CONTIGUOUS(dy[i]);
      CHECK_SAME_DTYPE(dy[i], p.weight);
      STD_TORCH_CHECK(
          (p.r || !wanted[2 + 4 * i]) && ((p.r && h) || !wanted[3 + 4 * i]) && (p.bias || !wanted[4 + 4 * i]),
          "an input of a wanted gradient is missing");
    }
  }
};

// ---- mlp: the last projection is down, the ones before it are gate and up, or up alone

template <class T>
std::vector<T> first(const std::vector<T>& all) {
  STD_TORCH_CHECK(all.size() == 2 || all.size() == 3, "expected gate, up and down, or up and down");
  return {all.begin(), all.end() - 1};
}
template <class T>
std::vector<T> last(const std::vector<T>& all) {
  return {all.back()};
}

// What lora_mlp_backward is asked for, as its two parts are: the second one's first gradient is that of the
// activation's result, needed if anything before it is.
struct WantedOfMlp {
  std::vector<bool> first, down;
  bool below = false;

  WantedOfMlp(const Tensor& dy, const Tensors& hidden, const Tensors& weight, const Optionals& bias,
              const std::vector<bool>& wanted) {
    STD_TORCH_CHECK(!hidden.empty() && wanted.size() == 1 + 4 * weight.size() && hidden.size() + 1 == weight.size() &&
                        bias.size() == weight.size(),
                    "hidden and wanted do not fit the number of weights");
    const Tensor& up = hidden.back();
    const int64_t rows = up.size(0), columns = up.size(1);
    CHECK_SHAPE(up, dy.size(0), weight.back().size(1));
    for (const Tensor& product : hidden) {
      CHECK_CONTIGUOUS(product);
      CHECK_SAME_DTYPE(product, dy);
      CHECK_SHAPE(product, rows, columns);
    }
    first.assign(wanted.begin(), wanted.end() - 4);
    for (bool w : first) below = below || w;
    down.assign(wanted.end() - 4, wanted.end());
    down.insert(down.begin(), below);
  }
  bool activation() const { return down[1] || down[2]; }
};

}  // namespace pyfast
