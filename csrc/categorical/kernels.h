// Categorical distributions given by logits: the kernels, free of torch. All pointers are to contiguous memory.
//
// q = softmax(logits) and p = softmax(prior_logits), or p uniform, over each row.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/isa.h"

namespace isthmus {

struct GumbelNoise {
  DType dtype;
  const int64_t* key;  // [2]: seed, offset
  int64_t count;
  void* noise;  // [count]
};

// The rows of a categorical op and their prior.
struct Categories {
  DType dtype;
  int64_t rows, cols;
  const void* logits;        // [rows, cols]
  const void* prior_logits;  // [rows, cols], or [cols] if shared; null for the uniform prior
  bool shared_prior;         // every row has the same prior
};

// y = softmax((logits + Gumbel noise) / temperature), or the one-hot of its maximum; kl[row] = KL(q ‖ p).
struct GumbelSoftmax {
  Categories in;
  double temperature;
  bool hard;
  const int64_t* key;  // [2]: seed, offset
  void* y;             // [rows, cols]
  void* kl;            // [rows] in the accumulate type, or null: no divergence
};

// Gradients through the soft sample, whichever was returned.
struct GumbelSoftmaxBackward {
  Categories in;
  double temperature;
  const int64_t* key;
  const void* grad_y;   // [rows, cols]
  const void* grad_kl;  // [rows] in the accumulate type, or null
  void* grad_logits;    // [rows, cols]
  void* grad_prior;     // [rows, cols] even if the prior is shared, or null: not wanted
};

// The same from the soft sample itself: grad_logits = y (grad_y - Σ grad_y y) / temperature.
struct SoftmaxBackward {
  DType dtype;
  int64_t rows, cols;
  double temperature;
  const void* grad_y;  // [rows, cols]
  const void* y;
  void* grad_logits;
};

struct CategoricalKl {
  Categories in;
  void* kl;  // [rows] in the accumulate type
};

struct CategoricalKlBackward {
  Categories in;
  const void* grad;   // [rows] in the accumulate type
  void* grad_logits;  // [rows, cols]
  void* grad_prior;   // [rows, cols] even if the prior is shared, or null: not wanted
};

struct CategoricalKernels {
  void (*noise)(const GumbelNoise&);
  void (*gumbel_softmax)(const GumbelSoftmax&);
  void (*gumbel_softmax_backward)(const GumbelSoftmaxBackward&);
  void (*softmax_backward)(const SoftmaxBackward&);
  void (*kl)(const CategoricalKl&);
  void (*kl_backward)(const CategoricalKlBackward&);
};

ISTHMUS_DECLARE_KERNELS(CategoricalKernels, categorical)

// CUDA: the same arguments with device pointers. Launches on `stream` (a cudaStream_t) of the current device and
// returns without waiting.
namespace cuda {
void categorical_noise(const GumbelNoise&, void* stream);
void categorical_gumbel_softmax(const GumbelSoftmax&, void* stream);
void categorical_gumbel_softmax_backward(const GumbelSoftmaxBackward&, void* stream);
void categorical_softmax_backward(const SoftmaxBackward&, void* stream);
void categorical_kl(const CategoricalKl&, void* stream);
void categorical_kl_backward(const CategoricalKlBackward&, void* stream);
}  // namespace cuda

}  // namespace isthmus
