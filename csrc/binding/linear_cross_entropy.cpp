// The head and its loss, chunk by chunk over the rows that count:
//   logits = x Wᵀ (+ scaling · (x Aᵀ) Bᵀ) -> loss, and the logits' gradient d in their place -> dx = d W (+ ...), dW +=
//   dᵀ x
// One buffer holds a chunk's logits, whatever the number of rows. (A frozen bf16 head on AMX needs none:
// cpu/linear_cross_entropy.cpp.) The matrix products are PyTorch's own, called below
// its dispatcher, where autocast and autograd cannot interfere.
#include "cpu/linear_cross_entropy.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <array>

#include "binding/loss.h"

namespace pyfast {
namespace {

// From so many rows on, a sweep that packs the weight once beats products that pack it for each chunk
// (benchmarks/NOTES.md).
constexpr int64_t kSweptRows = 512;
constexpr int64_t kSliceBytes = 8 << 20;  // of a product that is added to an fp32 sum

void mm(Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}
// out = c + alpha a b; c may be out, or a vector that is added to every row
void mm_add(Tensor& out, const Tensor& c, const Tensor& a, const Tensor& b, double alpha = 1.0) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), c.get(), a.get(), b.get(), 1.0, alpha));
}

// Rows [begin, begin + rows) and their transpose, as plain views: no autograd, no dispatch.
Tensor view(const Tensor& t, int64_t begin, int64_t rows, bool transposed = false) {
  char* data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
  std::array<int64_t, 2> size{rows, t.size(1)}, stride{t.stride(0), t.stride(1)};
  if (transposed) {
    std::swap(size[0], size[1]);
    std::swap(stride[0], stride[1]);
  }
  return torch::stable::from_blob(data + begin * t.stride(0) * size_of(dtype_of(t)), size, stride, t.device(),
                                  t.scalar_type());
}
Tensor transpose(const Tensor& t) { return view(t, 0, t.size(0), true); }

// sum (n, k) += scale · aᵀ b for a (rows, n) and b (rows, k), in fp32: products in 16 bits go through a small buffer.
void add_product(Tensor& sum, const Tensor& a, const Tensor& b, float scale) {
  Tensor a_t = transpose(a);
  if (dtype_of(a) == DType::fp32) return mm_add(sum, sum, a_t, b, scale);
  int64_t n = sum.size(0), k = sum.size(1),
          step = std::clamp<int64_t>(kSliceBytes / (2 * k), 64, std::max<int64_t>(n, 64));
  Tensor buffer = make_empty(a, {std::min(step, n), k});
  float* out = static_cast<float*>(sum.mutable_data_ptr());
  for (int64_t begin = 0; begin < n; begin += step) {
    int64_t rows = std::min(step, n - begin);
    Tensor product = view(buffer, 0, rows);
    mm(product, view(a_t, begin, rows), b);
    add_scaled(dtype_of(a), product.const_data_ptr(), scale, out + begin * k, rows * k);
  }
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients linear_cross_entropy_cpu(const Tensor& input, const Tensor& linear_weight,
                                   const std::optional<Tensor>& linear_bias, const std::optional<Tensor>& lora_A,
                                   const std::optional<Tensor>& lora_B, const Tensor& target,
                                   const std::optional<Tensor>& weight, const std::optional<Tensor>& upstream,
                                   double scaling, int64_t ignore_index, double label_smoothing,
                                   std::optional<double> softcap, double logit_scale, int64_t logits_bytes,
                                   std::vector<bool> needs) {
  STD_TORCH_CHECK(input.dim() == 2 && linear_weight.dim() == 2, "input and linear_weight must have two dimensions");
  int64_t n = input.size(0), features = input.size(1), classes = linear_weight.size(0);
  CHECK_CONTIGUOUS(input);
  CHECK_SHAPE(linear_weight, classes, features);
  CHECK_SAME_DTYPE(linear_weight, input);
  if (linear_bias) {
    CHECK_SHAPE((*linear_bias), classes);
    CHECK_SAME_DTYPE((*linear_bias), input);
  }
  STD_TORCH_CHECK(lora_A.has_value() == lora_B.has_value(), "lora_A and lora_B go together");
  int64_t rank = lora_A ? lora_A->size(0) : 0;
  if (lora_A) {
    CHECK_SHAPE((*lora_A), rank, features);
    CHECK_SHAPE((*lora_B), classes, rank);
    CHECK_SAME_DTYPE((*lora_A), input);
    CHECK_SAME_DTYPE((*lora_B), input);
  }
  STD_TORCH_CHECK(needs.size() == 5,
                  "needs has one entry for each of input, linear_weight, linear_bias, lora_A, lora_B");
  Loss loss(target, n, classes, weight, upstream, ignore_index, label_smoothing, softcap);
  loss.rows.scale = float(logit_scale);
  loss.rows.gathered = true;

  auto gradient = [&](int i, const std::optional<Tensor>& like) {
    bool needed = upstream && like && needs[i];
    if (!needed) return make_empty(input, {0}, i ? ScalarType::Float : input.scalar_type());
    Tensor g = make_empty(input, like->sizes(), i ? ScalarType::Float : input.scalar_type());
    return torch::stable::zero_(g);
  };
  Tensor dinput = gradient(0, input), dweight = gradient(1, linear_weight), dbias = gradient(2, linear_bias);
  Tensor dA = gradient(3, lora_A), dB = gradient(4, lora_B);
  Gradients results{loss.loss, loss.lse, dinput, dweight, dbias, dA, dB};

  DType t = dtype_of(input);
  int64_t counted = loss.rows.rows, row_bytes = features * size_of(t);
  if (counted == 0) return results;
  bool frozen = dinput.numel() && !dweight.numel() && !dbias.numel() && !rank && !linear_bias;
  if (current_isa() == Isa::amx && t == DType::bf16 && frozen && counted >= kSweptRows && label_smoothing == 0.0 &&
      features % 32 == 0 && linear_weight.stride(1) == 1 && linear_weight.stride(0) % 2 == 0) {
    avx512::frozen_linear_cross_entropy(loss.rows, input.const_data_ptr(), linear_weight.const_data_ptr(), features,
                                        linear_weight.stride(0), dinput.mutable_data_ptr());
    return results;
  }
  int64_t chunk = std::clamp<int64_t>(logits_bytes / (classes * size_of(t)), 16, std::max<int64_t>(counted, 16));
  chunk = (counted + (counted + chunk - 1) / chunk - 1) / ((counted + chunk - 1) / chunk);  // chunks of equal length

  Tensor logits_buffer = make_empty(input, {chunk, classes});
  Tensor x_buffer = make_empty(input, {counted == n ? 0 : chunk, features});
  Tensor dx_buffer = make_empty(input, {counted == n || !dinput.numel() ? 0 : chunk, features});
  Tensor h_buffer = make_empty(input, {rank ? chunk : 0, rank});
  Tensor dh_buffer = make_empty(input, {rank ? chunk : 0, rank});
  Tensor weight_t = transpose(linear_weight);

  const LossRows all = loss.rows;
  for (int64_t begin = 0; begin < counted; begin += chunk) {
    LossRows r = all;
    r.rows = std::min(chunk, counted - begin);
    r.index = all.index + begin;
    bool whole = counted == n;
    Tensor x = whole ? view(input, begin, r.rows) : view(x_buffer, 0, r.rows);
    if (!whole) gather_rows(input.const_data_ptr(), r.index, r.rows, row_bytes, x.mutable_data_ptr());
    Tensor logits = view(logits_buffer, 0, r.rows), h = view(h_buffer, 0, rank ? r.rows : 0);
    if (linear_bias)
      mm_add(logits, *linear_bias, x, weight_t);
    else
      mm(logits, x, weight_t);
    if (rank) {
      mm(h, x, transpose(*lora_A));
      mm_add(logits, logits, h, transpose(*lora_B), scaling);
    }
    cross_entropy(t, r, logits.const_data_ptr(), classes, logits.mutable_data_ptr(), classes);
    if (!upstream) continue;

    const Tensor& d = logits;  // the kernel left the gradient in their place
    Tensor dh = view(dh_buffer, 0, rank ? r.rows : 0);
    if (rank && (dinput.numel() || dA.numel())) mm(dh, d, *lora_B);
    if (dinput.numel()) {
      Tensor dx = whole ? view(dinput, begin, r.rows) : view(dx_buffer, 0, r.rows);
      mm(dx, d, linear_weight);
      if (rank) mm_add(dx, dx, dh, *lora_A, scaling);
      if (!whole) scatter_rows(dx.const_data_ptr(), r.index, r.rows, row_bytes, dinput.mutable_data_ptr());
    }
    if (dweight.numel()) add_product(dweight, d, x, 1.f);
    if (dbias.numel())
      add_column_sums(t, d.const_data_ptr(), r.rows, classes, static_cast<float*>(dbias.mutable_data_ptr()));
    if (dA.numel()) add_product(dA, dh, x, float(scaling));
    if (dB.numel()) add_product(dB, d, h, float(scaling));
  }
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfast_cpu, CPU, m) { m.impl("linear_cross_entropy", TORCH_BOX(&linear_cross_entropy_cpu)); }

}  // namespace pyfast
