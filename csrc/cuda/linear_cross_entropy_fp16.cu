#include "cuda/linear_cross_entropy.cuh"

namespace pyfast::cuda {

int head_fp16(const LinearCrossEntropy& a, void* stream) { return launch_head<fp16>(a, stream); }

}  // namespace pyfast::cuda
