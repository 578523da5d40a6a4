#include "binding/attention.h"

#include "binding/cuda/device.h"
#include "cuda/attention.h"

namespace pyfast {
namespace {

cuda::Heads heads_of(const Tensor& t, const char* name) {
  const int64_t last = t.dim() - 1;  // (B, H, S, D) or packed (T, H, D)
  STD_TORCH_CHECK(t.size(last) == 1 || t.stride(last) == 1 || t.numel() == 0, name,
                  " must be contiguous in its last dimension");
  bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i < last; ++i) aligned = aligned && (t.size(i) == 1 || t.stride(i) * t.element_size() % 16 == 0);
  if (last == 3) return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), aligned};
  return {t.const_data_ptr(), 0, t.stride(1), t.stride(0), aligned};
}

struct Call : AttentionCall<cuda::Attention> {
  Call(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& sinks,
       const OptionalTensor& attention_mask, const OptionalTensor& attn_bias, const OptionalTensor& seed,
       const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, auto... options)
      : AttentionCall(q, k, v, sinks, attention_mask, attn_bias, seed, cu_seqlens_q, cu_seqlens_k, options...) {
    STD_TORCH_CHECK(dim >= 1 && dim <= 256, "head width D is ", dim, ": the CUDA kernels serve 1 to 256");
    STD_TORCH_CHECK(sq + sk < int64_t(1) << 30, "sequences of ", sq, " and ", sk, " rows: expected less than 2^30");
    STD_TORCH_CHECK(batch * heads < int64_t(1) << 31, "a batch of ", batch, " with ", heads, " heads is too large");
    if (packed) {
      CHECK_SAME_DTYPE(*cu_seqlens_k, *cu_seqlens_q);
      cu_wide = cu_seqlens_q->scalar_type() == ScalarType::Long, sequences = cu_seqlens_q->numel() - 1;
      cu_q = cu_seqlens_q->const_data_ptr(), cu_k = cu_seqlens_k->const_data_ptr();
    }
    this->q = heads_of(q, "q"), this->k = heads_of(k, "k"), this->v = heads_of(v, "v");
    if (dropout_p > 0) this->seed = static_cast<const int64_t*>(seed->const_data_ptr());
  }

  void set_out(const Tensor& t) { out = heads_of(t, "out"); }
  void forward(const Tensor& q) {
    const OnDevice device(q);
    check_launch(pyfast_cuda_attention(this, device.stream()), "attention");
  }

  void set_gradients(const Tensor& dout, const Tensor& dq, const Tensor& dk, const Tensor& dv) {
    this->dout = heads_of(dout, "dout");
    this->dq = heads_of(dq, "dq"), this->dk = heads_of(dk, "dk"), this->dv = heads_of(dv, "dv");
  }
  void backward(const Tensor& q, Tensor* dbias) {
    Tensor delta = per_query(q), dscores;
    this->delta = delta.mutable_data_ptr<float>();
    if (dbias) {
      std::copy_n(dbias->sizes().begin(), 4, dbias_sizes);
      const bool whole = dbias->numel() == batch * heads * sq * sk;
      dscores = whole ? *dbias : make_empty(q, {batch, heads, sq, sk}, ScalarType::Float);
      this->dbias = dbias->mutable_data_ptr<float>(), this->dscores = dscores.mutable_data_ptr<float>();
    }
    const OnDevice device(q);
    check_launch(pyfast_cuda_attention_backward(this, device.stream()), "attention_backward");
  }
};

}  // namespace

PYFAST_CUDA_IMPL(m) {
  m.impl("attention", TORCH_BOX(&attention_op<Call>));
  m.impl("attention_backward", TORCH_BOX(&attention_backward_op<Call>));
}

}  // namespace pyfast
