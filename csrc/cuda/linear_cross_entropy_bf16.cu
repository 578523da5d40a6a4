#include "cuda/linear_cross_entropy.cuh"

namespace pyfast::cuda {

int head_bf16(const LinearCrossEntropy& a, void* stream) { return launch_head<bf16>(a, stream); }

}  // namespace pyfast::cuda
