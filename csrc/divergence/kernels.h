// Divergences between Gaussians: the kernels, free of torch. All pointers are to contiguous memory.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/isa.h"
#include "core/scale_type.h"

namespace isthmus {

// kl[row] = weight · Σ_cols KL(N(mean, s²) ‖ prior).
//
// Every reduction is a choice of rows and cols: no reduction is one column, the sum of everything is one row.
struct GaussianKl {
  DType dtype;
  ScaleType scale_type;
  int64_t rows, cols;
  double weight;
  const void* mean;         // [rows, cols]
  const void* scale;        // [rows, cols]
  const void* prior_mean;   // [rows, cols], or null for the standard normal
  const void* prior_scale;  // [rows, cols], or null with prior_mean
  bool shared_prior;        // prior_mean and prior_scale hold one element each, the prior of every element
  void* kl;                 // [rows] in the accumulate type
  void* workspace;          // CUDA: gaussian_kl_workspace() elements of the accumulate type; else null
};

struct GaussianKlBackward {
  DType dtype;
  ScaleType scale_type;
  int64_t rows, cols;
  double weight;
  const void* grad;  // [rows] in the accumulate type
  const void* mean;
  const void* scale;
  const void* prior_mean;
  const void* prior_scale;
  bool shared_prior;
  void* grad_mean;  // [rows, cols]
  void* grad_scale;
  void* grad_prior_mean;   // [rows, cols] even if the prior is shared; null without a prior
  void* grad_prior_scale;  // null with grad_prior_mean
};

struct DivergenceKernels {
  void (*gaussian_kl)(const GaussianKl&);
  void (*gaussian_kl_backward)(const GaussianKlBackward&);
};

ISTHMUS_DECLARE_KERNELS(DivergenceKernels, divergence)

// CUDA: the same arguments with device pointers. Launches on `stream` (a cudaStream_t) of the current device and
// returns without waiting.
namespace cuda {
int64_t gaussian_kl_workspace(int64_t rows, int64_t cols);
void divergence_gaussian_kl(const GaussianKl&, void* stream);
void divergence_gaussian_kl_backward(const GaussianKlBackward&, void* stream);
}  // namespace cuda

}  // namespace isthmus
