// Negative log-densities and their derivatives, for one element. nll(in) takes the arguments in the order of the op;
// gradient(in, out) writes the derivatives by the first of them.
#pragma once

#include "core/gaussians.h"
#include "core/scale_type.h"
#include "likelihood/formula.h"

ISTHMUS_FORMULAS_BEGIN

constexpr int scale_argument = 2;
constexpr double sqrt_half = 0.707106781186547524400844362105;
constexpr double sqrt_two_over_pi = 0.797884560802865355879892119869;
constexpr double inv_sqrt_two_pi = 0.398942280401432677939946059934;

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

// The probability that N(mean, s²) gives to the bin of width w around x; the first and the last bin may be open.
//
// By symmetry only the distance u = |x - mean| / s matters, and h = w / (2s): the edges lie at near = u - h and
// far = u + h, and with E(z) = erfcx(z / √2), the tail beyond z is e^(-z²/2) E(z) / 2. Three forms keep every digit:
//
//     tail     near > 0:          P = e^(-near²/2) (E(near) - e^(-2uh) E(far)) / 2
//     centre   near <= 0:     1 - P = e^(-near²/2) (E(-near) + e^(-2uh) E(far)) / 2
//     narrow   h < 1/2, uh < 1:   P = 2h φ(u) Σ_n h^(2n) He_2n(u) / (2n + 1)!, where the others would cancel
//
// each as log P = offset + log1p(excess). Slopes follow from the ratio φ(near) / P, which no form under- or overflows.
template <class C, ScaleType S, bool SharedScale>
struct DiscretizedGaussian {
  static constexpr int arguments = 3, gradients = 3;  // x, mean, scale
  static constexpr bool shared_scale = SharedScale;

  C half_bin, log_bin, low, high;

  template <class V>
  ISTHMUS_FORMULA V nll(const V (&in)[arguments]) const {
    const Terms<V> t = terms(in);
    const V narrow = C(half_log_two_pi) + C(0.5) * t.u * t.u + log_std_of<S>(in[2]) - log_bin;
    const V tail = C(0.5) * t.near * t.near;
    return (t.narrow ? narrow : (t.tail ? tail : V{})) - log1p(t.excess);
  }

  template <class V>
  ISTHMUS_FORMULA void gradient(const V (&in)[arguments], V (&out)[gradients]) const {
    const Terms<V> t = terms(in);
    const V one = V{} + C(1), decay = one - t.loss;
    // φ(near) / P; narrow, times 2h.
    const V peak = t.narrow ? t.peak / (one + t.excess)
                            : (t.tail ? C(sqrt_two_over_pi) / t.tails : C(inv_sqrt_two_pi) * t.peak / (one + t.excess));
    const V mean_distance = t.loss / (C(2) * t.h);  // about u in a narrow bin
    const V by_distance = peak * (t.narrow ? mean_distance : (t.inside ? t.loss : one));
    const V wide = t.inside ? t.far * decay - t.near : -t.near;
    const V by_log_std = peak * (t.narrow ? C(0.5) * (one + decay) - t.u * mean_distance : wide);
    out[0] = by_distance * (t.upwards ? t.inverse : -t.inverse);
    out[1] = -out[0];
    out[2] = by_log_std * log_std_slope<S>(in[2]);
  }

 private:
  template <class V>
  struct Terms {
    using Mask = decltype(V{} < V{});
    Mask inside, upwards, narrow, tail;  // not an open bin; the distance grows with x; which form
    V inverse, u, h, near, far;
    V loss;   // 1 - e^(-2uh)
    V peak;   // e^(-near²/2); narrow, φ(near) / φ(u)
    V tails;  // E(near) - e^(-2uh) E(far)
    V excess;
  };

  template <class V>
  ISTHMUS_FORMULA Terms<V> terms(const V (&in)[arguments]) const {
    Terms<V> t;
    const V zero = V{}, d = in[0] - in[1];
    const auto first = in[0] <= low, last = in[0] >= high;
    t.inside = (in[0] > low) & (in[0] < high);
    t.upwards = last | (t.inside & (d > C(0)));
    t.inverse = inverse_std<S>(in[2]);
    const V distance = first ? -d : (last ? d : abs(d));
    t.u = distance * t.inverse;
    t.h = half_bin * t.inverse;
    t.near = (distance - half_bin) * t.inverse;
    t.far = (distance + half_bin) * t.inverse;
    const V c = t.u * t.h;
    t.narrow = t.inside & (t.h < C(0.5)) & (c < C(1));
    t.tail = t.near > C(0);
    t.loss = -expm1(C(-2) * c);
    t.peak = exp(t.narrow ? c - C(0.5) * t.h * t.h : C(-0.5) * t.near * t.near);
    const V e_near = erfcx(abs(t.near) * C(sqrt_half)), e_far = erfcx(abs(t.far) * C(sqrt_half));
    const V beyond = t.inside ? (C(1) - t.loss) * e_far : zero;
    t.tails = e_near - beyond;
    const V outside = C(0.5) * t.peak * (e_near + beyond);
    t.excess = t.narrow ? hermite_excess(c, t.h * t.h) : (t.tail ? C(0.5) * t.tails - C(1) : -outside);
    return t;
  }

  // Σ_(n > 0) K_2n / (2n + 1)!, where K_n = h^n He_n(u) = c K_(n-1) - (n - 1) h² K_(n-2).
  template <class V>
  ISTHMUS_FORMULA static V hermite_excess(V c, V h2) {
    constexpr int last = sizeof(C) == sizeof(float) ? 10 : 20;
    V even = V{} + C(1), odd = c, sum = V{};
    C reciprocal = 1;
    for (int n = 2; n <= last; n += 2) {
      even = c * odd - C(n - 1) * h2 * even;
      reciprocal /= C(n * (n + 1));
      sum += reciprocal * even;
      odd = c * even - C(n) * h2 * odd;
    }
    return sum;
  }
};

// The logarithm of the gamma function and its derivative, for z > 0: Stirling's series from 10 on, the recurrence
// below.
template <class C>
struct StirlingSeries {
  static constexpr int shift = 10;

  template <class V>
  ISTHMUS_FORMULA static V log_gamma(V z) {
    V product = V{} + C(1);
    const V bounded = z < C(shift) ? z : V{} + C(1);  // where the series serves alone the product must not overflow
    for (int i = 0; i < shift; ++i) product *= bounded + C(i);
    const V w = z < C(shift) ? z + C(shift) : z, y = C(1) / (w * w);
    const V series =
        (C(1) / C(12) +
         y * (C(-1) / C(360) +
              y * (C(1) / C(1260) +
                   y * (C(-1) / C(1680) + y * (C(1) / C(1188) + y * (C(-691) / C(360360) + y * (C(1) / C(156)))))))) /
        w;
    const V below = z < C(shift) ? log(product) : V{};
    return (w - C(0.5)) * log(w) - w + C(half_log_two_pi) + series - below;
  }

  template <class V>
  ISTHMUS_FORMULA static V digamma(V z) {
    V below = V{};
    const V bounded = z < C(shift) ? z : V{} + C(1);
    for (int i = 0; i < shift; ++i) below += C(1) / (bounded + C(i));
    const V w = z < C(shift) ? z + C(shift) : z, y = C(1) / (w * w);
    const V series =
        y * (C(-1) / C(12) +
             y * (C(1) / C(120) +
                  y * (C(-1) / C(252) +
                       y * (C(1) / C(240) + y * (C(-1) / C(132) + y * (C(691) / C(32760) + y * (C(-1) / C(12))))))));
    return log(w) - C(0.5) / w + series - (z < C(shift) ? below : V{});
  }
};

// The generalised Gaussian of scale α and shape β: (|x - mean| / α)^β + log 2α - log β + log Γ(1/β).
//
// At x = mean the power is 0 and so are its slopes, which is their limit for β > 1 and a subgradient for β = 1.
template <class C, bool SharedScale>
struct GeneralizedGaussian {
  static constexpr int arguments = 4, gradients = 4;  // x, mean, scale, shape
  static constexpr bool shared_scale = SharedScale;

  template <class V>
  ISTHMUS_FORMULA V nll(const V (&in)[arguments]) const {
    const V log_ratio = log(abs(in[0] - in[1]) / in[2]), shape = in[3];
    return exp(shape * log_ratio) + log(C(2) * in[2]) - log(shape) + StirlingSeries<C>::log_gamma(C(1) / shape);
  }

  template <class V>
  ISTHMUS_FORMULA void gradient(const V (&in)[arguments], V (&out)[gradients]) const {
    const V zero = V{}, d = in[0] - in[1], shape = in[3], inverse = C(1) / shape;
    const V log_ratio = log(abs(d) / in[2]), power = exp(shape * log_ratio);
    const auto apart = d != C(0);
    out[0] = apart ? shape * power / d : zero;
    out[1] = -out[0];
    out[2] = (C(1) - shape * power) / in[2];
    out[3] = (apart ? power * log_ratio : zero) - inverse - StirlingSeries<C>::digamma(inverse) * inverse * inverse;
  }
};

ISTHMUS_FORMULAS_END
