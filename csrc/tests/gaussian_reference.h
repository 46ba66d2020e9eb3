// Diagonal Gaussians by the textbook, in long double: its cancellation must not show in tests of float64.
#pragma once

#include <cmath>

#include "core/scale_type.h"
#include "kernel_test.h"

namespace isthmus {

constexpr ScaleType all_scale_types[] = {ScaleType::logvar, ScaleType::std, ScaleType::softplus, ScaleType::square};

// Values of `scale` for which s is between about 0.2 and 2, so that every form is well conditioned.
inline Array random_scale(Random& random, DType dtype, ScaleType type, int64_t count) {
  return type == ScaleType::std || type == ScaleType::square ? random.uniform(dtype, count, 0.4, 1.4)
                                                             : random.uniform(dtype, count, -1.5, 1.5);
}

inline long double std_of(ScaleType type, long double scale) {
  switch (type) {
    case ScaleType::logvar:
      return std::exp(scale / 2);
    case ScaleType::std:
      return scale;
    case ScaleType::softplus:
      return std::log1p(std::exp(scale));
    default:
      return scale * scale;
  }
}

// ds / dscale
inline long double std_slope(ScaleType type, long double scale) {
  switch (type) {
    case ScaleType::logvar:
      return std::exp(scale / 2) / 2;
    case ScaleType::std:
      return 1;
    case ScaleType::softplus:
      return 1 / (1 + std::exp(-scale));
    default:
      return 2 * scale;
  }
}

struct KlReference {
  double kl, mean, scale, prior_mean, prior_scale;  // the value and its four derivatives
};

inline KlReference kl_reference(ScaleType type, double mean, double scale, double prior_mean, double prior_scale) {
  const long double s = std_of(type, scale), p = std_of(type, prior_scale);
  const long double q = (mean - prior_mean) / p, ratio = s / p, excess = ratio * ratio - 1;
  const long double kl = 0.5 * (q * q + excess) - std::log(ratio);
  const long double to_scale = excess / s * std_slope(type, scale);
  const long double to_prior_scale = -(q * q + excess) / p * std_slope(type, prior_scale);
  return {static_cast<double>(kl), static_cast<double>(q / p), static_cast<double>(to_scale),
          static_cast<double>(-q / p), static_cast<double>(to_prior_scale)};
}

// The `scale` of s = 1, the standard prior.
inline double unit_scale(ScaleType type) {
  return type == ScaleType::logvar ? 0 : type == ScaleType::softplus ? std::log(std::expm1(1.0)) : 1;
}

}  // namespace isthmus
