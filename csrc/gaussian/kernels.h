// Reparameterised Gaussian sampling: the kernels, free of torch. All pointers are to contiguous memory.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/isa.h"
#include "core/scale_type.h"

namespace isthmus {

struct GaussianNoise {
  DType dtype;
  const int64_t* key;  // [2]: seed, offset
  int64_t count;
  void* noise;  // [count]
};

// z = mean + temperature · s · noise; optionally the divergence of each row from the prior.
struct GaussianSample {
  DType dtype;
  ScaleType scale_type;
  int64_t rows, cols, num_samples;
  double temperature;
  const int64_t* key;       // [2]: seed, offset
  const void* mean;         // [rows, cols]
  const void* scale;        // [rows, cols]
  const void* prior_mean;   // [rows, cols], or null for the standard normal
  const void* prior_scale;  // [rows, cols], or null with prior_mean
  void* z;                  // [num_samples, rows, cols]
  void* kl;                 // [rows] in the accumulate type, or null: no divergence
};

struct GaussianSampleBackward {
  DType dtype;
  ScaleType scale_type;
  int64_t rows, cols, num_samples;
  double temperature;
  const int64_t* key;
  const void* grad_z;   // [num_samples, rows, cols]
  const void* grad_kl;  // [rows] in the accumulate type, or null
  const void* mean;     // [rows, cols]; may be null with grad_kl
  const void* scale;
  const void* prior_mean;  // null for the standard normal
  const void* prior_scale;
  void* grad_mean;  // [rows, cols]
  void* grad_scale;
  void* grad_prior_mean;  // null with prior_mean
  void* grad_prior_scale;
};

struct GaussianKernels {
  void (*noise)(const GaussianNoise&);
  void (*sample)(const GaussianSample&);
  void (*sample_backward)(const GaussianSampleBackward&);
};

ISTHMUS_DECLARE_KERNELS(GaussianKernels, gaussian)

// CUDA: the same arguments with device pointers. Launches on `stream` (a cudaStream_t) of the current device and
// returns without waiting.
namespace cuda {
void gaussian_noise(const GaussianNoise&, void* stream);
void gaussian_sample(const GaussianSample&, void* stream);
void gaussian_sample_backward(const GaussianSampleBackward&, void* stream);
}  // namespace cuda

}  // namespace isthmus
