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

// A sum that knows the size of its terms, to which rounding errors are relative.
struct Sum {
  long double value = 0, size = 0;

  void add(long double term, long double size_of_term) {
    value += term;
    size += size_of_term;
  }
  void add(long double term) { add(term, std::fabs(term)); }
  Sum operator+(Sum other) const { return {value + other.value, size + other.size}; }
  Sum operator*(long double factor) const { return {value * factor, size * std::fabs(factor)}; }
};

inline bool check_close(const char* what, const Array& got, int64_t i, const Sum& want, double roundings) {
  return check_close(what, got, i, static_cast<double>(want.value), roundings, static_cast<double>(want.size));
}

// Gradients to mean and scale of posterior and prior; a scale is the standard deviation, or what the tensor holds.
struct Slopes {
  Sum mean, scale, prior_mean, prior_scale;
};

// A posterior and its prior, by means and standard deviations.
struct GaussianPair {
  long double mean, std, prior_mean, prior_std;

  long double kl() const {
    const long double q = (mean - prior_mean) / prior_std, ratio = std / prior_std;
    return 0.5 * (q * q + ratio * ratio - 1) - std::log(ratio);
  }

  void add_kl_slopes(long double grad, long double posterior_weight, long double prior_weight, Slopes& slopes) const {
    const long double q = (mean - prior_mean) / prior_std, ratio = std / prior_std;
    const long double to_mean = grad * q / prior_std;
    const long double size = std::fabs(grad) * (std::fabs(mean) + std::fabs(prior_mean)) / (prior_std * prior_std);
    slopes.mean.add(posterior_weight * to_mean, posterior_weight * size);
    slopes.prior_mean.add(-prior_weight * to_mean, prior_weight * size);
    slopes.scale.add(posterior_weight * grad * ratio * ratio / std);
    slopes.scale.add(-posterior_weight * grad / std);
    slopes.prior_scale.add(-prior_weight * grad * q * q / prior_std, prior_weight * (1 + std::fabs(q)) * size);
    slopes.prior_scale.add(-prior_weight * grad * ratio * ratio / prior_std);
    slopes.prior_scale.add(prior_weight * grad / prior_std);
  }
};

}  // namespace isthmus
