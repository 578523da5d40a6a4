// lora_linears: the frozen products by csrc/cpu/linear.cpp, with the low-rank terms that are added to them, or by
// torch's GEMM; everything else of low rank by csrc/cpu/lora.cpp.
//   forward    H = dropout(x) A^T for all projections side by side, y = x W^T + s H B^T + bias
//   backward   dH = dy (s B), dx = sum dy W + dropout'(dH A), dA = dH^T dropout(x), dB = s dy^T H
// lora_mlp: the same twice, with an activation between, whose result is computed again in the backward.
#include "cpu/lora.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "binding/activation.h"
#include "binding/binding.h"
#include "binding/gemm.h"
#include "binding/lora.h"
#include "cpu/activation.h"
#include "cpu/linear.h"
#include "cpu/rows.h"

namespace pyfast {
namespace {

Matrix matrix(const Tensor& t, bool transpose = false) {
  int64_t rows = t.size(0), columns = t.size(1), row_stride = t.stride(0), column_stride = t.stride(1);
  if (transpose) std::swap(rows, columns), std::swap(row_stride, column_stride);
  return {dtype_of(t), t.mutable_data_ptr(), rows, columns, row_stride, column_stride};
}

// fp32 scratch of rows x padded(columns), zero beyond the columns
struct Panel {
  int64_t ld;
  std::unique_ptr<float, decltype(&std::free)> storage;
  float* data;

  Panel(int64_t rows, int64_t columns)
      : ld(padded(columns)),
        storage(static_cast<float*>(std::aligned_alloc(64, (rows * ld + kSlack) * sizeof(float))), &std::free),
        data(storage.get()) {
    if (!data) throw std::bad_alloc();
    std::fill_n(data, rows * ld + kSlack, 0.f);
  }
};

// x w, or x wᵀ, as a term of cpu/linear.h, where that serves such a product.
std::optional<LinearTerm> linear_term(const Tensor& x, const Tensor& w, bool transpose) {
  const int64_t depth = w.size(transpose), along = w.stride(transpose), across = w.stride(!transpose);
  if (along != 1 && across != 1) return {};
  const int64_t ldw = across == 1 ? along : across;
  if (!serves_linear(dtype_of(x), x.size(0), depth, ldw)) return {};
  return LinearTerm{x.const_data_ptr(), w.const_data_ptr(), depth, ldw, across != 1};
}

DropoutArgs dropout_of(const Projections& projections, const Projection& p) {
  return p.seed ? DropoutArgs{projections.dropout_p, uint64_t(*p.seed)} : DropoutArgs{0, 0};
}
bool any_dropout(const Projections& projections) {
  for (const Projection& p : projections.each)
    if (p.seed) return true;
  return false;
}

// out[i, :] = dropout(x)[i, :] panel, for one adapter's columns of the panel or, without dropout, for all at once
void add_down(const Tensor& x, const Projections& projections, const Panel& panel, float* h) {
  const int64_t rows = x.size(0), k = x.size(1), rank = projections.rank;
  const auto down = [&](DropoutArgs dropout, int64_t offset, int64_t r) {
    lora_down(dtype_of(x), x.const_data_ptr(), rows, k, dropout, panel.data + offset, panel.ld, r, h + offset, rank);
  };
  if (!any_dropout(projections)) return down({0, 0}, 0, rank);
  for (const Projection& p : projections.each)
    if (p.r) down(dropout_of(projections, p), p.offset, p.r);
}

std::tuple<Tensors, Tensor> lora_linears_cpu(const Tensor& x, Tensors weight, Optionals lora_A, Optionals lora_B,
                                             std::vector<double> scaling, Optionals bias, double dropout_p,
                                             Optionals seed) {
  const Projections projections({}, weight, lora_A, lora_B, scaling, bias, dropout_p, seed);
  projections.check_input(x);
  const int64_t rows = x.size(0), k = x.size(1), rank = projections.rank;
  Tensor h = torch::stable::new_empty(x, {rows, rank}, ScalarType::Float);
  float* h_data = static_cast<float*>(h.mutable_data_ptr());
  if (rank) {
    Panel a(k, rank);
    for (const Projection& p : projections.each)
      if (p.r) lora_pack(matrix(*p.lora_A, true), 1.f, a.data + p.offset, a.ld);
    add_down(x, projections, a, h_data);
  }
  Tensors results;
  for (const Projection& p : projections.each) {
    Tensor y = new_result(x, {rows, p.n});
    Panel b(p.r + 1, p.n);  // s B^T, and the bias as its last row
    if (p.r) lora_pack(matrix(*p.lora_B, true), float(p.scaling), b.data, b.ld);
    float* bias = p.bias ? b.data + p.r * b.ld : nullptr;
    if (bias) lora_pack({dtype_of(*p.bias), p.bias->mutable_data_ptr(), 1, p.n, 0, p.bias->stride(0)}, 1.f, bias, b.ld);
    if (const auto term = linear_term(x, p.weight, true)) {
      linear(projections.dtype, &*term, 1, rows, p.n, h_data + p.offset, rank, p.r, b.data, bias, false,
             y.mutable_data_ptr());
    } else {
      const bool update = p.r || bias;
      if (update)
        lora_up(dtype_of(y), y.mutable_data_ptr(), rows, p.n, {0, 0}, h_data + p.offset, rank, p.r, b.data, bias,
                false);
      matmul_out(y, x, transposed(p.weight), update);
    }
    results.push_back(y);
  }
  return {results, h};
}

// wanted: dx, then per projection dweight, dlora_A, dlora_B, dbias; the result has those that are wanted, in that order
// (x is needed for dweight and dlora_A, h for dlora_B). after_dx(dx, x) is called as soon as dx is known; it may set x.
template <class F>
Tensors linears_backward(Tensors dy, std::optional<Tensor> x, std::optional<Tensor> h, Tensors weight, Optionals lora_A,
                         Optionals lora_B, std::vector<double> scaling, Optionals bias, double dropout_p,
                         Optionals seed, std::vector<bool> wanted, const F& after_dx) {
  const Projections projections({}, weight, lora_A, lora_B, scaling, bias, dropout_p, seed);
  projections.check_gradients(dy, h, wanted);
  const Tensor& like = weight[0];
  const int64_t rows = dy[0].size(0), k = projections.k, rank = projections.rank;
  const DType t = projections.dtype;
  const float* h_data = h ? static_cast<const float*>(h->const_data_ptr()) : nullptr;
  const auto want = [&](size_t i, int which) { return bool(wanted[1 + 4 * i + which]); };

  bool want_dh = wanted[0], want_x = false;
  for (size_t i = 0; i < projections.each.size(); ++i) {
    want_dh = want_dh || want(i, 1);
    want_x = want_x || want(i, 0) || want(i, 1);
  }
  Tensor dh = torch::stable::new_empty(like, {rows, want_dh ? rank : 0}, ScalarType::Float);
  float* dh_data = static_cast<float*>(dh.mutable_data_ptr());
  if (want_dh) {
    for (size_t i = 0; i < projections.each.size(); ++i) {
      const Projection& p = projections.each[i];
      if (!p.r) continue;
      Panel b(p.n, p.r);
      lora_pack(matrix(*p.lora_B), float(p.scaling), b.data, b.ld);
      lora_down(t, dy[i].const_data_ptr(), rows, p.n, {0, 0}, b.data, b.ld, p.r, dh_data + p.offset, rank);
    }
  }

  Tensors results;
  if (wanted[0]) {
    Tensor dx = new_result(like, {rows, k});
    std::vector<LinearTerm> terms;
    for (size_t i = 0; i < projections.each.size(); ++i)
      if (const auto term = linear_term(dy[i], projections.each[i].weight, false)) terms.push_back(*term);
    const bool together = terms.size() == projections.each.size();  // all products, and dH A without dropout
    bool written = false;
    Panel a(rank, k);
    for (const Projection& p : projections.each)
      if (p.r) lora_pack(matrix(*p.lora_A), 1.f, a.data + p.offset * a.ld, a.ld);
    const auto up = [&](DropoutArgs dropout, int64_t offset, int64_t r) {
      lora_up(t, dx.mutable_data_ptr(), rows, k, dropout, dh_data + offset, rank, r, a.data + offset * a.ld, nullptr,
              written);
      written = true;
    };
    if (rank && !any_dropout(projections) && !together) up({0, 0}, 0, rank);
    for (const Projection& p : projections.each)
      if (p.r && p.seed) up(dropout_of(projections, p), p.offset, p.r);
    if (together) {
      linear(t, terms.data(), terms.size(), rows, k, dh_data, rank, any_dropout(projections) ? 0 : rank, a.data,
             nullptr, written, dx.mutable_data_ptr());
    } else {
      for (size_t i = 0; i < projections.each.size(); ++i) {
        matmul_out(dx, dy[i], projections.each[i].weight, written);
        written = true;
      }
    }
    after_dx(dx, x);
    results.push_back(dx);
  }
  STD_TORCH_CHECK(x || !want_x, "an input of a wanted gradient is missing");
  if (want_x) {
    projections.check_input(*x);
    CHECK_SHAPE(*x, rows, k);
  }

  bool want_dA = false;
  for (size_t i = 0; i < projections.each.size(); ++i) want_dA = want_dA || want(i, 1);
  Panel da(want_dA ? rank : 0, k);
  if (want_dA) {
    const auto outer = [&](DropoutArgs dropout, int64_t offset, int64_t r) {
      lora_outer(t, x->const_data_ptr(), rows, k, dropout, dh_data + offset, rank, r, da.data + offset * da.ld,
                 nullptr);
    };
    if (!any_dropout(projections)) outer({0, 0}, 0, rank);
    for (const Projection& p : projections.each)
      if (p.r && p.seed) outer(dropout_of(projections, p), p.offset, p.r);
  }

  for (size_t i = 0; i < projections.each.size(); ++i) {
    const Projection& p = projections.each[i];
    if (want(i, 0)) {
      Tensor dweight = new_result(like, {p.n, k});
      matmul_out(dweight, transposed(dy[i]), *x);
      results.push_back(dweight);
    }
    if (want(i, 1)) {
      Tensor dA = torch::stable::new_empty(*p.lora_A, {p.r, k});
      lora_unpack(da.data + p.offset * da.ld, da.ld, 1.f, matrix(dA));
      results.push_back(dA);
    }
    if (want(i, 3) && !want(i, 2)) {  // no dB whose pass over dy it could share
      Tensor partial = new_fp32(like, {row_blocks(rows), p.n}), dbias = torch::stable::new_empty(*p.bias, {p.n});
      float* lines = (float*)partial.mutable_data_ptr();
      sum_rows(t, dy[i].const_data_ptr(), rows, p.n, lines);
      sum_blocks(lines, row_blocks(rows), p.n, dtype_of(dbias), dbias.mutable_data_ptr());
      results.push_back(dbias);
    } else if (want(i, 2)) {
      Panel db(p.r + 1, p.n);
      lora_outer(t, dy[i].const_data_ptr(), rows, p.n, {0, 0}, h_data + p.offset, rank, p.r, db.data,
                 want(i, 3) ? db.data + p.r * db.ld : nullptr);
      Tensor dB = torch::stable::new_empty(*p.lora_B, {p.n, p.r});
      lora_unpack(db.data, db.ld, float(p.scaling), matrix(dB, true));
      results.push_back(dB);
      if (want(i, 3)) {
        Tensor dbias = torch::stable::new_empty(*p.bias, {p.n});
        lora_unpack(db.data + p.r * db.ld, db.ld, 1.f, {dtype_of(dbias), dbias.mutable_data_ptr(), 1, p.n, 0, 1});
        results.push_back(dbias);
      }
    }
  }
  return results;
}

Tensors lora_linears_backward_cpu(Tensors dy, std::optional<Tensor> x, std::optional<Tensor> h, Tensors weight,
                                  Optionals lora_A, Optionals lora_B, std::vector<double> scaling, Optionals bias,
                                  double dropout_p, Optionals seed, std::vector<bool> wanted) {
  return linears_backward(dy, x, h, weight, lora_A, lora_B, scaling, bias, dropout_p, seed, wanted,
                          [](Tensor&, std::optional<Tensor>&) {});
}

// ---- mlp

// Without a gate, up's bias is not in its hidden product: the activation adds it, in the same pass.
std::optional<Tensor> up_bias(const Tensors& hidden, const Optionals& bias) {
  if (hidden.size() > 1 || !bias[0]) return {};
  CHECK_SHAPE(*bias[0], hidden[0].size(1));
  return to_fp32(*bias[0]);
}
const float* data_or_null(const std::optional<Tensor>& t) {
  return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

Tensor activate_hidden(const Tensors& hidden, Activation activation, const std::optional<Tensor>& bias) {
  const Tensor& up = hidden.back();
  const int64_t rows = up.size(0), columns = up.size(1);
  Tensor a = new_contiguous(up);
  const MutableRows result{a.mutable_data_ptr(), columns};
  const Rows in{up.const_data_ptr(), columns};
  if (hidden.size() == 2) {
    CHECK_SHAPE(hidden[0], rows, columns);
    gated(dtype_of(up), activation, {hidden[0].const_data_ptr(), columns}, in, result, rows, columns);
  } else {
    activate(dtype_of(up), activation, in, data_or_null(bias), result, rows, columns);
  }
  return a;
}

std::tuple<Tensor, Tensors, Tensor, Tensor> lora_mlp_cpu(const Tensor& x, Tensors weight, Optionals lora_A,
                                                         Optionals lora_B, std::vector<double> scaling, Optionals bias,
                                                         double dropout_p, Optionals seed, std::string activation) {
  Optionals bias_first = first(bias);
  if (bias_first.size() == 1) bias_first[0].reset();
  auto [hidden, h] = lora_linears_cpu(x, first(weight), first(lora_A), first(lora_B), first(scaling), bias_first,
                                      dropout_p, first(seed));
  const Tensor a = activate_hidden(hidden, activation_of(activation), up_bias(hidden, bias));
  auto [y, h_down] =
      lora_linears_cpu(a, last(weight), last(lora_A), last(lora_B), last(scaling), last(bias), dropout_p, last(seed));
  return {y[0], hidden, h, h_down};
}

// wanted: as in lora_linears_backward, over all projections
Tensors lora_mlp_backward_cpu(const Tensor& dy, std::optional<Tensor> x, Tensors hidden, std::optional<Tensor> h,
                              std::optional<Tensor> h_down, Tensors weight, Optionals lora_A, Optionals lora_B,
                              std::vector<double> scaling, Optionals bias, double dropout_p, Optionals seed,
                              std::string activation_name, std::vector<bool> wanted) {
  WantedOfMlp parts(dy, hidden, weight, bias, wanted);
  const bool want_a = parts.activation();
  const Activation activation = activation_of(activation_name);
  const Tensor& up = hidden.back();
  const int64_t rows = up.size(0), columns = up.size(1);
  const DType t = dtype_of(up);
  const bool gated_mlp = hidden.size() == 2;
  const std::optional<Tensor> b = up_bias(hidden, bias);

  // up's bias gradient is summed beside the activation where no dB's pass could take it along
  std::optional<Tensor> dbias;
  if (!gated_mlp && wanted[4] && !wanted[3]) {
    STD_TORCH_CHECK(bias[0], "an input of a wanted gradient is missing");
    dbias = torch::stable::new_empty(*bias[0], {columns});
    parts.first[4] = false;
  }

  std::optional<Tensor> a;
  if (want_a && (gated_mlp || !parts.below)) a = activate_hidden(hidden, activation, b);
  // the gradient of the activation's result becomes that of its input in place, and the result itself is computed on
  // the way where there is no gate
  const auto through_activation = [&](Tensor& d, std::optional<Tensor>& a) {
    if (gated_mlp) return;
    if (want_a) a = new_contiguous(up);
    Tensor partial = new_fp32(up, {dbias ? row_blocks(rows) : 0, columns});
    activate_backward(t, activation, {d.const_data_ptr(), columns}, {up.const_data_ptr(), columns}, data_or_null(b),
                      {d.mutable_data_ptr(), columns}, {want_a ? a->mutable_data_ptr() : nullptr, columns},
                      (float*)partial.mutable_data_ptr(), dbias ? dtype_of(*dbias) : DType::fp32,
                      dbias ? dbias->mutable_data_ptr() : nullptr, rows, columns);
  };
  Tensors down = linears_backward({dy}, a, h_down, last(weight), last(lora_A), last(lora_B), last(scaling), last(bias),
                                  dropout_p, last(seed), parts.down, through_activation);
  if (!parts.below) return down;

  Tensors dhidden = {down[0]};
  if (gated_mlp) {  // a's memory takes the second gradient
    Tensor& d = dhidden[0];
    Tensor dup = a ? *a : new_contiguous(up);
    gated_backward(t, activation, {d.const_data_ptr(), columns}, {hidden[0].const_data_ptr(), columns},
                   {up.const_data_ptr(), columns}, {d.mutable_data_ptr(), columns}, {dup.mutable_data_ptr(), columns},
                   rows, columns);
    dhidden.push_back(dup);
  }
  Tensors results = lora_linears_backward_cpu(dhidden, x, h, first(weight), first(lora_A), first(lora_B),
                                              first(scaling), first(bias), dropout_p, first(seed), parts.first);
  if (dbias) results.push_back(*dbias);  // the last of up's
  results.insert(results.end(), down.begin() + 1, down.end());
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfast_cpu, CPU, m) {
  m.impl("lora_linears", TORCH_BOX(&lora_linears_cpu));
  m.impl("lora_linears_backward", TORCH_BOX(&lora_linears_backward_cpu));
  m.impl("lora_mlp", TORCH_BOX(&lora_mlp_cpu));
  m.impl("lora_mlp_backward", TORCH_BOX(&lora_mlp_backward_cpu));
}

}  // namespace pyfast
