// The loss of a frozen head without its logits, on AMX: FlashAttention's online softmax (Dao et al. 2022), with the
// vocabulary as keys and the weight as both keys and values. For a block of the vocabulary at a time,
//   z = x Wbᵀ;  m, s: running maximum and sum of exponentials;  acc = acc exp(m_old - m) + exp(z - m) Wb
// so that each block is read and packed once for all rows, and two products are all that is computed. At the end
//   dx = (a h + 2 b lse) acc / s, with the target's term, whose -1 would drown in the rounding of bf16, added in fp32.
// (a, b, h: cross_entropy.cpp.) Operands of the products lie tile by tile, in the order in which they are multiplied.
#include "cpu/linear_cross_entropy.h"

#ifdef __AVX512F__
#include <algorithm>
#include <vector>

#include "cpu/amx.h"
#include "cpu/gemm.h"
#include "cpu/logits.h"
#include "cpu/parallel.h"

namespace pyfast::avx512 {
namespace {

constexpr int64_t kRows = 128;     // per task at most: the more, the less often a block of the weight is read
constexpr int64_t kTasks = 8;      // or a multiple: shared evenly by 2, 4 or 8 threads
constexpr int64_t kColumns = 512;  // of the vocabulary per block
constexpr int64_t kColumnTiles = kColumns / kTile;
constexpr int64_t kGroupBytes = 32 << 20;  // of x and acc: more rows go in several groups

// Two rows (columns) of tiles that are contiguous along the depth
TilePair rows_of_tiles(const bf16* first, int64_t depth) { return {first, first + depth * kTileSize, kTileSize, 64}; }
TileBlock block_of_tiles(float* first, int64_t across) {
  return {first, first + kTileResult, first + across * kTileResult, first + (across + 1) * kTileResult, 64};
}

struct Head {
  const bf16* weight;
  int64_t classes, features, stride;
  int64_t depth() const { return features / kTileDepth; }
  int64_t tiles() const { return features / kTile; }

  // Two column tiles of Wbᵀ: tile after tile along the features
  void pack_transposed(int64_t begin, int64_t column_tile, bf16* out) const {
    int64_t row = begin + column_tile * kTile, rows = std::clamp<int64_t>(classes - row, 0, kTile);
    alignas(64) bf16 padded[kTileSize];
    for (int64_t k = 0; k < features; k += kTileDepth, out += kTileSize) {
      const bf16* in = weight + row * stride + k;
      int64_t in_stride = stride;
      if (rows < kTile) {
        std::memset(padded, 0, sizeof padded);
        for (int64_t i = 0; i < rows; ++i) std::memcpy(padded + i * kTileDepth, in + i * stride, kTileDepth * 2);
        in = padded;
        in_stride = kTileDepth;
      }
      for (int64_t i = 0; i < kTile; ++i) _mm_prefetch((const char*)(in + i * in_stride + 4 * kTileDepth), _MM_HINT_T0);
      transpose32(in, in_stride / 2, out, kTile, kTile, kTile);
    }
  }

  // 32 rows of Wb, as the depth of a product: a tile for each 16 features, `step` elements apart
  void pack(int64_t begin, int64_t row_tile, bf16* out, int64_t step) const {
    int64_t row = begin + row_tile * kTileDepth;
    for (int64_t p = 0; p < kTile; ++p)
      for (int64_t k = 0; k < features; k += kTileDepth) {
        auto load_row = [&](int64_t i) {
          return i < classes ? _mm512_loadu_si512(weight + i * stride + k) : _mm512_setzero_si512();
        };
        bf16* tile = out + k / kTile * step + p * kTileDepth;
        interleave(load_row(row + 2 * p), load_row(row + 2 * p + 1), tile, tile + step);
      }
  }
};

// Rows in a block of the online softmax, their state, and the tiles of x and of the sum that becomes dx.
struct RowState {
  float max = -INFINITY, target_logit = NAN;
  double sum = 0.0;
};

template <class Transform>
void softmax_block(Transform transform, const LossRows& r, int64_t begin, const float* logits, RowState& state,
                   int64_t target, bf16* exps, float* acc, int64_t acc_tiles) {
  int64_t valid = std::min(kColumns, r.classes - begin);
  fvec z[kColumnTiles], top = splat(-INFINITY);
  for (int64_t c = 0; c < kColumnTiles; ++c) {
    int lanes = int(std::clamp<int64_t>(valid - c * kTile, 0, kTile));
    z[c] = first(transform.logit(load(logits + c * kTileResult)), lanes, -INFINITY);
    top = avx512::max(z[c], top);
  }
  float largest = hmax(top);
  if (largest > state.max) {
    float factor = float(std::exp(double(state.max) - largest));
    state.sum *= factor;
    if (state.max > -INFINITY)
      for (int64_t t = 0; t < acc_tiles; ++t) store(acc + t * kTileResult, load(acc + t * kTileResult) * factor);
    state.max = largest;
  }
  float shift = state.max == -INFINITY ? 0.f : state.max;
  int64_t at = target - begin;
  bool here = at >= 0 && at < valid;
  if (here) state.target_logit = z[at / kTile][at % kTile];
  fvec sum = {};
  for (int64_t c = 0; c < kColumnTiles; c += 2) {
    fvec e[2];
    for (int k = 0; k < 2; ++k) {
      e[k] = avx512::exp(z[c + k] - shift);
      sum += e[k];
      if constexpr (Transform::sloped)  // e is 0 beyond the vocabulary, where the slope is not a number
        e[k] = e[k] == 0.f ? e[k] : e[k] * transform.slope(z[c + k]);
    }
    _mm512_storeu_si512(exps + c / 2 * kTileSize, pack_bf16(e[0], e[1]));
  }
  state.sum += hsum(sum);
  if (here) exps[at / kTileDepth * kTileSize + at % kTileDepth] = {0};  // added in fp32 at the end
}

template <class Transform>
void run(Transform transform, const LossRows& r, const bf16* x, const Head& head, bf16* dx) {
  int64_t features = head.features, group = std::max<int64_t>(kGroupBytes / (features * 6) / 64 * 64, 64);
  for (int64_t group_begin = 0; group_begin < r.rows; group_begin += group) {
    const int64_t rows = std::min(group, r.rows - group_begin);
    const int64_t tasks = (rows + kTasks * kRows - 1) / (kTasks * kRows) * kTasks;
    const int64_t height = ((rows + tasks - 1) / tasks + 2 * kTile - 1) / (2 * kTile) * (2 * kTile);  // rows per task
    const int64_t blocks = (rows + height - 1) / height, padded = blocks * height;
    const int64_t* index = r.index + group_begin;
    Scratch<bf16> a(padded * features), transposed(kColumns * features), straight(kColumns * features);
    Scratch<float> acc(padded * features);
    std::vector<RowState> states(padded);

    parallel_for(padded / kTile, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        for (int64_t i = 0; i < kTile; ++i)
          for (int64_t k = 0; k < head.depth(); ++k) {
            bf16* out = a + (t * head.depth() + k) * kTileSize + i * kTileDepth;
            if (t * kTile + i < rows)
              std::memcpy(out, x + index[t * kTile + i] * features + k * kTileDepth, kTileDepth * 2);
            else
              std::memset(out, 0, kTileDepth * 2);
          }
      std::memset(acc + begin * kTile * features, 0, (end - begin) * kTile * features * 4);
    });

    for (int64_t begin = 0; begin < head.classes; begin += kColumns) {
      int64_t straight_tiles = kColumns / kTileDepth;
      parallel_for(straight_tiles, 1, [&](int64_t first_task, int64_t last_task) {
        for (int64_t t = first_task; t < last_task; ++t) {
          for (int64_t c = 2 * t; c < 2 * t + 2; ++c)
            head.pack_transposed(begin, c, transposed + c * head.depth() * kTileSize);
          head.pack(begin, t, straight + t * kTileSize, straight_tiles * kTileSize);
        }
      });
      parallel_for(blocks, 1, [&](int64_t first_block, int64_t last_block) {
        Tiles tiles;
        Scratch<float> logits(height * kColumns);
        Scratch<bf16> exps(height * kColumns);
        int64_t row_tiles = height / kTile, depth = head.depth();
        for (int64_t b = first_block; b < last_block; ++b) {
          const bf16* rows_a = a + b * height * features;
          for (int64_t c = 0; c < kColumnTiles; c += 2)
            for (int64_t t = 0; t < row_tiles; t += 2) {
              float* out = logits + (t * kColumnTiles + c) * kTileResult;
              multiply_tiles<true>(depth, rows_of_tiles(rows_a + t * depth * kTileSize, depth),
                                   rows_of_tiles(transposed + c * depth * kTileSize, depth),
                                   block_of_tiles(out, kColumnTiles), false);
            }
          float* sums = acc + b * height * features;
          for (int64_t i = 0; i < height && b * height + i < rows; ++i) {
            int64_t t = i / kTile, row = i % kTile;
            softmax_block(transform, r, begin, logits + t * kColumnTiles * kTileResult + row * kTile,
                          states[b * height + i], r.target[index[b * height + i]],
                          exps + t * straight_tiles * kTileSize + row * kTileDepth,
                          sums + t * head.tiles() * kTileResult + row * kTile, head.tiles());
          }
          for (int64_t f = 0; f < head.tiles(); f += 2)
            for (int64_t t = 0; t < row_tiles; t += 2) {
              float* out = sums + (t * head.tiles() + f) * kTileResult;
              multiply_tiles<true>(straight_tiles, rows_of_tiles(exps + t * straight_tiles * kTileSize, straight_tiles),
                                   rows_of_tiles(straight + f * straight_tiles * kTileSize, straight_tiles),
                                   block_of_tiles(out, head.tiles()), true);
            }
        }
      });
    }

    parallel_for(rows, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const RowState& state = states[i];
        int64_t at = index[i], y = r.target[at];
        double hard = r.weight ? r.weight[y] : 1.0, shifted = double(state.target_logit) - state.max;
        double lse = state.max + std::log(state.sum);
        r.loss[at] = hard * (std::log(state.sum) - shifted);
        r.lse[at] = lse;
        double up = r.upstream[2 * at], up_square = r.upstream[2 * at + 1], p = std::exp(shifted) / state.sum;
        fvec factor = splat(float((up * hard + 2.0 * up_square * lse) / state.sum));
        double slope = transform.slope(splat(state.target_logit))[0];
        fvec target_factor = splat(float((up * hard * (p - 1.0) + 2.0 * up_square * lse * p) * slope));
        const float* sums = acc + i / kTile * kTile * features + i % kTile * kTile;
        for (int64_t f = 0; f < head.tiles(); ++f)
          store(dx + at * features + f * kTile, load(sums + f * kTileResult) * factor +
                                                    load(head.weight + y * head.stride + f * kTile) * target_factor);
      }
    });
  }
}

}  // namespace

void frozen_linear_cross_entropy(const LossRows& r, const void* x, const void* weight, int64_t features, int64_t stride,
                                 void* dx) {
  Head head{static_cast<const bf16*>(weight), r.classes, features, stride};
  if (r.scale == 1.f && r.softcap == 0.f)
    run(Plain{}, r, static_cast<const bf16*>(x), head, static_cast<bf16*>(dx));
  else
    run(Scaled{r.scale, r.softcap}, r, static_cast<const bf16*>(x), head, static_cast<bf16*>(dx));
}

}  // namespace pyfast::avx512
#endif
