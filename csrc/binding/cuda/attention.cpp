#include "cuda/attention.h"

#include <algorithm>

#include "binding/cuda/device.h"

namespace pyfast {
namespace {

using OptionalTensor = std::optional<Tensor>;

cuda::Heads heads_of(const Tensor& t, const char* name) {
  const int64_t last = t.dim() - 1;  // (B, H, S, D) or packed (T, H, D)
  STD_TORCH_CHECK(t.size(last) == 1 || t.stride(last) == 1 || t.numel() == 0, name,
                  " must be contiguous in its last dimension");
  bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i < last; ++i) aligned = aligned && (t.size(i) == 1 || t.stride(i) * t.element_size() % 16 == 0);
  if (last == 3) return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), aligned};
  return {t.const_data_ptr(), 0, t.stride(1), t.stride(0), aligned};
}

// (B, H, S, D) laid out as (B, S, H, D); packed (T, H, D)
Tensor rows_first(const Tensor& like) {
  if (like.dim() == 3) return torch::stable::new_empty(like, {like.size(0), like.size(1), like.size(2)});
  return torch::stable::transpose(
      torch::stable::new_empty(like, {like.size(0), like.size(2), like.size(1), like.size(3)}), 1, 2);
}

// The arguments of both passes, checked
struct Call : cuda::Attention {
  Call(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& sinks,
       const OptionalTensor& attention_mask, const OptionalTensor& attn_bias, const OptionalTensor& seed,
       const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_k, double scale,
       double softcap, int64_t left, int64_t right, double dropout_p)
      : cuda::Attention{} {
    const bool packed = cu_seqlens_q.has_value();
    const int64_t rank = packed ? 3 : 4, rows = packed ? 0 : 2;
    STD_TORCH_CHECK(packed == cu_seqlens_k.has_value(), "cu_seqlens_q and cu_seqlens_k go together");
    STD_TORCH_CHECK(q.dim() == rank && k.dim() == rank, "q ", shape_of(q), " and k ", shape_of(k), " must have ", rank,
                    " dimensions");
    CHECK_SAME_DTYPE(k, q);
    CHECK_SAME_DTYPE(v, q);
    dtype = dtype_of(q);
    batch = packed ? 1 : q.size(0), heads = q.size(1), kv_heads = k.size(1), sq = q.size(rows), sk = k.size(rows);
    const int64_t width = q.size(rank - 1);
    STD_TORCH_CHECK(width >= 1 && width <= 256, "head width D is ", width, ": the CUDA kernels serve 1 to 256");
    dim = int(width);
    STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "q's heads must be a multiple of k's");
    STD_TORCH_CHECK(sq + sk < int64_t(1) << 30, "sequences of ", sq, " and ", sk, " rows: expected less than 2^30");
    if (packed) {
      CHECK_SHAPE(k, sk, kv_heads, width);
      CHECK_SHAPE(v, sk, kv_heads, width);
      const Tensor& ends = *cu_seqlens_q;
      STD_TORCH_CHECK(ends.dim() == 1 && ends.numel() >= 1, "cu_seqlens_q has shape ", shape_of(ends),
                      ", expected (N + 1)");
      const ScalarType type = ends.scalar_type();
      STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, "cu_seqlens_q must be int32 or int64");
      cu_wide = type == ScalarType::Long, sequences = ends.numel() - 1;
      cu_q = optional_values<void>(cu_seqlens_q, type, "cu_seqlens_q", {sequences + 1}, "N + 1");
      cu_k = optional_values<void>(cu_seqlens_k, type, "cu_seqlens_k", {sequences + 1}, "N + 1");
    } else {
      CHECK_SHAPE(k, batch, kv_heads, sk, width);
      CHECK_SHAPE(v, batch, kv_heads, sk, width);
    }
    this->q = heads_of(q, "q"), this->k = heads_of(k, "k"), this->v = heads_of(v, "v");
    this->scale = float(scale), this->softcap = float(softcap);
    // sq + sk reaches everything, and leaves room for sums with positions
    this->left = int(std::min(left, sq + sk)), this->right = int(std::min(right, sq + sk));
    this->sinks = optional_values<float>(sinks, ScalarType::Float, "sinks", {heads}, "heads");
    STD_TORCH_CHECK(!packed || !(attention_mask || attn_bias),
                    "attention_mask and attn_bias need q that is not packed");
    mask = optional_values<bool>(attention_mask, ScalarType::Bool, "attention_mask", {batch, sk}, "batch, sk");
    if (attn_bias) {
      STD_TORCH_CHECK(attn_bias->dim() == 4, "attn_bias has shape ", shape_of(*attn_bias), ", expected 4 dimensions");
      const int64_t full[] = {batch, heads, sq, sk};
      for (int i = 0; i < 4; ++i) {
        dbias_sizes[i] = attn_bias->size(i);
        STD_TORCH_CHECK(dbias_sizes[i] == full[i] || dbias_sizes[i] == 1, "attn_bias ", shape_of(*attn_bias),
                        " does not broadcast");
        bias_strides[i] = dbias_sizes[i] == 1 ? 0 : attn_bias->stride(i);
      }
      bias = attn_bias->const_data_ptr(), bias_dtype = dtype_of(*attn_bias);
    }
    if (dropout_p > 0) {
      STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1, "seed must be one int64");
      STD_TORCH_CHECK(dropout_p < 1, "expected dropout_p < 1");
      this->seed = static_cast<const int64_t*>(seed->const_data_ptr());
      this->dropout_p = dropout_p;
      dropout_keys = packed ? max_seqlen_k : sk;
    }
  }

  Tensor per_query(const Tensor& like) const {
    if (cu_q) return torch::stable::new_empty(like, {heads, sq}, ScalarType::Float);
    return torch::stable::new_empty(like, {batch, heads, sq}, ScalarType::Float);
  }
  float* check_per_query(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(t.numel() == batch * heads * sq && t.is_contiguous() && t.scalar_type() == ScalarType::Float, name,
                    " must be contiguous float32, one element per query");
    return const_cast<float*>(t.const_data_ptr<float>());
  }
};

std::tuple<Tensor, Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const OptionalTensor& sinks, const OptionalTensor& attention_mask,
                                             const OptionalTensor& attn_bias, const OptionalTensor& seed,
                                             const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                                             int64_t max_seqlen_k, double scale, double softcap, int64_t left,
                                             int64_t right, double dropout_p) {
  Call a(q, k, v, sinks, attention_mask, attn_bias, seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_k, scale, softcap,
         left, right, dropout_p);
  Tensor out = rows_first(q), maximum = a.per_query(q), log_sum = a.per_query(q);
  a.out = heads_of(out, "out");
  a.maximum = maximum.mutable_data_ptr<float>(), a.log_sum = log_sum.mutable_data_ptr<float>();
  const OnDevice device(q);
  check_launch(pyfast_cuda_attention(&a, device.stream()), "attention");
  return {out, maximum, log_sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& maximum, const Tensor& log_sum, const OptionalTensor& sinks,
    const OptionalTensor& attention_mask, const OptionalTensor& attn_bias, const OptionalTensor& seed,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_k, double scale,
    double softcap, int64_t left, int64_t right, double dropout_p, bool bias_gradient) {
  Call a(q, k, v, sinks, attention_mask, attn_bias, seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_k, scale, softcap,
         left, right, dropout_p);
  check_like(q, dout, "dout");
  check_like(q, out, "out");
  a.dout = heads_of(dout, "dout"), a.out = heads_of(out, "out");
  a.maximum = a.check_per_query(maximum, "maximum"), a.log_sum = a.check_per_query(log_sum, "log_sum");
  a.dlse = dlse ? a.check_per_query(*dlse, "dlse") : nullptr;
  Tensor dq = rows_first(q), dk = rows_first(k), dv = rows_first(k), delta = a.per_query(q);
  a.dq = heads_of(dq, "dq"), a.dk = heads_of(dk, "dk"), a.dv = heads_of(dv, "dv");
  a.delta = delta.mutable_data_ptr<float>();
  Tensor dsinks = torch::stable::new_empty(q, {a.sinks ? a.heads : 0}, ScalarType::Float);
  a.dsinks = dsinks.mutable_data_ptr<float>();
  Tensor dbias = torch::stable::new_empty(q, {0}, ScalarType::Float), dscores = dbias;
  if (bias_gradient) {
    STD_TORCH_CHECK(attn_bias.has_value(), "bias_gradient needs attn_bias");
    const int64_t* n = a.dbias_sizes;
    dbias = torch::stable::new_empty(q, {n[0], n[1], n[2], n[3]}, ScalarType::Float);
    const bool whole = n[0] == a.batch && n[1] == a.heads && n[2] == a.sq && n[3] == a.sk;
    dscores = whole ? dbias : torch::stable::new_empty(q, {a.batch, a.heads, a.sq, a.sk}, ScalarType::Float);
    a.dbias = dbias.mutable_data_ptr<float>(), a.dscores = dscores.mutable_data_ptr<float>();
  }
  const OnDevice device(q);
  check_launch(pyfast_cuda_attention_backward(&a, device.stream()), "attention_backward");
  return {dq, dk, dv, dsinks, dbias};
}

}  // namespace

PYFAST_CUDA_IMPL(m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace pyfast
