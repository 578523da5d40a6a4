// The plain C interface of the LoRA kernels: no torch, no CUDA header.
#pragma once
#include <cstdint>

#include "common/types.h"

namespace pyfast::cuda {

// A panel holds thin matrices, of a few rows each, under each other: every one begins at a multiple of kLoraGranule
// rows. Its elements have the activations' dtype, its rows `ld` of them, and what no matrix covers is zero.
constexpr int kLoraGranule = 16;
constexpr int kLoraSources = 16;

// `rows` rows of the panel from row `at` on, columns as the panel has
struct LoraSource {
  const void* data;
  DType dtype;
  int64_t rows, row_stride, column_stride, at;
};
struct LoraPack {
  LoraSource sources[kLoraSources];  // by `at`
  int count;
  DType dtype;
  void* panel;
  int64_t first, last;  // rows of the panel to be written
  int64_t columns, ld;
};

// 16 rows of a panel, all of one adapter
struct LoraGranule {
  int64_t column;  // in h, of the granule's first row
  int count;       // so many rows belong to h's columns
  int adapter;
  float scale;
  const int64_t* seed;  // on the device; of its adapter's dropout
};

// What a block walks over is cut into strips of rows and parts of columns.
constexpr int64_t kLoraColumns = 64;  // of a tile
inline int64_t lora_strip_rows(DType t) { return t == DType::fp32 ? 128 : 256; }
inline int64_t lora_strips(DType t, int64_t rows) { return (rows + lora_strip_rows(t) - 1) / lora_strip_rows(t); }
inline int64_t lora_tiles(int64_t columns) { return (columns + kLoraColumns - 1) / kLoraColumns; }
// Enough parts to fill a large GPU, of at least four tiles each. A fixed number: the same bits on every GPU.
inline int64_t lora_parts(DType t, int64_t rows, int64_t columns) {
  const int64_t strips = lora_strips(t, rows), tiles = lora_tiles(columns);
  const int64_t wanted = (512 + strips - 1) / (strips > 0 ? strips : 1), most = (tiles + 3) / 4;
  return wanted < most ? wanted : most > 0 ? most : 1;
}

// x (rows, columns) and y are contiguous, h is (rows, rank). `h's` operand is scale times it, rounded to dtype; with
// dropout, D is 0 or 1 for each element of (rows, columns), by each adapter's seed.
struct Lora {
  DType dtype;
  int64_t rows, columns;
  const void* x;      // or null where it is not needed
  const void* panel;  // (16 granules, ld)
  int64_t ld;
  const LoraGranule* granules;  // on the host
  int granule_count;
  int64_t ones;    // the panel's row at which h is 1, or -1
  const float* h;  // or null where it is not needed
  int64_t rank;
  bool dropout;
  double dropout_p;

  // down: (D x) panel^T times scale, in parts over the columns: (lora_parts, rows, down_rank), h's column `down_column`
  // first
  float* down;
  int64_t down_rank, down_column;
  // outer: h^T (D x), in parts over the rows: (lora_strips, 16 granules, ld); or null; beside down, without dropout
  float* outer;
  // up: D (h panel), added to what is there or not; or null
  void* y;
  bool accumulate;
};

// h as an operand: (rows, 16 granules) in the dtype, a granule's scale times its columns of h, and zeros
struct LoraOperand {
  DType dtype;
  int64_t rows, rank;
  const float* h;
  const LoraGranule* granules;  // on the host
  int granule_count;
  void* out;
};

// The sum of products of which several make a result, all of the same rows, in one launch; sm_90a.
constexpr int kLoraTerms = 8;    // of a result, and of a launch
constexpr int kLoraResults = 4;  // of a launch

// a (rows, depth) times b, which has a row for each column of the result, (columns, depth), or, `deep`, for each depth,
// (depth, columns). Rows are `ld` elements apart.
struct LoraTerm {
  const void *a, *b;  // b: null for a matrix that has neither contiguous rows nor columns, or no element
  int64_t a_ld, b_ld, depth;
  bool deep;
};
// (rows, columns), contiguous
struct LoraResult {
  void* data;
  int64_t columns;
  const void* bias;  // (columns,), or null
  DType bias_dtype;
  int64_t bias_stride;
  const LoraTerm* terms;  // on the host
  int term_count;
};
struct LoraProduct {
  DType dtype;
  int64_t rows;
  const LoraResult* results;  // on the host
  int result_count;
};

// out[i, j] = the sum of parts[p, i, j]
struct LoraSum {
  const float* parts;  // rows `ld` apart
  int64_t count, stride, rows, columns, ld;
  DType dtype;
  void* out;
  int64_t row_stride, column_stride;
};

// activation(gate) up, or activation(up) without a gate; backward, where `da` is given, with da's gradients
struct LoraActivation {
  DType dtype;
  int activation;  // silu, gelu, gelu_tanh, relu
  int64_t count;
  const void *gate, *up;
  void* a;  // or null
  const void* da;
  void *dgate, *dup;
};

}  // namespace pyfast::cuda

extern "C" {
// 0, or a code for pyfast_cuda_error
int pyfast_cuda_lora_pack(const pyfast::cuda::LoraPack* arguments, void* stream);
int pyfast_cuda_lora_down(const pyfast::cuda::Lora* arguments, void* stream);  // down, and outer where asked for
int pyfast_cuda_lora_up(const pyfast::cuda::Lora* arguments, void* stream);    // up and outer, where asked for
int pyfast_cuda_lora_sum(const pyfast::cuda::LoraSum* arguments, void* stream);
int pyfast_cuda_lora_operand(const pyfast::cuda::LoraOperand* arguments, void* stream);
// serves = whether this device has a kernel of our own for the product, better than torch's GEMM and `up`
int pyfast_cuda_lora_product_serves(const pyfast::cuda::LoraProduct* arguments, bool* serves);
int pyfast_cuda_lora_product(const pyfast::cuda::LoraProduct* arguments, void* stream);
int pyfast_cuda_lora_activation(const pyfast::cuda::LoraActivation* arguments, void* stream);
}
