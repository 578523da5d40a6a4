#include "cuda/attention.cuh"

namespace pyfast::cuda {

int attention_fp32(const Attention& a, Pass pass, void* stream) { return launch_attention<float>(a, pass, stream); }

}  // namespace pyfast::cuda
