// The activations on vectors: value(x), and value and slope together where they share most of their work.
#pragma once
#include "cpu/activation.h"
#include "cpu/vec.h"

namespace pyfast::PYFAST_ISA {
namespace {

struct ValueSlope {
  fvec value, slope;
};

// sigmoid(x) and sigmoid(-x) = 1 - sigmoid(x), neither by cancellation.
struct TwoSigmoids {
  fvec plus, minus;
  explicit PF_INLINE TwoSigmoids(fvec x) {
    fvec t = exp(-abs(x)), near = reciprocal(1.f + t), far = t * near;
    plus = x < 0.f ? far : near;
    minus = x < 0.f ? near : far;
  }
};

struct Silu {
  static PF_INLINE fvec value(fvec x) { return x * TwoSigmoids(x).plus; }
  static PF_INLINE ValueSlope both(fvec x) {
    TwoSigmoids s(x);
    fvec y = x * s.plus;
    return {y, s.plus + y * s.minus};
  }
};

// x times the normal distribution's cdf. With e = exp(-x²/2), the tail beyond |x| is e · r(|x|), where r (Mills' ratio
// over sqrt(2 pi)) is smooth and falls like 1/|x|: a polynomial in 1 / (1 + 0.24 |x|) (the form of Abramowitz and
// Stegun 7.1.26, own minimax fit, relative error 4e-9). One exp serves cdf and pdf, and the tail keeps its relative
// accuracy.
struct Gelu {
  static PF_INLINE fvec cdf(fvec x, fvec e) {
    fvec s = reciprocal(1.f + 0.24f * min(splat(1e3f), abs(x)));  // e is 0 long before
    fvec p = splat(2.555017360e-2f);
    p = p * s - 1.247732937e-1f;
    p = p * s + 2.058136612e-1f;
    p = p * s - 1.447370201e-1f;
    p = p * s + 1.418594420e-1f;
    p = p * s + 2.792295441e-2f;
    p = p * s + 8.784773946e-2f;
    p = p * s + 8.891453594e-2f;
    p = p * s + 9.585989267e-2f;
    p = p * s + 9.574192017e-2f;
    fvec tail = e * (p * s);
    return x < 0.f ? tail : 1.f - tail;
  }
  static PF_INLINE fvec value(fvec x) { return x * cdf(x, exp(-0.5f * x * x)); }
  static PF_INLINE ValueSlope both(fvec x) {
    fvec e = exp(-0.5f * x * x), c = cdf(x, e);
    return {x * c, c + x * (e * 0.3989422804f)};
  }
};

// (1 + tanh z) / 2 = sigmoid(2z), z = sqrt(2 / pi) (x + 0.044715 x³)
struct GeluTanh {
  static constexpr float k = 1.5957691216f;  // 2 sqrt(2 / pi)
  static PF_INLINE fvec value(fvec x) { return x * TwoSigmoids(x * (k + k * 0.044715f * x * x)).plus; }
  static PF_INLINE ValueSlope both(fvec x) {
    TwoSigmoids s(x * (k + k * 0.044715f * x * x));
    fvec y = x * s.plus;
    return {y, s.plus + y * s.minus * (k + 3.f * k * 0.044715f * x * x)};
  }
};

struct Relu {  // NaN stays NaN; the slope at 0 is 0, as in torch
  static PF_INLINE fvec value(fvec x) { return x < 0.f ? fvec{} : x; }
  static PF_INLINE ValueSlope both(fvec x) { return {value(x), x > 0.f ? splat(1.f) : fvec{}}; }
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
