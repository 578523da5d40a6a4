#include "cuda/lora90.cuh"

namespace pyfast::cuda {

int lora90_bf16(const LoraProduct& product, int processors, void* stream) {
  return launch_lora90<bf16>(product, processors, stream);
}

}  // namespace pyfast::cuda
