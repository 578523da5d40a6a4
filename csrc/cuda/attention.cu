// The passes of attention by element type, and the small reductions of its backward: the gradients of sinks and of a
// bias that was broadcast.
#include "cuda/attention90.cuh"

namespace pyfast::cuda {
namespace {

constexpr int kReductionThreads = 256;

// The sum over a block's threads, in every one of them
template <class Number>
__device__ Number block_sum(Number x, void* memory) {
  Number* const shared = static_cast<Number*>(memory);
  for (int by = 16; by; by /= 2) x += __shfl_xor_sync(~0u, x, by);
  __syncthreads();  // the last sum has been read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  Number sum = 0;
  for (int w = 0; w < kReductionThreads / 32; ++w) sum += shared[w];
  return sum;
}

// dsink = -sum p_sink delta over the queries of a head; a block per head
__global__ void dsinks_kernel(const __grid_constant__ AttentionLaunch l) {
  PYFAST_SHARED(shared);
  const Attention& a = l.a;
  const int64_t head = blockIdx.x;
  const float sink = a.sinks[head];
  double sum = 0.0;  // a number per head: its digits cost nothing
  for (int64_t at = threadIdx.x; at < a.batch * a.sq && sink != -INFINITY; at += kReductionThreads) {
    const int64_t row = (at / a.sq * a.heads + head) * a.sq + at % a.sq;
    sum -= exp(double(sink - a.maximum[row]) - a.log_sum[row]) * a.delta[row];
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) a.dsinks[head] = float(sum);
}

// The sum of dscores over the dimensions in which dbias has one element: by a block per element of dbias where there
// are many terms, by a thread per element where there are few
template <bool kBlock>
__global__ void dbias_kernel(const __grid_constant__ AttentionLaunch l) {
  PYFAST_SHARED(shared);
  const Attention& a = l.a;
  const int64_t full[4] = {a.batch, a.heads, a.sq, a.sk};
  int64_t count = 1, terms = 1, at = kBlock ? blockIdx.x : int64_t(blockIdx.x) * kReductionThreads + threadIdx.x;
  for (int i = 0; i < 4; ++i) count *= a.dbias_sizes[i], terms *= a.dbias_sizes[i] == 1 ? full[i] : 1;
  if (at >= count) return;
  int64_t base = 0, rest = at, stride = 1;
  for (int i = 3; i >= 0; --i) {
    base += rest % a.dbias_sizes[i] * stride;
    rest /= a.dbias_sizes[i], stride *= full[i];
  }
  double sum = 0.0;
  for (int64_t term = kBlock ? threadIdx.x : 0; term < terms; term += kBlock ? kReductionThreads : 1) {
    int64_t from = base, left = term;
    stride = 1;
    for (int i = 3; i >= 0; --i) {
      if (a.dbias_sizes[i] == 1) from += left % full[i] * stride, left /= full[i];
      stride *= full[i];
    }
    sum += a.dscores[from];
  }
  if (kBlock) sum = block_sum(sum, shared);
  if (!kBlock || threadIdx.x == 0) a.dbias[at] = float(sum);
}

// On sm_90a by wgmma wherever those kernels can compute what is asked for. That they are the faster ones, of few rows
// too, which leave most of a block's 128 or 192 empty, is arithmetic: hardware decides.
int run(const Attention& a, Pass pass, void* stream) {
  Device device;
  if (int e = get_device(device)) return e;
  if (device.architecture == 90 && attention90_serves(a, pass))
    return a.dtype == DType::bf16 ? attention90_bf16(a, pass, stream) : attention90_fp16(a, pass, stream);
  return a.dtype == DType::fp32   ? attention_fp32(a, pass, stream)
         : a.dtype == DType::bf16 ? attention_bf16(a, pass, stream)
                                  : attention_fp16(a, pass, stream);
}

int reduce_dbias(const Attention& a, void* stream) {
  int64_t count = 1;
  for (int64_t n : a.dbias_sizes) count *= n;
  if (count == 0) return 0;
  const int64_t terms = a.batch * a.heads * a.sq * a.sk / count;
  const bool block = terms > 64;
  return launch(block ? dbias_kernel<true> : dbias_kernel<false>,
                Shape{block ? count : (count + kReductionThreads - 1) / kReductionThreads, kReductionThreads, 64},
                AttentionLaunch{a}, stream);
}

}  // namespace
}  // namespace pyfast::cuda

using namespace pyfast::cuda;

extern "C" int pyfast_cuda_attention(const Attention* a, void* stream) { return run(*a, Pass::forward, stream); }

extern "C" int pyfast_cuda_attention_backward(const Attention* a, void* stream) {
  if (int e = run(*a, Pass::dq, stream)) return e;
  if (int e = run(*a, Pass::dkv, stream)) return e;
  if (a->sinks)
    if (int e = launch(dsinks_kernel, Shape{a->heads, kReductionThreads, 64}, AttentionLaunch{*a}, stream)) return e;
  return a->dscores && a->dbias != a->dscores ? reduce_dbias(*a, stream) : 0;
}
