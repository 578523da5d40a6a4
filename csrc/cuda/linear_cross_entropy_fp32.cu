#include "cuda/linear_cross_entropy.cuh"

namespace pyfast::cuda {

int head_fp32(const LinearCrossEntropy& a, void* stream) { return launch_head<float>(a, stream); }

}  // namespace pyfast::cuda
