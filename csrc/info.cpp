// How this build was made and what this CPU has; for `pyfast doctor` and benchmark records.
#include <pybind11/pybind11.h>

#ifndef PYFAST_TORCH_VERSION
#define PYFAST_TORCH_VERSION "unknown"
#endif

namespace py = pybind11;

PYBIND11_MODULE(_info, m) {
  m.doc() = "Build and CPU information of PyFast's native libraries.";
  m.def("build", [] {
    py::dict d;
    d["compiler"] = "g++ " __VERSION__;
    d["torch"] = PYFAST_TORCH_VERSION;
    return d;
  });
  m.def("cpu_features", [] {
    __builtin_cpu_init();
    py::dict d;
#define FEATURE(name) d[name] = bool(__builtin_cpu_supports(name))
    FEATURE("avx2");
    FEATURE("fma");
    FEATURE("avx512f");
    FEATURE("avx512bw");
    FEATURE("avx512bf16");
    FEATURE("avx512vnni");
    return d;
  });
}
