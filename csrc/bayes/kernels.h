// Linear layers with Gaussian weights: the kernels, free of torch. All pointers are to contiguous memory.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/isa.h"
#include "core/scale_type.h"

namespace isthmus {

// What is drawn: one weight for the whole batch, or each output from its own distribution.
enum class Estimator : int { weight, local };

// weight: out = x Wᵀ + b,   W = weight_mean + s · noise(key) over [features, inputs],
//                           b = bias_mean + s_b · noise(child 1 of the key) over [features]
// local:  out = x weight_meanᵀ + bias_mean + √(x² (s²)ᵀ + s_b²) · noise(key) over [rows, features]
struct BayesLinear {
  DType dtype;
  ScaleType scale_type;
  Estimator estimator;
  int64_t rows, inputs, features;
  const int64_t* key;        // [2]: seed, offset
  const void* x;             // [rows, inputs]
  const void* weight_mean;   // [features, inputs]
  const void* weight_scale;  // [features, inputs]
  const void* bias_mean;     // [features], or null: no bias
  const void* bias_scale;    // [features], or null: the bias is not random
  void* out;                 // [rows, features]
};

struct BayesLinearBackward {
  DType dtype;
  ScaleType scale_type;
  Estimator estimator;
  int64_t rows, inputs, features;
  const int64_t* key;
  const void* grad;  // [rows, features]
  const void* x;
  const void* weight_mean;
  const void* weight_scale;
  const void* bias_scale;  // or null
  void* grad_x;            // [rows, inputs]
  void* grad_weight_mean;  // [features, inputs]
  void* grad_weight_scale;
  void* grad_bias_mean;   // [features]
  void* grad_bias_scale;  // [features]; null with bias_scale
  void* workspace;        // [rows, features] of the accumulate type for the local estimator; else unused
};

struct BayesKernels {
  void (*linear)(const BayesLinear&);
  void (*linear_backward)(const BayesLinearBackward&);
};

ISTHMUS_DECLARE_KERNELS(BayesKernels, bayes)

// CUDA: the same arguments with device pointers. Launches on `stream` (a cudaStream_t) of the current device and
// returns without waiting.
namespace cuda {
void bayes_linear(const BayesLinear&, void* stream);
void bayes_linear_backward(const BayesLinearBackward&, void* stream);
}  // namespace cuda

}  // namespace isthmus
