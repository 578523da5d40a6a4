#include "cuda/lora.cuh"

namespace pyfast::cuda {

int lora_fp16(const Lora& a, bool up, void* stream) {
  return up ? launch_lora<fp16, true>(a, stream) : launch_lora<fp16, false>(a, stream);
}

}  // namespace pyfast::cuda
