#include "cuda/lora.cuh"

namespace pyfast::cuda {

int lora_bf16(const Lora& a, bool up, void* stream) {
  return up ? launch_lora<bf16, true>(a, stream) : launch_lora<bf16, false>(a, stream);
}

}  // namespace pyfast::cuda
