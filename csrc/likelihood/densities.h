// Negative log-densities and their derivatives, for one element. nll(in) takes the arguments in the order of the op;
// gradient(in, out) writes the derivatives by the first of them.
#pragma once

#include "core/scale_type.h"
#include "likelihood/formula.h"

ISTHMUS_FORMULAS_BEGIN

constexpr int scale_argument = 2;
constexpr double half_log_two_pi = 0.918938533204672741780329736406;

// N(mean, s²) times weight · s^(2 beta). With q = (x - mean) / s an element is q²/2 + log s + log(2π)/2, its slopes
// are q/s, -q/s and, by log s, 1 - q²: nothing overflows before q² does.
template <class C, ScaleType S, bool SharedScale>
struct Gaussian {
  static constexpr int arguments = 4, gradients = 3;  // x, mean, scale; weight
  static constexpr bool shared_scale = SharedScale;

  C beta;

  template <class V>
  ISTHMUS_FORMULA V factor(const V (&in)[arguments]) const {
    return beta == C(0) ? in[3] : in[3] * exp(C(2) * beta * log_std_of<S>(in[2]));
  }

  template <class V>
  ISTHMUS_FORMULA V nll(const V (&in)[arguments]) const {
    const V q = (in[0] - in[1]) * inverse_std<S>(in[2]);
    return factor(in) * (C(0.5) * q * q + log_std_of<S>(in[2]) + C(half_log_two_pi));
  }

  template <class V>
  ISTHMUS_FORMULA void gradient(const V (&in)[arguments], V (&out)[gradients]) const {
    const V inverse = inverse_std<S>(in[2]), q = (in[0] - in[1]) * inverse, f = factor(in);
    out[0] = f * q * inverse;
    out[1] = -out[0];
    out[2] = f * (C(1) - q * q) * log_std_slope<S>(in[2]);
  }
};

ISTHMUS_FORMULAS_END
