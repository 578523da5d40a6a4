// The arithmetic of mma.sync: products in fp32, added to the accumulator after each other.
#include <cstdint>

namespace pyfast::cuda {

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
__attribute__((target_clones("default", "arch=haswell")))
#endif
void emulated_mma(const float (*a)[16], const float (*b)[16], float (*d)[8]) {
  float columns[16][8];
  for (int k = 0; k < 16; ++k)
    for (int j = 0; j < 8; ++j) columns[k][j] = b[j][k];
  for (int i = 0; i < 16; ++i) {
    float sum[8] = {};
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) sum[j] += a[i][k] * columns[k][j];
    for (int j = 0; j < 8; ++j) d[i][j] += sum[j];
  }
}

}  // namespace pyfast::cuda
