#include "cpu/attention.h"

#include <algorithm>

#include "binding/binding.h"

namespace pyfast {
namespace {

using OptionalTensor = std::optional<Tensor>;

Strides strides_of(const Tensor& t, const char* name) {
  int64_t dims = t.dim();  // (B, H, S, D) or packed (T, H, D)
  STD_TORCH_CHECK(t.size(dims - 1) == 1 || t.stride(dims - 1) == 1 || t.numel() == 0, name,
                  " must be contiguous in its last dimension");
  if (dims == 4) return {t.stride(0), t.stride(1), t.stride(2)};
  return {0, t.stride(1), t.stride(0)};
}

// cu_seqlens as int64, checked: kernels never read out of bounds
std::vector<int64_t> bounds_of(const Tensor& t, int64_t total, const char* name) {
  CHECK_CONTIGUOUS(t);
  STD_TORCH_CHECK(t.dim() == 1 && t.numel() >= 1, name, " has shape ", shape_of(t), ", expected (N + 1)");
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int || t.scalar_type() == ScalarType::Long, name,
                  " must be int32 or int64");
  std::vector<int64_t> bounds(t.numel());
  for (size_t i = 0; i < bounds.size(); ++i)
    bounds[i] = t.scalar_type() == ScalarType::Int ? static_cast<const int32_t*>(t.const_data_ptr())[i]
                                                   : static_cast<const int64_t*>(t.const_data_ptr())[i];
  bool sorted = bounds[0] == 0 && bounds.back() <= total;
  for (size_t i = 1; i < bounds.size(); ++i) sorted = sorted && bounds[i - 1] <= bounds[i];
  STD_TORCH_CHECK(sorted, name, " must begin with 0, never decrease, and end within the ", total, " rows there are");
  return bounds;
}

struct Call : Attention {
  std::vector<int64_t> q_bounds, k_bounds;

  Call(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& sinks,
       const OptionalTensor& attention_mask, const OptionalTensor& attn_bias, const OptionalTensor& seed,
       const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_k, double scale,
       double softcap, int64_t left, int64_t right, double dropout_p)
      : Attention{} {
    const bool packed = cu_seqlens_q.has_value();
    const int64_t rank = packed ? 3 : 4, rows = packed ? 0 : 2;
    STD_TORCH_CHECK(packed == cu_seqlens_k.has_value(), "cu_seqlens_q and cu_seqlens_k go together");
    STD_TORCH_CHECK(q.dim() == rank && k.dim() == rank, "q ", shape_of(q), " and k ", shape_of(k), " must have ", rank,
                    " dimensions");
    CHECK_SAME_DTYPE(k, q);
    CHECK_SAME_DTYPE(v, q);
    dtype = dtype_of(q);
    heads = q.size(1), kv_heads = k.size(1), sq = q.size(rows), sk = k.size(rows), dim = q.size(rank - 1);
    STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "q's heads must be a multiple of k's");
    if (packed) {
      CHECK_SHAPE(k, sk, kv_heads, dim);
      CHECK_SHAPE(v, sk, kv_heads, dim);
      q_bounds = bounds_of(*cu_seqlens_q, sq, "cu_seqlens_q"), k_bounds = bounds_of(*cu_seqlens_k, sk, "cu_seqlens_k");
      STD_TORCH_CHECK(q_bounds.size() == k_bounds.size(), "cu_seqlens_q and cu_seqlens_k differ in length");
      batch = q_bounds.size() - 1, bounds_q = q_bounds.data(), bounds_k = k_bounds.data();
    } else {
      batch = q.size(0);
      CHECK_SHAPE(k, batch, kv_heads, sk, dim);
      CHECK_SHAPE(v, batch, kv_heads, sk, dim);
    }
    this->q = q.const_data_ptr(), this->k = k.const_data_ptr(), this->v = v.const_data_ptr();
    q_strides = strides_of(q, "q"), k_strides = strides_of(k, "k"), v_strides = strides_of(v, "v");
    this->scale = float(scale), this->softcap = float(softcap);
    // sq + sk reaches everything, and leaves room for sums with positions
    this->left = std::min(left, sq + sk), this->right = std::min(right, sq + sk);
    if (sinks) {
      const Tensor& sink = *sinks;
      CHECK_SHAPE(sink, heads);
      CHECK_CONTIGUOUS(sink);
      STD_TORCH_CHECK(sink.scalar_type() == ScalarType::Float, "sinks must be float32");
      this->sinks = sink.const_data_ptr<float>();
    }
    if (attention_mask) {
      const Tensor& mask = *attention_mask;
      STD_TORCH_CHECK(!packed && mask.scalar_type() == ScalarType::Bool,
                      "attention_mask must be bool and q not packed");
      CHECK_SHAPE(mask, batch, sk);
      CHECK_CONTIGUOUS(mask);
      this->mask = static_cast<const bool*>(mask.const_data_ptr());
    }
    if (attn_bias) {
      const Tensor& bias = *attn_bias;
      STD_TORCH_CHECK(!packed && bias.dim() == 4, "attn_bias must have 4 dimensions and q not be packed");
      const int64_t full[] = {batch, heads, sq, sk};
      for (int i = 0; i < 4; ++i) {
        STD_TORCH_CHECK(bias.size(i) == full[i] || bias.size(i) == 1, "attn_bias ", shape_of(bias),
                        " does not broadcast");
        bias_strides[i] = bias.size(i) == 1 ? 0 : bias.stride(i);
      }
      this->bias = bias.const_data_ptr(), bias_dtype = dtype_of(bias);
    }
    if (dropout_p > 0) {
      STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1, "seed must be one int64");
      this->seed = *static_cast<const int64_t*>(seed->const_data_ptr());
      this->dropout_p = dropout_p;
      dropout_keys = packed ? max_seqlen_k : sk;
    }
  }

  // (B, H, S, D) laid out as (B, S, H, D); packed (T, H, D)
  static Tensor rows_first(const Tensor& like) {
    if (like.dim() == 3) return torch::stable::new_empty(like, {like.size(0), like.size(1), like.size(2)});
    Tensor t = torch::stable::new_empty(like, {like.size(0), like.size(2), like.size(1), like.size(3)});
    return torch::stable::transpose(t, 1, 2);
  }
  Tensor per_query(const Tensor& q) const {
    if (bounds_q) return torch::stable::new_empty(q, {heads, sq}, ScalarType::Float);
    return torch::stable::new_empty(q, {batch, heads, sq}, ScalarType::Float);
  }
};

std::tuple<Tensor, Tensor, Tensor> attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                                 const OptionalTensor& sinks, const OptionalTensor& attention_mask,
                                                 const OptionalTensor& attn_bias, const OptionalTensor& seed,
                                                 const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                                                 int64_t max_seqlen_k, double scale, double softcap, int64_t left,
                                                 int64_t right, double dropout_p) {
  Call a(q, k, v, sinks, attention_mask, attn_bias, seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_k, scale, softcap,
         left, right, dropout_p);
  Tensor out = Call::rows_first(q), maximum = a.per_query(q), log_sum = a.per_query(q);
  a.out = out.mutable_data_ptr(), a.out_strides = strides_of(out, "out");
  a.maximum = maximum.mutable_data_ptr<float>(), a.log_sum = log_sum.mutable_data_ptr<float>();
  attention_forward(a);
  return {out, maximum, log_sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward_cpu(
    const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& maximum, const Tensor& log_sum, const OptionalTensor& sinks,
    const OptionalTensor& attention_mask, const OptionalTensor& attn_bias, const OptionalTensor& seed,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_k, double scale,
    double softcap, int64_t left, int64_t right, double dropout_p, bool bias_gradient) {
  Call a(q, k, v, sinks, attention_mask, attn_bias, seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_k, scale, softcap,
         left, right, dropout_p);
  CHECK_SAME_DTYPE(dout, q);
  CHECK_SAME_DTYPE(out, q);
  for (const Tensor* t : {&dout, &out})
    for (int64_t i = 0; i < q.dim(); ++i)
      STD_TORCH_CHECK(t->dim() == q.dim() && t->size(i) == q.size(i), "dout and out must have the shape of q");
  for (const Tensor* t : {&maximum, &log_sum, dlse ? &*dlse : &log_sum})
    STD_TORCH_CHECK(t->numel() == (a.bounds_q ? 1 : a.batch) * a.heads * a.sq && t->is_contiguous() &&
                        t->scalar_type() == ScalarType::Float,
                    "maximum, log_sum and dlse must be contiguous float32, one element per query");
  a.dout = dout.const_data_ptr(), a.dout_strides = strides_of(dout, "dout");
  a.out = const_cast<void*>(out.const_data_ptr()), a.out_strides = strides_of(out, "out");
  a.maximum = const_cast<float*>(maximum.const_data_ptr<float>());
  a.log_sum = const_cast<float*>(log_sum.const_data_ptr<float>());
  a.dlse = dlse ? dlse->const_data_ptr<float>() : nullptr;
  Tensor dq = Call::rows_first(q), dk = Call::rows_first(k), dv = Call::rows_first(k);
  a.dq = dq.mutable_data_ptr(), a.dk = dk.mutable_data_ptr(), a.dv = dv.mutable_data_ptr();
  a.dq_strides = strides_of(dq, "dq"), a.dkv_strides = strides_of(dk, "dk");
  Tensor dsinks = torch::stable::new_empty(q, {a.sinks ? a.heads : 0}, ScalarType::Float);
  a.dsinks = dsinks.mutable_data_ptr<float>();
  std::vector<int64_t> bias_sizes{0};
  if (bias_gradient) {
    STD_TORCH_CHECK(attn_bias.has_value(), "bias_gradient needs attn_bias");
    bias_sizes = {attn_bias->size(0), attn_bias->size(1), attn_bias->size(2), attn_bias->size(3)};
    a.dbias_count = 1;
    for (int i = 3; i >= 0; --i) {
      a.dbias_strides[i] = bias_sizes[i] == 1 ? 0 : a.dbias_count;
      a.dbias_count *= bias_sizes[i];
    }
  }
  Tensor dbias = torch::stable::new_empty(q, bias_sizes, ScalarType::Float);
  if (bias_gradient) a.dbias = dbias.mutable_data_ptr<float>();
  attention_backward(a, torch::stable::get_num_threads());
  return {dq, dk, dv, dsinks, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfast_cpu, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention_cpu));
  m.impl("attention_backward", TORCH_BOX(&attention_backward_cpu));
}

}  // namespace pyfast
