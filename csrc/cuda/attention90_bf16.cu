#include "cuda/attention90_backward.cuh"

namespace pyfast::cuda {

int attention90_bf16(const Attention& a, Pass pass, void* stream) {
  return pass == Pass::forward ? launch_attention90<bf16>(a, stream) : launch_backward90<bf16>(a, pass, stream);
}

}  // namespace pyfast::cuda
