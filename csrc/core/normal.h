// One diagonal Gaussian in vector registers: its standard deviation, and its divergence from a prior.
//
// With h = log s, d = h - h_prior and q = (mean - prior_mean) / s_prior,
//     KL = q²/2 + (expm1(2d) - 2d)/2 = q²/2 + e²/2 + (e - d),   e = expm1(d),
// where every term is small when the posterior is near the prior: no digits cancel. The textbook form
// (s² + m² - 1 - log s²)/2 loses all of them in half precision.
#pragma once

#include "core/gaussians.h"
#include "core/math.h"
#include "core/scale_type.h"
#include "core/simd.h"

namespace isthmus {
namespace {

template <ScaleType S, class V>
ISTHMUS_INLINE V std_of(V scale) {
  if constexpr (S == ScaleType::logvar) return exp(0.5f * scale);
  if constexpr (S == ScaleType::std) return scale;
  if constexpr (S == ScaleType::softplus) return softplus(scale);
  if constexpr (S == ScaleType::square) return scale * scale;
}

template <ScaleType S, class V>
ISTHMUS_INLINE V log_std_of(V scale) {
  if constexpr (S == ScaleType::logvar) return 0.5f * scale;
  if constexpr (S == ScaleType::std) return log(scale);
  if constexpr (S == ScaleType::softplus) return log(softplus(scale));
  if constexpr (S == ScaleType::square) return 2.0f * log(abs(scale));
}

// ∂s / ∂scale
template <ScaleType S, class V>
ISTHMUS_INLINE V std_slope(V scale) {
  if constexpr (S == ScaleType::logvar) return 0.5f * exp(0.5f * scale);
  if constexpr (S == ScaleType::std) return V{} + 1.0f;
  if constexpr (S == ScaleType::softplus) return sigmoid(scale);
  if constexpr (S == ScaleType::square) return 2.0f * scale;
}

// ∂(log s) / ∂scale
template <ScaleType S, class V>
ISTHMUS_INLINE V log_std_slope(V scale) {
  if constexpr (S == ScaleType::logvar) return V{} + 0.5f;
  if constexpr (S == ScaleType::std) return 1.0f / scale;
  if constexpr (S == ScaleType::softplus) return sigmoid(scale) / softplus(scale);
  if constexpr (S == ScaleType::square) return 2.0f / scale;
}

// 1 / s
template <ScaleType S, class V>
ISTHMUS_INLINE V inverse_std(V scale) {
  if constexpr (S == ScaleType::logvar) return exp(-0.5f * scale);
  return 1.0f / std_of<S>(scale);
}

// A posterior and its prior, as their tensors give them.
template <class V>
struct Parameters {
  V mean, scale, prior_mean, prior_scale;
};

// The posterior's standard deviation.
template <ScaleType S, Prior P, class V>
ISTHMUS_INLINE V posterior_std(const Parameters<V>& x) {
  if constexpr (P == Prior::residual) return std_of<S>(x.scale) * std_of<S>(x.prior_scale);
  return std_of<S>(x.scale);
}

// Its mean, seen from the prior's.
template <Prior P, class V>
ISTHMUS_INLINE V offset(const Parameters<V>& x) {
  if constexpr (P == Prior::given) return x.mean - x.prior_mean;
  return x.mean;
}

// The divergence, and the posterior's standard deviation as a by-product.
template <ScaleType S, Prior P, class V>
ISTHMUS_INLINE V kl_and_std(const Parameters<V>& x, V& std) {
  V q = offset<P>(x), d = log_std_of<S>(x.scale);
  if constexpr (P != Prior::standard) q *= inverse_std<S>(x.prior_scale);
  if constexpr (P == Prior::given) {
    std = std_of<S>(x.scale);
    d -= log_std_of<S>(x.prior_scale);
  }
  V remainder;  // expm1(d) - d
  if constexpr (P != Prior::given && S == ScaleType::logvar) {
    exp_and_expm1mx(d, std, remainder);
  } else {
    if constexpr (P != Prior::given) std = std_of<S>(x.scale);
    remainder = expm1mx(d);
  }
  if constexpr (P == Prior::residual) std *= std_of<S>(x.prior_scale);
  const V e = d + remainder;
  return 0.5f * (q * q + e * e) + remainder;
}

// Slopes of the divergence.
template <ScaleType S, Prior P, class V>
ISTHMUS_INLINE Parameters<V> kl_slopes(const Parameters<V>& x) {
  if constexpr (P == Prior::standard) {
    const V e = expm1(log_std_of<S>(x.scale));
    return {x.mean, e * (e + 2.0f) * log_std_slope<S>(x.scale), V{}, V{}};
  } else {
    const V inverse = inverse_std<S>(x.prior_scale), q = offset<P>(x) * inverse;
    V d = log_std_of<S>(x.scale);
    if constexpr (P == Prior::given) d -= log_std_of<S>(x.prior_scale);
    const V e = expm1(d), excess = e * (e + 2.0f);  // excess = (s / s_prior)² - 1
    const V to_scale = excess * log_std_slope<S>(x.scale);
    if constexpr (P == Prior::residual) {
      return {q * inverse, to_scale, V{}, -q * q * log_std_slope<S>(x.prior_scale)};
    }
    return {q * inverse, to_scale, -q * inverse, -(q * q + excess) * log_std_slope<S>(x.prior_scale)};
  }
}

// The same, and ∂s / ∂scale of the posterior.
template <ScaleType S, Prior P, class V>
ISTHMUS_INLINE Parameters<V> kl_and_std_slopes(const Parameters<V>& x, V& std_slope_of_scale) {
  if constexpr (S == ScaleType::logvar && P == Prior::standard) {
    // One exponential for both.
    V std, e;
    exp_and_expm1(0.5f * x.scale, std, e);
    std_slope_of_scale = 0.5f * std;
    return {x.mean, (0.5f * e) * (e + 2.0f), V{}, V{}};
  } else {
    std_slope_of_scale = std_slope<S>(x.scale);
    if constexpr (P == Prior::residual) std_slope_of_scale *= std_of<S>(x.prior_scale);
    return kl_slopes<S, P>(x);
  }
}

}  // namespace
}  // namespace isthmus
