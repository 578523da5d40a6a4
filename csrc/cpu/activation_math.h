// The activations on vectors: value(x), and value and slope together where they share most of their work.
#pragma once
#include "cpu/activation.h"
#include "cpu/vec.h"

namespace pyfast::PYFAST_ISA {
namespace {

struct ValueSlope {
  fvec value, slope;
};

// What follows is written for a result of type T: about 1 ulp for fp32; for 16-bit results, whose own rounding is 2⁻¹¹
// or more, shorter approximations with relative errors below 2⁻¹³ that take two thirds of the time.
template <class T>
constexpr bool kExact = sizeof(T) == 4;

// exp(x), x <= 0; 0 below 2⁻¹²⁶
template <class T>
PF_INLINE fvec decay(fvec x) {
  if constexpr (kExact<T>) return exp(x);
  fvec z = max(splat(-126.f), x * 1.44269504f), n = round_even(z), f = z - n;
  fvec p = splat(9.570102207e-3f);  // own minimax fit of 2^f, relative error 3e-6
  p = p * f + 5.591786280e-2f;
  p = p * f + 2.402474433e-1f;
  p = p * f + 6.931217909e-1f;
  p = p * f + 9.999992847e-1f;
#ifdef __AVX512F__
  return (fvec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return p * (fvec)((__builtin_convertvector(n, ivec) + 127) << 23);
#endif
}

// 1 / d, d in [1, 1e4]
template <class T>
PF_INLINE fvec inverse(fvec d) {
#ifdef __AVX512F__
  if constexpr (!kExact<T>) return (fvec)_mm512_rcp14_ps((__m512)d);
#endif
  return reciprocal(d);
}

// sigmoid(x) and sigmoid(-x) = 1 - sigmoid(x), neither by cancellation.
template <class T>
struct TwoSigmoids {
  fvec plus, minus;
  explicit PF_INLINE TwoSigmoids(fvec x) {
    fvec t = decay<T>(-abs(x)), near = inverse<T>(1.f + t), far = t * near;
    plus = x < 0.f ? far : near;
    minus = x < 0.f ? near : far;
  }
};

struct Silu {
  template <class T>
  static PF_INLINE fvec value(fvec x) {
    return x * TwoSigmoids<T>(x).plus;
  }
  template <class T>
  static PF_INLINE ValueSlope both(fvec x) {
    TwoSigmoids<T> s(x);
    fvec y = x * s.plus;
    return {y, s.plus + y * s.minus};
  }
};

// x times the normal distribution's cdf. With e = exp(-x²/2), the tail beyond |x| is e · r(|x|), where r (Mills' ratio
// over sqrt(2 pi)) is smooth and falls like 1/|x|: a polynomial in 1 / (1 + c |x|) (the form of Abramowitz and Stegun
// 7.1.26, own minimax fits, relative error 4e-9 and 2e-5). One exp serves cdf and pdf, and the tail keeps its relative
// accuracy.
struct Gelu {
  template <class T>
  static PF_INLINE fvec cdf(fvec x, fvec e) {
    fvec t = min(splat(1e3f), abs(x)), p;  // e is 0 long before
    if constexpr (kExact<T>) {
      fvec s = inverse<T>(1.f + 0.24f * t);
      p = splat(2.555017360e-2f);
      p = p * s - 1.247732937e-1f;
      p = p * s + 2.058136612e-1f;
      p = p * s - 1.447370201e-1f;
      p = p * s + 1.418594420e-1f;
      p = p * s + 2.792295441e-2f;
      p = p * s + 8.784773946e-2f;
      p = p * s + 8.891453594e-2f;
      p = p * s + 9.585989267e-2f;
      p = (p * s + 9.574192017e-2f) * s;
    } else {
      fvec s = inverse<T>(1.f + 0.37f * t);
      p = splat(-9.302628785e-2f);
      p = p * s + 2.161276937e-1f;
      p = p * s + 7.110032439e-2f;
      p = p * s + 1.590638459e-1f;
      p = (p * s + 1.467251331e-1f) * s;
    }
    fvec tail = e * p;
    return x < 0.f ? tail : 1.f - tail;
  }
  template <class T>
  static PF_INLINE fvec value(fvec x) {
    return x * cdf<T>(x, decay<T>(-0.5f * x * x));
  }
  template <class T>
  static PF_INLINE ValueSlope both(fvec x) {
    fvec e = decay<T>(-0.5f * x * x), c = cdf<T>(x, e);
    return {x * c, c + x * (e * 0.3989422804f)};
  }
};

// (1 + tanh z) / 2 = sigmoid(2z), z = sqrt(2 / pi) (x + 0.044715 x³)
struct GeluTanh {
  static constexpr float k = 1.5957691216f;  // 2 sqrt(2 / pi)
  template <class T>
  static PF_INLINE fvec value(fvec x) {
    return x * TwoSigmoids<T>(x * (k + k * 0.044715f * x * x)).plus;
  }
  template <class T>
  static PF_INLINE ValueSlope both(fvec x) {
    TwoSigmoids<T> s(x * (k + k * 0.044715f * x * x));
    fvec y = x * s.plus;
    return {y, s.plus + y * s.minus * (k + 3.f * k * 0.044715f * x * x)};
  }
};

struct Relu {  // NaN stays NaN; the slope at 0 is 0, as in torch
  template <class T>
  static PF_INLINE fvec value(fvec x) {
    return x < 0.f ? fvec{} : x;
  }
  template <class T>
  static PF_INLINE ValueSlope both(fvec x) {
    return {value<T>(x), x > 0.f ? splat(1.f) : fvec{}};
  }
};

// Runs a block with A bound to the activation
#define PYFAST_DISPATCH_ACTIVATION(activation, A, ...) \
  switch (activation) {                                \
    case Activation::silu: {                           \
      using A = Silu;                                  \
      __VA_ARGS__;                                     \
      break;                                           \
    }                                                  \
    case Activation::gelu: {                           \
      using A = Gelu;                                  \
      __VA_ARGS__;                                     \
      break;                                           \
    }                                                  \
    case Activation::gelu_tanh: {                      \
      using A = GeluTanh;                              \
      __VA_ARGS__;                                     \
      break;                                           \
    }                                                  \
    case Activation::relu: {                           \
      using A = Relu;                                  \
      __VA_ARGS__;                                     \
      break;                                           \
    }                                                  \
  }

}  // namespace
}  // namespace pyfast::PYFAST_ISA
