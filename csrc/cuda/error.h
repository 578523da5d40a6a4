// What an error code of a pyfast_cuda_* function means.
#pragma once
extern "C" const char* pyfast_cuda_error(int code);
