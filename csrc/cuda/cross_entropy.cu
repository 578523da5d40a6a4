#include "cuda/cross_entropy.cuh"

using namespace pyfast;

extern "C" int pyfast_cuda_cross_entropy(DType dtype, const cuda::CrossEntropy* a, void* stream) {
  switch (dtype) {
    case DType::fp32:
      return cuda::launch_cross_entropy<float>(*a, stream);
    case DType::bf16:
      return cuda::launch_cross_entropy<bf16>(*a, stream);
    default:
      return cuda::launch_cross_entropy<fp16>(*a, stream);
  }
}
