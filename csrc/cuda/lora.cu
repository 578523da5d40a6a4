// The LoRA kernels by element type, and the small ones beside them: panels are filled, parts of a sum are added, and
// the activation of an MLP is applied, forward and backward.
//
// Tiling: a thread per element of a panel or a sum; 16 bytes per thread of an activation. No shared memory.
// Bound: memory. Panels are thin matrices, and the parts of a sum are read where lora_kernel left them, largely in the
// L2 cache. The activation reads gate and up and writes their product; backward it reads the product's gradient too,
// and writes both gradients and the product, which the next pass needs: 3 and 6 tensors of (rows, width), once each.
#include <algorithm>
#include <cmath>

#include "cuda/lora.cuh"
#include "cuda/lora90.cuh"

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

constexpr int kGranules = 32;  // of a launch
struct OperandLaunch {
  LoraOperand a;
  int64_t first, ld;  // granule; columns of out
  struct {
    int64_t column;
    int count;
    float scale;
  } granules[kGranules];
};
__global__ void lora_operand_kernel(const __grid_constant__ OperandLaunch l) {
  const int width = l.a.granule_count * kLoraGranule;
  const int64_t i = thread_index(), row = i / width;
  const int column = int(i % width), k = column % kLoraGranule;
  if (row >= l.a.rows) return;
  const auto& g = l.granules[column / kLoraGranule];
  const float value = k < g.count ? g.scale * l.a.h[row * l.a.rank + g.column + k] : 0.f;
  store_as(l.a.dtype, l.a.out, row * l.ld + l.first * kLoraGranule + column, value);
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

extern "C" int pyfast_cuda_lora_operand(const LoraOperand* a, void* stream) {
  OperandLaunch l{*a, 0, int64_t(a->granule_count) * kLoraGranule, {}};
  for (; l.first < a->granule_count; l.first += l.a.granule_count) {
    l.a.granule_count = std::min(a->granule_count - int(l.first), kGranules);
    for (int g = 0; g < l.a.granule_count; ++g) {
      const LoraGranule& from = a->granules[l.first + g];
      l.granules[g] = {from.column, from.count, from.scale};
    }
    const int64_t elements = a->rows * l.a.granule_count * kLoraGranule;
    if (elements == 0) return 0;
    if (int e = launch(lora_operand_kernel, one_thread_each(elements), l, stream)) return e;
  }
  return 0;
}

// Which of the two forms a large product on sm_90a, our own or torch's GEMM beside `up`: for hardware to decide. Its
// own bound is the lower one (lora90.cuh), and cuBLAS's products may be the faster ones; neither was timed.
constexpr bool kOwnProducts = true;

extern "C" int pyfast_cuda_lora_product_serves(const LoraProduct* a, bool* serves) {
  *serves = false;
  Device device;
  if (int e = get_device(device)) return e;
  if (!kOwnProducts || device.architecture != 90 || a->dtype == DType::fp32) return 0;
  // what TMA can copy
  const auto copies = [](const void* data, int64_t rows, int64_t columns, int64_t ld) {
    constexpr int64_t kMost = int64_t(1) << 30;
    return data && reinterpret_cast<uintptr_t>(data) % 16 == 0 && ld % 8 == 0 && ld >= columns && rows > 0 &&
           columns > 0 && rows < kMost && columns < kMost;
  };
  using L = Lora90<bf16>;
  int64_t tiles = 0;
  for (int r = 0; r < a->result_count; ++r) {
    const LoraResult& result = a->results[r];
    if (result.term_count >= kLoraTerms || !copies(result.data, a->rows, result.columns, result.columns)) return 0;
    for (int i = 0; i < result.term_count; ++i) {
      const LoraTerm& t = result.terms[i];
      const int64_t rows = t.deep ? t.depth : result.columns, columns = t.deep ? result.columns : t.depth;
      if (!copies(t.a, a->rows, t.depth, t.a_ld) || !copies(t.b, rows, columns, t.b_ld)) return 0;
    }
    tiles += (a->rows + L::kBlocks * L::kRows - 1) / (L::kBlocks * L::kRows) * L::tiles(result.columns);
  }
  // with fewer tiles, half of the processors and more would idle, and cuBLAS has smaller tiles and splits depths
  *serves = 2 * tiles * L::kBlocks >= device.processors;
  return 0;
}

extern "C" int pyfast_cuda_lora_product(const LoraProduct* a, void* stream) {
  Device device;
  if (int e = get_device(device)) return e;
  return a->dtype == DType::bf16 ? lora90_bf16(*a, device.processors, stream)
                                 : lora90_fp16(*a, device.processors, stream);
}

extern "C" int pyfast_cuda_lora_activation(const LoraActivation* a, void* stream) {
  if (a->count == 0) return 0;
  const auto kernel = a->dtype == DType::fp32   ? lora_activation_kernel<float>
                      : a->dtype == DType::bf16 ? lora_activation_kernel<bf16>
                                                : lora_activation_kernel<fp16>;
  const int64_t per_thread = 16 / size_of(a->dtype);
  return launch(kernel, one_thread_each((a->count + per_thread - 1) / per_thread), *a, stream);
}
