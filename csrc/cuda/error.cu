#include "cuda/error.h"
#include "cuda/runtime.cuh"

extern "C" const char* pyfast_cuda_error(int code) { return pyfast::cuda::error_string(code); }
