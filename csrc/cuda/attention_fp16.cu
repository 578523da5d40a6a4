#include "cuda/attention.cuh"

namespace pyfast::cuda {

int attention_fp16(const Attention& a, Pass pass, void* stream) { return launch_attention<fp16>(a, pass, stream); }

}  // namespace pyfast::cuda
