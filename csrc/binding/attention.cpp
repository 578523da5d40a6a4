#include "binding/attention.h"

#include "cpu/attention.h"

namespace pyfast {
namespace {

Strides strides_of(const Tensor& t, const char* name) {
  int64_t dims = t.dim();  // (B, H, S, D) or packed (T, H, D)
  STD_TORCH_CHECK(t.size(dims - 1) == 1 || t.stride(dims - 1) == 1 || t.numel() == 0, name,
                  " must be contiguous in its last dimension");
  if (dims == 4) return {t.stride(0), t.stride(1), t.stride(2)};
  return {0, t.stride(1), t.stride(0)};
}

// cu_seqlens as int64, checked: kernels never read out of bounds
std::vector<int64_t> bounds_of(const Tensor& t, int64_t total, const char* name) {
  std::vector<int64_t> bounds(t.numel());
  for (size_t i = 0; i < bounds.size(); ++i)
    bounds[i] = t.scalar_type() == ScalarType::Int ? static_cast<const int32_t*>(t.const_data_ptr())[i]
                                                   : static_cast<const int64_t*>(t.const_data_ptr())[i];
  bool sorted = bounds[0] == 0 && bounds.back() <= total;
  for (size_t i = 1; i < bounds.size(); ++i) sorted = sorted && bounds[i - 1] <= bounds[i];
  STD_TORCH_CHECK(sorted, name, " must begin with 0, never decrease, and end within the ", total, " rows there are");
  return bounds;
}

struct Call : AttentionCall<Attention> {
  std::vector<int64_t> q_bounds, k_bounds;

  Call(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& sinks,
       const OptionalTensor& attention_mask, const OptionalTensor& attn_bias, const OptionalTensor& seed,
       const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, auto... options)
      : AttentionCall(q, k, v, sinks, attention_mask, attn_bias, seed, cu_seqlens_q, cu_seqlens_k, options...) {
    if (packed) {
      q_bounds = bounds_of(*cu_seqlens_q, sq, "cu_seqlens_q"), k_bounds = bounds_of(*cu_seqlens_k, sk, "cu_seqlens_k");
      batch = q_bounds.size() - 1, bounds_q = q_bounds.data(), bounds_k = k_bounds.data();
    }
    this->q = q.const_data_ptr(), this->k = k.const_data_ptr(), this->v = v.const_data_ptr();
    q_strides = strides_of(q, "q"), k_strides = strides_of(k, "k"), v_strides = strides_of(v, "v");
    if (dropout_p > 0) this->seed = *static_cast<const int64_t*>(seed->const_data_ptr());
  }

  void set_out(const Tensor& t) { out = const_cast<void*>(t.const_data_ptr()), out_strides = strides_of(t, "out"); }
  void forward(const Tensor&) { attention_forward(*this); }

  void set_gradients(const Tensor& dout, Tensor& dq, Tensor& dk, Tensor& dv) {
    this->dout = dout.const_data_ptr(), dout_strides = strides_of(dout, "dout");
    this->dq = dq.mutable_data_ptr(), this->dk = dk.mutable_data_ptr(), this->dv = dv.mutable_data_ptr();
    dq_strides = strides_of(dq, "dq"), dkv_strides = strides_of(dk, "dk");
  }
  void backward(const Tensor&, Tensor* dbias) {
    if (dbias) {
      dbias_count = 1;
      for (int i = 3; i >= 0; --i) {
        dbias_strides[i] = dbias->size(i) == 1 ? 0 : dbias_count;
        dbias_count *= dbias->size(i);
      }
      this->dbias = dbias->mutable_data_ptr<float>();
    }
    attention_backward(*this, torch::stable::get_num_threads());
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfast_cpu, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention_op<Call>));
  m.impl("attention_backward", TORCH_BOX(&attention_backward_op<Call>));
}

}  // namespace pyfast
