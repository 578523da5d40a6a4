// The LoRA kernels by element type, and the small ones beside them: panels are filled, parts of a sum are added, and
// the activation of an MLP is applied, forward and backward.
//
// Tiling: a thread per element of a panel or a sum; 16 bytes per thread of an activation. No shared memory.
// Bound: memory. Panels are thin matrices, and the parts of a sum are read where lora_kernel left them, largely in the
// L2 cache. The activation reads gate and up and writes their product; backward it reads the product's gradient too,
// and writes both gradients and the product, which the next pass needs: 3 and 6 tensors of (rows, width), once each.
#include <cmath>

#include "cuda/lora.cuh"

namespace pyfast::cuda {
namespace {

constexpr int kThreads = 256;

Shape one_thread_each(int64_t count) { return {(count + kThreads - 1) / kThreads, kThreads, 0}; }
__device__ __forceinline__ int64_t thread_index() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }

__device__ __forceinline__ float load_as(DType t, const void* p, int64_t i) {
  return t == DType::fp32   ? static_cast<const float*>(p)[i]
         : t == DType::bf16 ? to_float(static_cast<const bf16*>(p)[i])
                            : to_float(static_cast<const fp16*>(p)[i]);
}
__device__ __forceinline__ void store_as(DType t, void* p, int64_t i, float x) {
  if (t == DType::fp32)
    static_cast<float*>(p)[i] = x;
  else if (t == DType::bf16)
    static_cast<bf16*>(p)[i] = from_float<bf16>(x);
  else
    static_cast<fp16*>(p)[i] = from_float<fp16>(x);
}

__global__ void lora_pack_kernel(const __grid_constant__ LoraPack a) {
  const int64_t i = thread_index(), row = a.first + i / a.ld, column = i % a.ld;
  if (row >= a.last) return;
  float value = 0.f;
  for (int s = 0; s < a.count; ++s) {
    const LoraSource& from = a.sources[s];
    if (row < from.at || row >= from.at + from.rows || column >= a.columns) continue;
    value = load_as(from.dtype, from.data, (row - from.at) * from.row_stride + column * from.column_stride);
  }
  store_as(a.dtype, a.panel, row * a.ld + column, value);
}

__global__ void lora_sum_kernel(const __grid_constant__ LoraSum a) {
  const int64_t i = thread_index(), row = i / a.columns, column = i % a.columns;
  if (row >= a.rows) return;
  const float* const parts = a.parts + row * a.ld + column;
  float sums[4] = {};  // shorter chains, and more loads in flight
  int64_t p = 0;
  for (; p + 4 <= a.count; p += 4)
#pragma unroll
    for (int c = 0; c < 4; ++c) sums[c] += parts[(p + c) * a.stride];
  for (; p < a.count; ++p) sums[0] += parts[p * a.stride];
  store_as(a.dtype, a.out, row * a.row_stride + column * a.column_stride, (sums[0] + sums[1]) + (sums[2] + sums[3]));
}

enum Activation { silu, gelu, gelu_tanh, relu };  // as cpu/activation.h numbers them

struct ValueSlope {
  float value, slope;
};

__device__ __forceinline__ ValueSlope activate(int activation, float x) {
  // sigmoid(z) and 1 - sigmoid(z), neither by cancellation
  const auto sigmoids = [](float z, float& plus, float& minus) {
    const float t = expf(-fabsf(z)), near = 1.f / (1.f + t), far = t * near;
    plus = z < 0.f ? far : near, minus = z < 0.f ? near : far;
  };
  float plus, minus;
  switch (activation) {
    case silu: {
      sigmoids(x, plus, minus);
      return {x * plus, plus + x * plus * minus};
    }
    case gelu: {
      const float cdf = 0.5f * erfcf(-0.70710678f * x);
      return {x * cdf, cdf + x * 0.39894228f * expf(-0.5f * x * x)};
    }
    case gelu_tanh: {  // (1 + tanh z) / 2 = sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3)
      constexpr float k = 1.5957691216f, c = 0.044715f;
      sigmoids(k * x * (1.f + c * x * x), plus, minus);
      return {x * plus, plus + x * plus * minus * k * (1.f + 3.f * c * x * x)};
    }
    default:  // NaN stays NaN; the slope at 0 is 0, as in torch
      return {x < 0.f ? 0.f : x, x > 0.f ? 1.f : 0.f};
  }
}

// 16 bytes of elements per thread
template <class T>
__global__ void lora_activation_kernel(const __grid_constant__ LoraActivation a) {
  constexpr int N = 16 / sizeof(T);
  const int64_t begin = thread_index() * N;
  const int count = a.count - begin < N ? int(a.count - begin) : N;
  if (count <= 0) return;
  const auto read = [&](const void* from, T(&to)[N]) {
    if (!from) return;
    const T* p = static_cast<const T*>(from) + begin;
    if (count == N && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
      const Vector v = *reinterpret_cast<const Vector*>(p);
      memcpy(to, &v, 16);
      return;
    }
#pragma unroll  // registers have no index
    for (int i = 0; i < N; ++i)
      if (i < count) to[i] = p[i];
  };
  const auto write = [&](void* to, const T(&from)[N]) {
    if (!to) return;
    T* p = static_cast<T*>(to) + begin;
    if (count == N && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
      Vector v;
      memcpy(&v, from, 16);
      *reinterpret_cast<Vector*>(p) = v;
      return;
    }
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) p[i] = from[i];
  };
  T gate[N], up[N], da[N], result[N], dgate[N], dup[N];
  read(a.gate, gate), read(a.up, up), read(a.da, da);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const ValueSlope f = activate(a.activation, to_float(a.gate ? gate[i] : up[i]));
    const float u = a.gate ? to_float(up[i]) : 1.f;
    result[i] = from_float<T>(f.value * u);
    if (!a.da) continue;
    const float d = to_float(da[i]);
    dgate[i] = from_float<T>(d * u * f.slope);
    dup[i] = a.gate ? from_float<T>(d * f.value) : dgate[i];
  }
  write(a.a, result);
  if (!a.da) return;
  if (a.gate) write(a.dgate, dgate);
  write(a.dup, dup);
}

int strip(const Lora& a, bool up, void* stream) {
  return a.dtype == DType::fp32   ? lora_fp32(a, up, stream)
         : a.dtype == DType::bf16 ? lora_bf16(a, up, stream)
                                  : lora_fp16(a, up, stream);
}

}  // namespace
}  // namespace pyfast::cuda

using namespace pyfast;
using namespace pyfast::cuda;

extern "C" int pyfast_cuda_lora_down(const Lora* a, void* stream) { return strip(*a, false, stream); }
extern "C" int pyfast_cuda_lora_up(const Lora* a, void* stream) { return strip(*a, true, stream); }

extern "C" int pyfast_cuda_lora_pack(const LoraPack* a, void* stream) {
  const int64_t elements = (a->last - a->first) * a->ld;
  return elements == 0 ? 0 : launch(lora_pack_kernel, one_thread_each(elements), *a, stream);
}

extern "C" int pyfast_cuda_lora_sum(const LoraSum* a, void* stream) {
  const int64_t elements = a->rows * a->columns;
  return elements == 0 ? 0 : launch(lora_sum_kernel, one_thread_each(elements), *a, stream);
}

extern "C" int pyfast_cuda_lora_activation(const LoraActivation* a, void* stream) {
  if (a->count == 0) return 0;
  const auto kernel = a->dtype == DType::fp32   ? lora_activation_kernel<float>
                      : a->dtype == DType::bf16 ? lora_activation_kernel<bf16>
                                                : lora_activation_kernel<fp16>;
  const int64_t per_thread = 16 / size_of(a->dtype);
  return launch(kernel, one_thread_each((a->count + per_thread - 1) / per_thread), *a, stream);
}
