#include "cuda/attention90.cuh"

namespace pyfast::cuda {

int attention90_fp16(const Attention& a, void* stream) { return launch_attention90<fp16>(a, stream); }

}  // namespace pyfast::cuda
