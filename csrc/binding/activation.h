#pragma once
#include <string>

#include "binding/binding.h"
#include "cpu/activation.h"

namespace pyfast {

inline Activation activation_of(const std::string& name) {
  constexpr const char* kNames[] = {"silu", "gelu", "gelu_tanh", "relu"};
  for (int i = 0; i < 4; ++i)
    if (name == kNames[i]) return Activation(i);
  STD_TORCH_CHECK(false, "there is no activation ", name);
  return Activation::silu;
}

}  // namespace pyfast
