// AMX tiles for bf16: C (16 x 16 fp32) += A (16 x 32) B (32 x 16), B as 16 rows of 16 pairs (b[2p, c], b[2p + 1, c]).
// All eight tiles are configured as 16 rows of 64 bytes. Written as assembly, so that one AVX-512 object holds the AMX
// path too; it runs only where current_isa() is Isa::amx (such CPUs have AVX512-BF16 as well). A thread opens a Tiles
// object around its use.
#pragma once
#include <utility>

#include "cpu/vec.h"

#ifdef __AVX512F__
namespace pyfast::PYFAST_ISA {
namespace {

constexpr int kTile = 16;         // rows of A and C, columns of B and C
constexpr int kTileDepth = 32;    // columns of A
constexpr int kTileSize = 512;    // bf16 elements of an A or B tile
constexpr int kTileResult = 256;  // floats of a C tile

struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() { __asm__ volatile("tilerelease" ::: "memory"); }
  Tiles(const Tiles&) = delete;

  template <int T>
  static PF_INLINE void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  template <int T>
  static PF_INLINE void load(const void* p, int64_t row_bytes = 64) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row_bytes), "i"(T) : "memory");
  }
  // A load that leaves the L1 cache to others: for an operand that streams by while the other one stays
  template <int T>
  static PF_INLINE void stream(const void* p, int64_t row_bytes = 64) {
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row_bytes), "i"(T) : "memory");
  }
  template <int T>
  static PF_INLINE void store(void* p, int64_t row_bytes = 64) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(row_bytes), "i"(T) : "memory");
  }
  template <int C, int A, int B>
  static PF_INLINE void multiply() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};

// 32 floats as bf16: low first
PF_INLINE __m512i pack_bf16(fvec low, fvec high) {
  __m512i result;
  __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(result) : "v"(low), "v"(high));
  return result;
}

// A row of 16 pairs of a B tile, from pack_bf16(even, odd)
PF_INLINE __m512i pairs_of(__m512i packed) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, packed);
}
PF_INLINE void pack_pairs(fvec even, fvec odd, bf16* out) { _mm512_storeu_si512(out, pairs_of(pack_bf16(even, odd))); }

// Two tiles of A, one above the other, or of B, side by side; the next ones along the depth lie `step` elements on.
struct TilePair {
  const bf16 *first, *second;
  int64_t step, row_bytes;
};
// Two by two tiles of C
struct TileBlock {
  float *c00, *c01, *c10, *c11;
  int64_t row_bytes;
};

// C = or += A B over a depth of so many tiles; kStreamA: the tiles of B are to stay in L1 rather than those of A
template <bool kStreamA = false>
PF_INLINE void multiply_tiles(int64_t depth, const TilePair& a, const TilePair& b, const TileBlock& c,
                              bool accumulate) {
  if (accumulate) {
    Tiles::load<0>(c.c00, c.row_bytes);
    Tiles::load<1>(c.c01, c.row_bytes);
    Tiles::load<2>(c.c10, c.row_bytes);
    Tiles::load<3>(c.c11, c.row_bytes);
  } else {
    Tiles::zero<0>();
    Tiles::zero<1>();
    Tiles::zero<2>();
    Tiles::zero<3>();
  }
  const auto load_a = [&](auto tile, const bf16* p) {
    if constexpr (kStreamA) {
      Tiles::stream<tile>(p, a.row_bytes);
    } else {
      Tiles::load<tile>(p, a.row_bytes);
    }
  };
  for (int64_t d = 0; d < depth; ++d) {
    load_a(std::integral_constant<int, 4>(), a.first + d * a.step);
    Tiles::load<6>(b.first + d * b.step, b.row_bytes);
    Tiles::multiply<0, 4, 6>();
    Tiles::load<7>(b.second + d * b.step, b.row_bytes);
    Tiles::multiply<1, 4, 7>();
    load_a(std::integral_constant<int, 5>(), a.second + d * a.step);
    Tiles::multiply<2, 5, 6>();
    Tiles::multiply<3, 5, 7>();
  }
  Tiles::store<0>(c.c00, c.row_bytes);
  Tiles::store<1>(c.c01, c.row_bytes);
  Tiles::store<2>(c.c10, c.row_bytes);
  Tiles::store<3>(c.c11, c.row_bytes);
}

// f(integral_constant 0), ..., f(N - 1): tile numbers are part of the instruction
template <int N, class F>
PF_INLINE void unrolled(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>()), ...);
  }(std::make_integer_sequence<int, N>());
}

// Two rows of 32 elements become two rows of 16 pairs: for columns 0 .. 15 and 16 .. 31.
PF_INLINE void interleave(__m512i even, __m512i odd, void* first, void* second) {
  alignas(64) static constexpr auto kOrder = [] {
    struct {
      uint16_t low[32], high[32];
    } order{};
    for (int i = 0; i < 16; ++i) {
      order.low[2 * i] = uint16_t(i), order.low[2 * i + 1] = uint16_t(32 + i);
      order.high[2 * i] = uint16_t(16 + i), order.high[2 * i + 1] = uint16_t(48 + i);
    }
    return order;
  }();
  _mm512_storeu_si512(first, _mm512_permutex2var_epi16(even, _mm512_load_si512(kOrder.low), odd));
  _mm512_storeu_si512(second, _mm512_permutex2var_epi16(even, _mm512_load_si512(kOrder.high), odd));
}

}  // namespace
}  // namespace pyfast::PYFAST_ISA
#endif
