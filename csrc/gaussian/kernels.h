// Reparameterised Gaussian sampling: the kernels, free of torch.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/gaussians.h"
#include "core/isa.h"

namespace isthmus {

struct GaussianNoise {
  DType dtype;
  const int64_t* key;  // [2]: seed, offset
  int64_t count;
  void* noise;  // [count]
};

// z = mean + temperature · s · noise, on request with the divergence from the prior and the log-densities of z.
// Antithetic samples come in pairs: the second has the noise of the first, negated.
struct GaussianSample {
  Gaussians posterior;
  Reduction reduction;  // of the divergence; its view of the elements is that of all results
  int64_t num_samples;
  bool antithetic;
  double temperature;
  const int64_t* key;  // [2]: seed, offset
  void* z;             // [num_samples, rows, cols]
  void* kl;            // [reduction.sums()] in the accumulate type, or null
  void* log_q;         // [num_samples, rows] in the accumulate type, or null. Density of z under the posterior
  void* log_p;         // the same under the prior; null with log_q
};

struct GaussianSampleBackward {
  Gaussians posterior;
  Reduction reduction;
  int64_t num_samples;
  bool antithetic;
  double temperature;
  const int64_t* key;
  const void* grad_z;      // [num_samples, rows, cols]
  const void* grad_kl;     // [reduction.sums()], or null
  const void* grad_log_q;  // [num_samples, rows], or null
  const void* grad_log_p;  // null with grad_log_q
  bool path_only;          // log_q has gradients through z alone, not through the parameters of its density
  const void* gate;        // [num_samples, rows]: factor on all that flows through a sample; or null
  double posterior_weight, prior_weight;  // factors on the gradient of the divergence to either side
  GaussianGradients grads;
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
// Elements of the accumulate type that gaussian_sample needs for partial sums of the divergence.
int64_t gaussian_sample_workspace(const Reduction&);
void gaussian_noise(const GaussianNoise&, void* stream);
void gaussian_sample(const GaussianSample&, void* workspace, void* stream);
void gaussian_sample_backward(const GaussianSampleBackward&, void* stream);
}  // namespace cuda

}  // namespace isthmus
