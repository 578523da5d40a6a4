// What the head and its loss do whatever the element type: listing the rows that count, and making losses of what the
// product left of each row.
#include "cuda/linear_cross_entropy.cuh"

namespace pyfast::cuda {
namespace {

constexpr int kCountThreads = 512;

// The rows that count, in order, and their number; loss and lse of the others. One block: 16,384 rows are 32 rounds.
__global__ void __launch_bounds__(kCountThreads) counting_kernel(const __grid_constant__ HeadLaunch l) {
  PYFAST_SHARED(shared);
  int* const of_warps = reinterpret_cast<int*>(shared);
  const LinearCrossEntropy& a = l.a;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t total = 0;
  for (int64_t first = 0; first < a.rows; first += kCountThreads) {
    const int64_t row = first + threadIdx.x;
    const bool counts = row < a.rows && a.target[row] != a.ignore_index;
    const uint32_t votes = __ballot_sync(~0u, counts);
    if (lane == 0) of_warps[warp] = __popc(votes);
    __syncthreads();
    int64_t before = total + __popc(votes & ((1u << lane) - 1));
    for (int w = 0; w < kCountThreads / 32; ++w) {
      if (w < warp) before += of_warps[w];
      total += of_warps[w];
    }
    if (counts)
      l.at<int64_t>(Memory::index)[before] = row;
    else if (row < a.rows)
      a.loss[row] = a.lse[row] = 0.0;
    __syncthreads();  // all have read the warps' counts
  }
  if (threadIdx.x == 0) *l.at<int64_t>(Memory::counted) = total;
}

// Joins the tiles of kRowsOfBlock rows: a thread has every 32nd tile of one row
__global__ void __launch_bounds__(kHeadThreads) losses_kernel(const __grid_constant__ HeadLaunch l) {
  PYFAST_SHARED(shared);
  double* const of_warps = reinterpret_cast<double*>(shared);
  const LinearCrossEntropy& a = l.a;
  const int row_in_block = threadIdx.x % kRowsOfBlock, warp = threadIdx.x / 32;
  const int64_t r = int64_t(blockIdx.x) * kRowsOfBlock + row_in_block, rows = l.here();
  if (r - row_in_block >= rows) return;
  const bool counts = r < rows, smoothing = a.label_smoothing > 0.0;
  // over the threads of a row, to all of them
  const auto join = [&](double x, auto add) {
    x = add(x, __shfl_xor_sync(~0u, x, 8));
    x = add(x, __shfl_xor_sync(~0u, x, 16));
    __syncthreads();  // what was joined before has been read
    if (threadIdx.x % 32 < kRowsOfBlock) of_warps[warp * kRowsOfBlock + row_in_block] = x;
    __syncthreads();
    x = of_warps[row_in_block];
    for (int w = 1; w < kHeadThreads / 32; ++w) x = add(x, of_warps[w * kRowsOfBlock + row_in_block]);
    return x;
  };
  const auto sum_of = [](double x, double y) { return x + y; };
  const auto for_tiles = [&](auto f) {
    if (!counts) return;
#pragma unroll 4
    for (int64_t t = threadIdx.x / kRowsOfBlock; t < l.tiles; t += kHeadThreads / kRowsOfBlock) f(t * l.chunk + r);
  };
  const TileState* const states = l.at<TileState>(Memory::states);
  float own = -INFINITY;
  for_tiles([&](int64_t at) { own = fmaxf(own, states[at].max); });
  const float largest = float(join(own, [](double x, double y) { return x < y ? y : x; }));
  const float shift = largest == -INFINITY ? 0.f : largest;
  double sum = 0.0, below = 0.0, weights = 0.0;
  for_tiles([&](int64_t at) {
    const TileState s = states[at];
    sum += s.sum * expf(s.max - shift);
    if (!smoothing) return;
    const TileSmoothing w = l.at<TileSmoothing>(Memory::below)[at];
    below += w.below, weights += w.weights;
    if (w.weights != 0.f) below += double(w.weights) * ((s.max == -INFINITY ? 0.f : s.max) - shift);
  });
  sum = join(sum, sum_of);
  if (smoothing) below = join(below, sum_of), weights = join(weights, sum_of);
  if (!counts || threadIdx.x >= kRowsOfBlock) return;

  const int64_t row = l.index()[r], target = a.target[row];
  const bool inside = target >= 0 && target < a.classes;
  const float z_target = inside ? l.at<float>(Memory::target_logit)[r] : NAN;
  const double smooth = a.label_smoothing, w = a.class_weight && inside ? a.class_weight[target] : 1.0;
  // the two terms of lse = largest + log_sum are kept apart: lse - z keeps its digits under a large maximum
  const double log_sum = log(sum), lse = largest + log_sum;
  double loss = (1.0 - smooth) * w * ((double(largest) - z_target) + log_sum);
  if (smoothing) loss += smooth / double(a.classes) * (weights * log_sum - below);
  a.loss[row] = loss, a.lse[row] = lse;
  if (!a.upstream) return;
  const double upstream = a.upstream[2 * row], scale = a.logit_scale;
  const double hard = upstream * (1.0 - smooth) * w, soft = upstream * (smooth / double(a.classes));
  const double square = 2.0 * a.upstream[2 * row + 1] * lse + 0.0 * z_target;  // NaN for a target out of range
  const double p = exp(double(z_target) - shift) / sum;
  l.at<LogitGradient>(Memory::rows)[r] = {shift, float(scale * (hard + soft * weights + square) / sum),
                                          float(scale * soft),
                                          float(scale * (hard * (p - 1.0) + square * p + soft * (weights * p - w)))};
}

template <class T>
int sizes(const LinearCrossEntropy& a, int64_t (&bytes)[kMemories]) {
  HeadLaunch l;
  if (int e = HeadLaunch::make<T>(l, a)) return e;
  l.template sizes<T>(bytes);
  return 0;
}

}  // namespace

int launch_counting(const HeadLaunch& l, void* stream) {
  return launch(counting_kernel, Shape{1, kCountThreads, kCountThreads / 32 * 4}, l, stream);
}
int launch_losses(const HeadLaunch& l, void* stream) {
  return launch(losses_kernel, Shape{(l.chunk + kRowsOfBlock - 1) / kRowsOfBlock, kHeadThreads, kHeadThreads / 32 * 64},
                l, stream);
}

}  // namespace pyfast::cuda

using namespace pyfast;
using namespace pyfast::cuda;

extern "C" int pyfast_cuda_linear_cross_entropy_memory(const LinearCrossEntropy* a, int64_t (&bytes)[kMemories]) {
  return a->dtype == DType::fp32 ? sizes<float>(*a, bytes) : sizes<bf16>(*a, bytes);
}

extern "C" int pyfast_cuda_linear_cross_entropy(const LinearCrossEntropy* a, void* stream) {
  if (a->rows == 0) return 0;
  return a->dtype == DType::fp32   ? head_fp32(*a, stream)
         : a->dtype == DType::bf16 ? head_bf16(*a, stream)
                                   : head_fp16(*a, stream);
}
