// What the attention bindings of every backend share: the schema's arguments, their checks, and the results. A backend
// brings a struct Call that derives from AttentionCall and says how it is handed tensors, and what it runs.
#pragma once
#include <algorithm>

#include "binding/binding.h"

namespace pyfast {

using OptionalTensor = std::optional<Tensor>;

// (B, H, S, D) laid out as (B, S, H, D); packed (T, H, D)
inline Tensor rows_first(const Tensor& like) {
  if (like.dim() == 3) return make_empty(like, {like.size(0), like.size(1), like.size(2)});
  return torch::stable::transpose(make_empty(like, {like.size(0), like.size(2), like.size(1), like.size(3)}), 1, 2);
}

// A backend's Problem, with all that its kernels take in the same form, checked. In the backend's own hands are q, k
// and v, the ends of packed sequences, and the seed.
template <class Problem>
struct AttentionCall : Problem {
  const bool packed;

  AttentionCall(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& sinks,
                const OptionalTensor& attention_mask, const OptionalTensor& attn_bias, const OptionalTensor& seed,
                const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_k,
                double scale, double softcap, int64_t left, int64_t right, double dropout_p)
      : Problem{}, packed(cu_seqlens_q.has_value()) {
    const int64_t rank = packed ? 3 : 4, rows = packed ? 0 : 2;
    STD_TORCH_CHECK(packed == cu_seqlens_k.has_value(), "cu_seqlens_q and cu_seqlens_k go together");
    STD_TORCH_CHECK(q.dim() == rank && k.dim() == rank, "q ", shape_of(q), " and k ", shape_of(k), " must have ", rank,
                    " dimensions");
    CHECK_SAME_DTYPE(k, q);
    CHECK_SAME_DTYPE(v, q);
    const int64_t sq = q.size(rows), sk = k.size(rows), heads = q.size(1), kv_heads = k.size(1), dim = q.size(rank - 1);
    const int64_t batch = packed ? 1 : q.size(0);
    STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "q's heads must be a multiple of k's");
    if (packed) {
      CHECK_SHAPE(k, sk, kv_heads, dim);
      CHECK_SHAPE(v, sk, kv_heads, dim);
      check_ends(*cu_seqlens_q, "cu_seqlens_q", cu_seqlens_q->numel());
      check_ends(*cu_seqlens_k, "cu_seqlens_k", cu_seqlens_q->numel());
    } else {
      CHECK_SHAPE(k, batch, kv_heads, sk, dim);
      CHECK_SHAPE(v, batch, kv_heads, sk, dim);
    }
    this->dtype = dtype_of(q);
    this->batch = batch, this->heads = heads, this->kv_heads = kv_heads, this->sq = sq, this->sk = sk;
    this->dim = decltype(this->dim)(dim);
    this->scale = float(scale), this->softcap = float(softcap);
    // sq + sk reaches everything, and leaves room for sums with positions
    this->left = decltype(this->left)(std::min(left, sq + sk));
    this->right = decltype(this->right)(std::min(right, sq + sk));
    this->sinks = optional_values<float>(sinks, ScalarType::Float, "sinks", {heads}, "heads");
    STD_TORCH_CHECK(!packed || !(attention_mask || attn_bias),
                    "attention_mask and attn_bias need q that is not packed");
    this->mask = optional_values<bool>(attention_mask, ScalarType::Bool, "attention_mask", {batch, sk}, "batch, sk");
    if (attn_bias) {
      STD_TORCH_CHECK(attn_bias->dim() == 4, "attn_bias has shape ", shape_of(*attn_bias), ", expected 4 dimensions");
      const int64_t full[] = {batch, heads, sq, sk};
      for (int i = 0; i < 4; ++i) {
        const int64_t size = attn_bias->size(i);
        STD_TORCH_CHECK(size == full[i] || size == 1, "attn_bias ", shape_of(*attn_bias), " does not broadcast");
        this->bias_strides[i] = size == 1 ? 0 : attn_bias->stride(i);
      }
      this->bias = attn_bias->const_data_ptr(), this->bias_dtype = dtype_of(*attn_bias);
    }
    if (dropout_p > 0) {
      STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1, "seed must be one int64");
      STD_TORCH_CHECK(dropout_p < 1, "expected dropout_p < 1");
      this->dropout_p = dropout_p;
      this->dropout_keys = packed ? max_seqlen_k : sk;
    }
  }

  Tensor per_query(const Tensor& like) const {
    if (packed) return make_empty(like, {this->heads, this->sq}, ScalarType::Float);
    return make_empty(like, {this->batch, this->heads, this->sq}, ScalarType::Float);
  }
  float* check_per_query(const Tensor& t, const Tensor& q, const char* name) const {
    STD_TORCH_CHECK(
        t.numel() * q.size(q.dim() - 1) == q.numel() && t.is_contiguous() && t.scalar_type() == ScalarType::Float, name,
        " must be contiguous float32, one element per query");
    return const_cast<float*>(t.const_data_ptr<float>());
  }

 private:
  static void check_ends(const Tensor& t, const char* name, int64_t count) {
    const ScalarType type = t.scalar_type();
    STD_TORCH_CHECK(t.dim() == 1 && t.numel() >= 1 && t.numel() == count, name, " has shape ", shape_of(t),
                    ", expected (N + 1), one length for queries and keys");
    STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, name, " must be int32 or int64");
    STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  }
};

// The schemas' functions. Call(the arguments), set_out(out), forward(q), set_gradients(dout, dq, dk, dv), and
// backward(q, dbias): dbias null where it is not asked for.
template <class Call>
std::tuple<Tensor, Tensor, Tensor> attention_op(const Tensor& q, const Tensor& k, const Tensor& v,
                                                const OptionalTensor& sinks, const OptionalTensor& attention_mask,
                                                const OptionalTensor& attn_bias, const OptionalTensor& seed,
                                                const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                                                int64_t max_seqlen_k, double scale, double softcap, int64_t left,
                                                int64_t right, double dropout_p) {
  Call a(q, k, v, sinks, attention_mask, attn_bias, seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_k, scale, softcap,
         left, right, dropout_p);
  Tensor out = rows_first(q), maximum = a.per_query(q), log_sum = a.per_query(q);
  a.set_out(out);
  a.maximum = maximum.template mutable_data_ptr<float>(), a.log_sum = log_sum.template mutable_data_ptr<float>();
  a.forward(q);
  return {out, maximum, log_sum};
}

template <class Call>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward_op(
    const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& maximum, const Tensor& log_sum, const OptionalTensor& sinks,
    const OptionalTensor& attention_mask, const OptionalTensor& attn_bias, const OptionalTensor& seed,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_k, double scale,
    double softcap, int64_t left, int64_t right, double dropout_p, bool bias_gradient) {
  Call a(q, k, v, sinks, attention_mask, attn_bias, seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_k, scale, softcap,
         left, right, dropout_p);
  check_like(q, dout, "dout");
  check_like(q, out, "out");
  a.set_out(out);
  a.maximum = a.check_per_query(maximum, q, "maximum"), a.log_sum = a.check_per_query(log_sum, q, "log_sum");
  a.dlse = dlse ? a.check_per_query(*dlse, q, "dlse") : nullptr;
  Tensor dq = rows_first(q), dk = rows_first(k), dv = rows_first(k);
  a.set_gradients(dout, dq, dk, dv);
  Tensor dsinks = make_empty(q, {a.sinks ? a.heads : 0}, ScalarType::Float);
  a.dsinks = dsinks.template mutable_data_ptr<float>();
  STD_TORCH_CHECK(!bias_gradient || attn_bias, "bias_gradient needs attn_bias");
  Tensor dbias = make_empty(q, {0}, ScalarType::Float);
  if (bias_gradient) dbias = make_empty(*attn_bias, attn_bias->sizes(), ScalarType::Float);
  a.backward(q, bias_gradient ? &dbias : nullptr);
  return {dq, dk, dv, dsinks, dbias};
}

}  // namespace pyfast
