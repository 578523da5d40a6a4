#include "cuda/attention90.cuh"

namespace pyfast::cuda {

int attention90_bf16(const Attention& a, void* stream) { return launch_attention90<bf16>(a, stream); }

}  // namespace pyfast::cuda
