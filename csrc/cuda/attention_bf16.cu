#include "cuda/attention.cuh"

namespace pyfast::cuda {

int attention_bf16(const Attention& a, Pass pass, void* stream) { return launch_attention<bf16>(a, pass, stream); }

}  // namespace pyfast::cuda
