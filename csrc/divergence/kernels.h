// Divergences between Gaussians, and the streaming mean of importance weights: the kernels, free of torch.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/gaussians.h"
#include "core/isa.h"

namespace isthmus {

// kl = Σ KL(N(mean, s²) ‖ prior), summed and weighted as the reduction says.
struct GaussianKl {
  Gaussians posterior;
  Reduction reduction;
  void* kl;         // [reduction.sums()] in the accumulate type
  void* workspace;  // CUDA: gaussian_kl_workspace() elements of the accumulate type; else null
};

struct GaussianKlBackward {
  Gaussians posterior;
  Reduction reduction;
  const void* grad;                       // [reduction.sums()] in the accumulate type
  double posterior_weight, prior_weight;  // factors on the gradient to either side
  GaussianGradients grads;
};

// bound[g, col] = log mean_k exp(log_weights[g, k, col])
struct LogMeanExp {
  DType dtype;
  int64_t groups, samples, cols;
  const void* log_weights;  // [groups, samples, cols]
  void* bound;              // [groups, cols] in the accumulate type
};

struct LogMeanExpBackward {
  DType dtype;
  int64_t groups, samples, cols;
  const void* grad;         // [groups, cols] in the accumulate type
  const void* log_weights;  // [groups, samples, cols]
  const void* bound;        // [groups, cols]
  void* grad_log_weights;   // [groups, samples, cols]: grad times the normalised weights
};

struct DivergenceKernels {
  void (*gaussian_kl)(const GaussianKl&);
  void (*gaussian_kl_backward)(const GaussianKlBackward&);
  void (*log_mean_exp)(const LogMeanExp&);
  void (*log_mean_exp_backward)(const LogMeanExpBackward&);
};

ISTHMUS_DECLARE_KERNELS(DivergenceKernels, divergence)

// CUDA: the same arguments with device pointers. Launches on `stream` (a cudaStream_t) of the current device and
// returns without waiting.
namespace cuda {
int64_t gaussian_kl_workspace(const Reduction&);
void divergence_gaussian_kl(const GaussianKl&, void* stream);
void divergence_gaussian_kl_backward(const GaussianKlBackward&, void* stream);
void divergence_log_mean_exp(const LogMeanExp&, void* stream);
void divergence_log_mean_exp_backward(const LogMeanExpBackward&, void* stream);
}  // namespace cuda

}  // namespace isthmus
