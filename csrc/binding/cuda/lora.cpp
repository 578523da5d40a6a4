// lora_linears: the frozen products by torch's GEMM, everything of low rank by csrc/cuda/lora.cuh, whose terms these
// are. What is of low rank is written first, and the GEMM adds to it: it reads y or dx in its epilogue, while it
// multiplies. Or, where csrc/cuda/lora90.cuh serves, both are one product. lora_mlp: the same twice, with an activation
// between, whose result is computed again in the backward.
#include "cuda/lora.h"

#include "binding/activation.h"
#include "binding/cuda/gemm.h"
#include "binding/lora.h"

namespace pyfast {
namespace {

void check_columns(const Projections& projections) {
  STD_TORCH_CHECK(projections.k < int64_t(1) << 30 && projections.rank < int64_t(1) << 30,
                  "expected less than 2^30 columns");
}

// Thin matrices under each other, as kernels take them
struct Panel {
  DType dtype;
  int64_t columns, ld;
  std::vector<cuda::LoraSource> sources;
  std::vector<cuda::LoraGranule> granules;
  int64_t ones = -1, adapters = 0;
  std::optional<Tensor> storage;

  Panel(DType dtype, int64_t columns) : dtype(dtype), columns(columns), ld((columns + 7) / 8 * 8) {}

  int64_t rows() const { return int64_t(granules.size()) * cuda::kLoraGranule; }

  // A (r, columns), or B (columns, r) transposed; returns where it begins
  int64_t add(const Tensor& m, bool transpose, int64_t column, float scale, const int64_t* seed) {
    const int64_t begin = rows(), r = m.size(transpose), across = m.stride(transpose), along = m.stride(!transpose);
    sources.push_back({m.const_data_ptr(), dtype_of(m), r, across, along, begin});
    for (int64_t i = 0; i < r; i += cuda::kLoraGranule)
      granules.push_back({column + i, int(std::min<int64_t>(r - i, cuda::kLoraGranule)), int(adapters), scale, seed});
    ++adapters;
    return begin;
  }
  // A row after the last matrix, at which h is 1: of zeros, or the bias
  int64_t add_ones(const std::optional<Tensor>& bias) {
    if (granules.empty() || granules.back().count == cuda::kLoraGranule)
      granules.push_back({0, 0, int(adapters), 0.f, nullptr});
    ones = rows() - cuda::kLoraGranule + granules.back().count;
    if (bias) sources.push_back({bias->const_data_ptr(), dtype_of(*bias), 1, 0, bias->stride(0), ones});
    return ones;
  }

  void pack(const Tensor& like, void* stream) {
    storage = make_empty(like, {rows(), ld});
    cuda::LoraPack a{};
    a.dtype = dtype, a.panel = storage->mutable_data_ptr(), a.columns = columns, a.ld = ld;
    for (size_t first = 0; first == 0 || first < sources.size(); first += cuda::kLoraSources) {
      const size_t last = std::min(sources.size(), first + cuda::kLoraSources);
      a.count = int(last - first);
      std::copy(sources.begin() + first, sources.begin() + last, a.sources);
      a.first = first == 0 ? 0 : sources[first].at;
      a.last = last == sources.size() ? rows() : sources[last].at;
      check_launch(pyfast_cuda_lora_pack(&a, stream), "lora_pack");
    }
  }

  // The arguments that do not depend on what is computed
  cuda::Lora arguments(int64_t rows, const Tensor* h, int64_t rank) const {
    cuda::Lora a{};
    a.dtype = dtype, a.rows = rows, a.columns = columns;
    a.panel = storage->const_data_ptr(), a.ld = ld;
    a.granules = granules.data(), a.granule_count = int(granules.size());
    a.ones = ones, a.h = h ? h->const_data_ptr<float>() : nullptr, a.rank = rank;
    return a;
  }
};

// out = the sum of `count` parts, each `stride` after the last, of rows `ld` apart, from `parts` on
void sum_parts(const float* parts, int64_t count, int64_t stride, int64_t ld, Tensor& out, bool transpose,
               void* stream) {
  const int64_t rows = out.dim() == 1 ? 1 : out.size(transpose),
                row_stride = out.dim() == 1 ? 0 : out.stride(transpose);
  const int64_t last = out.dim() == 1 ? 0 : !transpose;
  const cuda::LoraSum a{
      parts,      count,           stride, rows, out.size(last), ld, dtype_of(out), out.mutable_data_ptr(),
      row_stride, out.stride(last)};
  check_launch(pyfast_cuda_lora_sum(&a, stream), "lora_sum");
}

// Runs `down` with its result in `h`'s columns column to column + rank - 1
void down(cuda::Lora a, Tensor& h, int64_t column, int64_t rank, void* stream) {
  const int64_t parts = cuda::lora_parts(a.dtype, a.rows, a.columns), all = h.size(1);
  a.down_rank = rank, a.down_column = column;
  if (parts == 1) {
    a.down = h.mutable_data_ptr<float>(), a.down_rank = all, a.down_column = 0;
    return check_launch(pyfast_cuda_lora_down(&a, stream), "lora_down");
  }
  Tensor partial = new_fp32(h, {parts, a.rows, rank});
  a.down = partial.mutable_data_ptr<float>();
  check_launch(pyfast_cuda_lora_down(&a, stream), "lora_down");
  Tensor columns = torch::stable::narrow(h, 1, column, rank);
  sum_parts(a.down, parts, a.rows * rank, rank, columns, false, stream);
}

// Results that are sums of products, each of a frozen weight, or of what is of low rank
struct Products {
  cuda::LoraProduct a{};
  std::vector<cuda::LoraResult> results;
  std::vector<std::vector<cuda::LoraTerm>> terms;  // of each result
  Tensors kept;

  Products(DType dtype, int64_t rows) { a.dtype = dtype, a.rows = rows; }

  void add_result(const Tensor& to, const std::optional<Tensor>& bias) {
    results.push_back({to.mutable_data_ptr(), to.size(1), bias ? bias->const_data_ptr() : nullptr,
                       bias ? dtype_of(*bias) : a.dtype, bias ? bias->stride(0) : 0, nullptr, 0});
    terms.emplace_back();
  }
  // To the last result: rows times weight^T, or, backward, times weight
  void add_frozen(const Tensor& rows, const Tensor& weight, bool backward) {
    const bool by_rows = weight.stride(1) == 1, there = weight.numel() > 0 && (by_rows || weight.stride(0) == 1);
    terms.back().push_back({rows.const_data_ptr(), there ? weight.const_data_ptr() : nullptr, rows.size(1),
                            weight.stride(by_rows ? 0 : 1), rows.size(1), by_rows == backward});
  }
  // The choice between this and torch's GEMM: whether lora90.cuh forms these results on this device, and what is of low
  // rank can be added to them, as it cannot where elements of it are dropped.
  bool served(bool dropped) {
    link();
    bool serves;
    check_launch(pyfast_cuda_lora_product_serves(&a, &serves), "lora_product");
    return serves && !dropped;
  }
  // To result i: h times the panel, h being that of its granules, each with its scale
  void add_low_rank(size_t i, const Panel& panel, const Tensor& h, void* stream) {
    const int64_t width = panel.rows();
    Tensor operand = make_empty(*panel.storage, {a.rows, width});
    const cuda::LoraOperand from{a.dtype,
                                 a.rows,
                                 h.size(1),
                                 h.const_data_ptr<float>(),
                                 panel.granules.data(),
                                 int(panel.granules.size()),
                                 operand.mutable_data_ptr()};
    check_launch(pyfast_cuda_lora_operand(&from, stream), "lora_operand");
    terms[i].push_back({operand.const_data_ptr(), panel.storage->const_data_ptr(), width, panel.ld, width, true});
    kept.push_back(operand), kept.push_back(*panel.storage);
  }
  void run(void* stream) {
    link();
    check_launch(pyfast_cuda_lora_product(&a, stream), "lora_product");
  }

 private:
  void link() {
    for (size_t i = 0; i < results.size(); ++i)
      results[i].terms = terms[i].data(), results[i].term_count = int(terms[i].size());
    a.results = results.data(), a.result_count = int(results.size());
  }
};

std::tuple<Tensors, Tensor> lora_linears(const Tensor& x, Tensors weight, Optionals lora_A, Optionals lora_B,
                                         std::vector<double> scaling, Optionals bias, double dropout_p,
                                         Optionals seed) {
  STD_TORCH_CHECK(x.dim() == 2, "x has shape ", shape_of(x), ", expected (rows, k)");
  const Projections projections(x.size(1), weight, lora_A, lora_B, scaling, bias, dropout_p, seed);
  check_columns(projections);
  const float kept_scale = float(1.0 / (1.0 - dropout_p));
  projections.check_input(x);
  const int64_t rows = x.size(0), rank = projections.rank;
  const OnDevice device(x);
  void* const stream = device.stream();
  Tensor h = new_fp32(x, {rows, rank});
  if (rank) {
    Panel panel(projections.dtype, projections.k);
    for (const Projection& p : projections.each)
      if (p.r) panel.add(*p.lora_A, false, p.offset, kept_scale, p.seed);
    panel.pack(x, stream);
    cuda::Lora a = panel.arguments(rows, nullptr, rank);
    a.x = x.const_data_ptr(), a.dropout = dropout_p > 0, a.dropout_p = dropout_p;
    down(a, h, 0, rank, stream);
  }
  Tensors results;
  Products products(projections.dtype, rows);
  for (const Projection& p : projections.each) {
    results.push_back(make_empty(x, {rows, p.n}));
    products.add_result(results.back(), p.bias);
    products.add_frozen(x, p.weight, false);
  }
  if (products.served(false)) {
    for (size_t i = 0; i < results.size(); ++i) {
      const Projection& p = projections.each[i];
      if (!p.r) continue;
      Panel panel(projections.dtype, p.n);
      panel.add(*p.lora_B, true, p.offset, float(p.scaling), nullptr);
      panel.pack(x, stream);
      products.add_low_rank(i, panel, h, stream);
    }
    products.run(stream);
    return {results, h};
  }
  for (size_t i = 0; i < results.size(); ++i) {
    const Projection& p = projections.each[i];
    Tensor& y = results[i];
    if (p.r || p.bias) {
      Panel panel(projections.dtype, p.n);
      if (p.r) panel.add(*p.lora_B, true, p.offset, float(p.scaling), nullptr);
      if (p.bias) panel.add_ones(p.bias);
      panel.pack(x, stream);
      cuda::Lora a = panel.arguments(rows, &h, rank);
      a.y = y.mutable_data_ptr();
      check_launch(pyfast_cuda_lora_up(&a, stream), "lora_up");
    }
    const bool written = p.r || p.bias, left_out = p.weight.size(1) != x.size(1);
    if (!left_out)
      matmul_out(y, x, torch::stable::transpose(p.weight, 0, 1), written);
    else if (!written)
      torch::stable::zero_(y);
  }
  return {results, h};
}

// wanted: dx, then per projection dweight, dlora_A, dlora_B, dbias; the result has those that are wanted, in that order
// (x is needed for dweight and dlora_A, h for dlora_B). after_dx(dx, x) is called as soon as dx is known, if the
// input's own pass can wait until then; it may set x.
template <class F>
Tensors linears_backward(Tensors dy, std::optional<Tensor> x, std::optional<Tensor> h, Tensors weight, Optionals lora_A,
                         Optionals lora_B, std::vector<double> scaling, Optionals bias, double dropout_p,
                         Optionals seed, std::vector<bool> wanted, const F& after_dx) {
  const Projections projections({}, weight, lora_A, lora_B, scaling, bias, dropout_p, seed);
  check_columns(projections);
  projections.check_gradients(dy, h, wanted);
  const float kept_scale = float(1.0 / (1.0 - dropout_p));
  const Tensor& like = weight[0];
  const DType dtype = projections.dtype;
  const size_t count = weight.size();
  const int64_t rows = dy[0].size(0), k = projections.k, rank = projections.rank;
  const int64_t strips = cuda::lora_strips(dtype, rows);
  const auto want = [&](size_t i, int which) { return bool(wanted[1 + 4 * i + which]); };
  bool want_dA = false, want_x = false;
  for (size_t i = 0; i < count; ++i) {
    want_dA = want_dA || want(i, 1);
    want_x = want_x || want(i, 0) || want(i, 1);
  }
  const OnDevice device(like);
  void* const stream = device.stream();

  // one pass over each dy
  Tensor dh = new_fp32(like, {rows, rank});
  Optionals dB(count), dbias(count);
  for (size_t i = 0; i < count; ++i) {
    const Projection& p = projections.each[i];
    const bool want_dh = p.r && (wanted[0] || want(i, 1)), want_outer = want(i, 2) || want(i, 3);
    if (!want_dh && !want_outer) continue;
    Panel panel(dtype, p.n);
    if (want_dh || want(i, 2)) panel.add(*p.lora_B, true, p.offset, float(p.scaling), nullptr);
    const int64_t ones = want(i, 3) ? panel.add_ones({}) : 0;
    panel.pack(like, stream);
    cuda::Lora a = panel.arguments(rows, want(i, 2) ? &*h : nullptr, rank);
    a.x = dy[i].const_data_ptr();
    std::optional<Tensor> outer;
    if (want_outer) {
      outer = new_fp32(like, {strips, panel.rows(), panel.ld});
      a.outer = outer->mutable_data_ptr<float>();
    }
    if (want_dh)
      down(a, dh, p.offset, p.r, stream);
    else
      check_launch(pyfast_cuda_lora_down(&a, stream), "lora_down");
    if (want(i, 2)) {
      dB[i] = make_empty(*p.lora_B, {p.n, p.r});
      sum_parts(a.outer, strips, panel.rows() * panel.ld, panel.ld, *dB[i], true, stream);
    }
    if (want(i, 3)) {
      dbias[i] = make_empty(*p.bias, {p.n});
      sum_parts(a.outer + ones * panel.ld, strips, panel.rows() * panel.ld, panel.ld, *dbias[i], false, stream);
    }
  }

  // one pass over x, which writes dx
  Tensors results;
  Optionals dA(count);
  const auto over_x = [&](Tensor* dx, bool outer_too) {
    Panel panel(dtype, k);
    std::vector<int64_t> at(count);
    for (size_t i = 0; i < count; ++i) {
      const Projection& p = projections.each[i];
      if (p.r && (dx || want(i, 1))) at[i] = panel.add(*p.lora_A, false, p.offset, kept_scale, p.seed);
    }
    if (panel.granules.empty()) return false;
    panel.pack(like, stream);
    cuda::Lora a = panel.arguments(rows, &dh, rank);
    a.dropout = dropout_p > 0, a.dropout_p = dropout_p;
    if (dx) a.y = dx->mutable_data_ptr();
    std::optional<Tensor> outer;
    if (outer_too) {
      a.x = x->const_data_ptr();
      outer = new_fp32(like, {strips, panel.rows(), panel.ld});
      a.outer = outer->mutable_data_ptr<float>();
    }
    check_launch(pyfast_cuda_lora_up(&a, stream), "lora_up");
    for (size_t i = 0; i < count && outer_too; ++i) {
      const Projection& p = projections.each[i];
      if (!want(i, 1)) continue;
      dA[i] = make_empty(*p.lora_A, {p.r, k});
      sum_parts(a.outer + at[i] * panel.ld, strips, panel.rows() * panel.ld, panel.ld, *dA[i], false, stream);
    }
    return true;
  };
  const auto check_x = [&] {
    STD_TORCH_CHECK(x, "an input of a wanted gradient is missing");
    projections.check_input(*x);
    CHECK_SHAPE(*x, rows, k);
  };
  const bool x_known = x.has_value();
  bool dA_known = false;
  if (want_x && x_known) check_x();
  if (wanted[0]) {
    Tensor dx = make_empty(like, {rows, k});
    Products products(dtype, rows);
    products.add_result(dx, {});
    for (size_t i = 0; i < count; ++i) products.add_frozen(dy[i], weight[i], true);
    if (products.served(rank > 0 && dropout_p > 0)) {
      Panel panel(dtype, k);
      for (const Projection& p : projections.each)
        if (p.r) panel.add(*p.lora_A, false, p.offset, 1.f, nullptr);
      if (rank) {
        panel.pack(like, stream);
        products.add_low_rank(0, panel, dh, stream);
      }
      products.run(stream);
    } else {
      dA_known = x_known && want_dA;
      bool written = over_x(&dx, dA_known);
      for (size_t i = 0; i < count; ++i) {
        matmul_out(dx, dy[i], projections.each[i].weight, written);
        written = true;
      }
    }
    after_dx(dx, x);
    results.push_back(dx);
  }
  if (want_x && !x_known) check_x();
  if (want_dA && !dA_known) over_x(nullptr, true);

  for (size_t i = 0; i < count; ++i) {
    const Projection& p = projections.each[i];
    if (want(i, 0)) {
      Tensor dweight = make_empty(like, {p.n, k});
      matmul_out(dweight, torch::stable::transpose(dy[i], 0, 1), *x);
      results.push_back(dweight);
    }
    for (const std::optional<Tensor>* gradient : {&dA[i], &dB[i], &dbias[i]})
      if (*gradient) results.push_back(**gradient);
  }
  return results;
}

Tensors lora_linears_backward(Tensors dy, std::optional<Tensor> x, std::optional<Tensor> h, Tensors weight,
                              Optionals lora_A, Optionals lora_B, std::vector<double> scaling, Optionals bias,
                              double dropout_p, Optionals seed, std::vector<bool> wanted) {
  return linears_backward(dy, x, h, weight, lora_A, lora_B, scaling, bias, dropout_p, seed, wanted,
                          [](Tensor&, std::optional<Tensor>&) {});
}

// ---- mlp

cuda::LoraActivation activation_arguments(const Tensors& hidden, const std::string& name) {
  cuda::LoraActivation a{};
  a.dtype = dtype_of(hidden.back()), a.activation = int(activation_of(name)), a.count = hidden.back().numel();
  a.gate = hidden.size() == 2 ? hidden[0].const_data_ptr() : nullptr, a.up = hidden.back().const_data_ptr();
  return a;
}

Tensor activate(const Tensors& hidden, const std::string& name) {
  Tensor result = make_empty(hidden.back(), hidden.back().sizes());
  cuda::LoraActivation a = activation_arguments(hidden, name);
  a.a = result.mutable_data_ptr();
  const OnDevice device(result);
  check_launch(pyfast_cuda_lora_activation(&a, device.stream()), "lora_activation");
  return result;
}

std::tuple<Tensor, Tensors, Tensor, Tensor> lora_mlp(const Tensor& x, Tensors weight, Optionals lora_A,
                                                     Optionals lora_B, std::vector<double> scaling, Optionals bias,
                                                     double dropout_p, Optionals seed, std::string activation) {
  auto [hidden, h] =
      lora_linears(x, first(weight), first(lora_A), first(lora_B), first(scaling), first(bias), dropout_p, first(seed));
  STD_TORCH_CHECK(hidden[0].size(1) == hidden.back().size(1), "gate and up differ in their rows");
  auto [y, h_down] = lora_linears(activate(hidden, activation), last(weight), last(lora_A), last(lora_B), last(scaling),
                                  last(bias), dropout_p, last(seed));
  return {y[0], hidden, h, h_down};
}

// wanted: as in lora_linears_backward, over all projections
Tensors lora_mlp_backward(const Tensor& dy, std::optional<Tensor> x, Tensors hidden, std::optional<Tensor> h,
                          std::optional<Tensor> h_down, Tensors weight, Optionals lora_A, Optionals lora_B,
                          std::vector<double> scaling, Optionals bias, double dropout_p, Optionals seed,
                          std::string activation, std::vector<bool> wanted) {
  const WantedOfMlp parts(dy, hidden, weight, bias, wanted);
  const bool want_a = parts.activation();
  std::optional<Tensor> a;
  if (want_a && !parts.below) a = activate(hidden, activation);
  // the gradient of the activation's result becomes those of its inputs, and the result is computed on the way
  Tensors dhidden;
  const auto through_activation = [&](Tensor& da, std::optional<Tensor>& result) {
    cuda::LoraActivation arguments = activation_arguments(hidden, activation);
    for (size_t i = 0; i < hidden.size(); ++i) dhidden.push_back(make_empty(da, da.sizes()));
    if (want_a) result = make_empty(da, da.sizes());
    arguments.da = da.const_data_ptr(), arguments.a = want_a ? result->mutable_data_ptr() : nullptr;
    arguments.dgate = dhidden[0].mutable_data_ptr(), arguments.dup = dhidden.back().mutable_data_ptr();
    const OnDevice device(da);
    check_launch(pyfast_cuda_lora_activation(&arguments, device.stream()), "lora_activation");
  };
  Tensors down = linears_backward({dy}, a, h_down, last(weight), last(lora_A), last(lora_B), last(scaling), last(bias),
                                  dropout_p, last(seed), parts.down, through_activation);
  if (!parts.below) return down;
  Tensors results = lora_linears_backward(dhidden, x, h, first(weight), first(lora_A), first(lora_B), first(scaling),
                                          first(bias), dropout_p, first(seed), parts.first);
  results.insert(results.end(), down.begin() + 1, down.end());
  return results;
}

}  // namespace

PYFAST_CUDA_IMPL(m) {
  m.impl("lora_linears", TORCH_BOX(&lora_linears));
  m.impl("lora_linears_backward", TORCH_BOX(&lora_linears_backward));
  m.impl("lora_mlp", TORCH_BOX(&lora_mlp));
  m.impl("lora_mlp_backward", TORCH_BOX(&lora_mlp_backward));
}

}  // namespace pyfast
