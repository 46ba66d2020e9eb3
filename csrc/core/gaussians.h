// Batches of diagonal Gaussians as kernels take them, on any device: a posterior and the prior it is measured against.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/scale_type.h"

namespace isthmus {

constexpr double half_log_two_pi = 0.918938533204672741780329736406;

// Where element i of a tensor lies: blocks of `block` neighbours begin `stride` elements apart. A contiguous tensor is
// one block; the half of a packed tensor has gaps between its blocks; a row that all rows share has stride 0.
struct Operand {
  const void* data;  // null: absent
  int64_t block, stride;
};
struct Result {
  void* data;  // null: not wanted
  int64_t block, stride;
};

enum class Prior : int {
  standard,  // N(0, 1)
  given,     // N(prior_mean, s_prior²)
  residual,  // given, and the posterior is N(prior_mean + mean, (s_prior · s)²)
};

// What happens to the posterior's scale before it is used.
struct Clamp {
  enum class Mode : int {
    none,
    hard,          // min(max(x, low), high); no gradient outside
    pass_through,  // the same value; outside, a gradient passes if following it leads back inside
    tanh,          // center + half-width · tanh((x - center) / half-width), and its derivative
  };
  Mode mode;
  double low, high;
};

struct Gaussians {
  DType dtype;
  ScaleType scale_type;
  Prior prior;
  Clamp clamp;
  Operand mean, scale, prior_mean, prior_scale;
  const bool* mask;   // null, or one entry for every mask_cols elements: where it is false, nothing is computed
  int64_t mask_cols;  // but zeros
};

struct GaussianGradients {
  Result mean, scale, prior_mean, prior_scale;
};

// A sum over the columns of a [rows, cols] view, or over its rows. No reduction is one column, the sum of everything
// one row.
struct Reduction {
  int64_t rows, cols;
  bool over_rows;
  double weight;  // factor of every sum

  int64_t sums() const { return over_rows ? cols : rows; }
};

}  // namespace isthmus
