#include "cuda/lora.cuh"

namespace pyfast::cuda {

int lora_fp32(const Lora& a, bool up, void* stream) {
  return up ? launch_lora<float, true>(a, stream) : launch_lora<float, false>(a, stream);
}

}  // namespace pyfast::cuda
