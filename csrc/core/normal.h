// One diagonal Gaussian in vector registers: its standard deviation, and its divergence from a prior.
//
// With h = log s, d = h - h_prior and q = (mean - prior_mean) / s_prior,
//     KL = q²/2 + (expm1(2d) - 2d)/2 = q²/2 + e²/2 + (e - d),   e = expm1(d),
// where every term is small when the posterior is near the prior: no digits cancel. The textbook form
// (s² + m² - 1 - log s²)/2 loses all of them in half precision.
#pragma once

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

// Divergence from the standard normal, and s as a by-product of the same exponential.
template <ScaleType S, class V>
ISTHMUS_INLINE V kl_to_standard(V mean, V scale, V& std) {
  const V log_std = log_std_of<S>(scale);
  V remainder;  // expm1(log_std) - log_std
  exp_and_expm1mx(log_std, std, remainder);
  if constexpr (S != ScaleType::logvar) std = std_of<S>(scale);
  const V e = log_std + remainder;
  return 0.5f * (mean * mean + e * e) + remainder;
}

template <ScaleType S, class V>
ISTHMUS_INLINE V kl_to_prior(V mean, V scale, V prior_mean, V prior_scale) {
  const V q = (mean - prior_mean) * inverse_std<S>(prior_scale);
  const V d = log_std_of<S>(scale) - log_std_of<S>(prior_scale);
  const V remainder = expm1mx(d);
  const V e = d + remainder;
  return 0.5f * (q * q + e * e) + remainder;
}

template <class V>
struct KlGradient {
  V mean, scale, prior_mean, prior_scale;
};

template <ScaleType S, class V>
ISTHMUS_INLINE KlGradient<V> kl_to_standard_gradient(V mean, V scale) {
  const V e = expm1(log_std_of<S>(scale));
  return {mean, e * (e + 2.0f) * log_std_slope<S>(scale), V{}, V{}};
}

template <ScaleType S, class V>
ISTHMUS_INLINE KlGradient<V> kl_to_prior_gradient(V mean, V scale, V prior_mean, V prior_scale) {
  const V inverse = inverse_std<S>(prior_scale);
  const V q = (mean - prior_mean) * inverse;
  const V e = expm1(log_std_of<S>(scale) - log_std_of<S>(prior_scale));
  const V excess = e * (e + 2.0f);  // s² / s_prior² - 1
  return {q * inverse, excess * log_std_slope<S>(scale), -q * inverse,
          -(q * q + excess) * log_std_slope<S>(prior_scale)};
}

}  // namespace
}  // namespace isthmus
