// How a kernel is written and started, on a GPU by nvcc and on a CPU by the emulator (PYFAST_EMULATOR). Kernels take
// one struct of arguments and use dynamic shared memory only.
#pragma once
#include <cstdint>

#include "common/types.h"
#if defined(PYFAST_EMULATOR)
#include "emulator/cuda_on_cpu.h"
#else
#include <cuda_runtime.h>
#endif

namespace pyfast::cuda {

// The device that a launch goes to.
struct Device {
  int architecture;  // 80, 90
  int shared_bytes;  // that one block may have
  int processors;
};
struct Shape {
  int64_t blocks;
  int threads;
  int shared_bytes;
  int cluster = 1;  // so many consecutive blocks run together
};

#if defined(PYFAST_EMULATOR)

#define PYFAST_SHARED(name) unsigned char* name = ::simt::current->block->shared

inline int get_device(Device& d) {
  d.architecture = simt::options().architecture;
  d.shared_bytes = d.architecture == 80 ? 163 << 10 : 227 << 10;
  d.processors = 4;  // few, so that the blocks of a kernel that stays have several tiles each
  return 0;
}
template <class Arguments>
int launch(void (*kernel)(Arguments), const Shape& s, const Arguments& arguments, void* /*stream*/) {
  return simt::launch({{unsigned(s.blocks), 1, 1}, {unsigned(s.threads), 1, 1}, size_t(s.shared_bytes), s.cluster},
                      [&] { kernel(arguments); });
}
inline const char* error_string(int) { return simt::last_error(); }

#else

#define PYFAST_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

inline int get_device(Device& d) {
  int device, major, minor;
  if (int e = cudaGetDevice(&device)) return e;
  if (int e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return e;
  if (int e = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)) return e;
  d.architecture = 10 * major + minor;
  if (int e = cudaDeviceGetAttribute(&d.processors, cudaDevAttrMultiProcessorCount, device)) return e;
  return cudaDeviceGetAttribute(&d.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}
template <class Arguments>
int launch(void (*kernel)(Arguments), const Shape& s, const Arguments& arguments, void* stream) {
  if (s.shared_bytes > 48 << 10)
    if (int e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, s.shared_bytes)) return e;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(s.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(s.blocks)), config.blockDim = dim3(unsigned(s.threads));
  config.dynamicSmemBytes = s.shared_bytes, config.stream = static_cast<cudaStream_t>(stream);
  if (s.cluster > 1) config.attrs = &cluster, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}
inline const char* error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

#endif

}  // namespace pyfast::cuda
