// Negative log-likelihoods: the kernels, free of torch. All pointers are to contiguous memory.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/isa.h"
#include "core/scale_type.h"

namespace isthmus {

// One argument of a density that is evaluated element by element.
struct Argument {
  const void* data;  // [rows, cols]; or one element of the accumulate type, if shared; null stands for the constant 1
  bool shared;
};

// nll[row] = weight · Σ_cols -log density(arguments).
//
// Every reduction is a choice of rows and cols: no reduction is one column, the sum of everything is one row.
struct Nll {
  static constexpr int max_arguments = 4;

  DType dtype;
  int64_t rows, cols;
  double weight;
  Argument in[max_arguments];
  void* nll;        // [rows] in the accumulate type
  void* workspace;  // CUDA: nll_workspace() elements of the accumulate type; else null
};

struct NllBackward {
  DType dtype;
  int64_t rows, cols;
  double weight;
  const void* grad;  // [rows] in the accumulate type
  Argument in[Nll::max_arguments];
  void* out[Nll::max_arguments];  // gradients, each laid out like its argument; null where nobody asks
  void* workspace;                // CUDA: nll_backward_workspace() elements of the accumulate type; else null
};

// N(mean, s²), each element times weight · s^(2 beta). The arguments are x, mean, scale, weight; s and beta make a
// factor without gradient, and so does weight.
template <class Direction>
struct GaussianNll : Direction {
  ScaleType scale_type;
  double beta;
};

// The bin of width bin_width around x under N(mean, s²). The arguments are x, mean, scale. From low down and from high
// up a bin is open; infinite bounds leave all closed.
template <class Direction>
struct DiscretizedGaussianNll : Direction {
  ScaleType scale_type;
  double bin_width, low, high;
};

// The generalised Gaussian. The arguments are x, mean, scale and shape, both positive.
template <class Direction>
struct GeneralizedGaussianNll : Direction {};

// The mixture of discretized logistics of PixelCNN++: values are bins of [-1, 1], the first and the last one open.
//
// Planes of the parameters: `mixtures` logits; then for each channel as many means and log-scales and, of three
// channels, raw coefficients. The mean of channel 1 moves by tanh(coefficient 0) x_0, that of channel 2 by
// tanh(coefficient 1) x_0 + tanh(coefficient 2) x_1.
struct LogisticMixture {
  DType dtype;
  int64_t images, channels, pixels, mixtures, bins;  // 1 or 3 channels
  double min_log_scale;                              // floor of the log-scales; below it their gradient is zero
  double weight;
  bool sum_pixels;         // one result for an image or for all of them, else for each pixel
  int64_t results;         // how many there are
  const void* x;           // [images, channels, pixels]
  const void* parameters;  // [images, mixture_planes(channels) · mixtures, pixels]
  void* nll;               // [results] in the accumulate type
  void* workspace;         // CUDA: logistic_mixture_workspace() elements of the accumulate type; else null
};

struct LogisticMixtureBackward : LogisticMixture {
  const void* grad;       // [results] in the accumulate type
  void* grad_x;           // null where nobody asks
  void* grad_parameters;  // null where nobody asks
};

constexpr int64_t mixture_planes(int64_t channels) { return 1 + 2 * channels + channels * (channels - 1) / 2; }

struct LikelihoodKernels {
  void (*gaussian_nll)(const GaussianNll<Nll>&);
  void (*gaussian_nll_backward)(const GaussianNll<NllBackward>&);
  void (*discretized_gaussian_nll)(const DiscretizedGaussianNll<Nll>&);
  void (*discretized_gaussian_nll_backward)(const DiscretizedGaussianNll<NllBackward>&);
  void (*generalized_gaussian_nll)(const GeneralizedGaussianNll<Nll>&);
  void (*generalized_gaussian_nll_backward)(const GeneralizedGaussianNll<NllBackward>&);
  void (*discretized_logistic_mixture_nll)(const LogisticMixture&);
  void (*discretized_logistic_mixture_nll_backward)(const LogisticMixtureBackward&);
};

ISTHMUS_DECLARE_KERNELS(LikelihoodKernels, likelihood)

// CUDA: the same arguments with device pointers. Launches on `stream` (a cudaStream_t) of the current device and
// returns without waiting.
namespace cuda {
int64_t nll_workspace(int64_t rows, int64_t cols);
int64_t nll_backward_workspace(int64_t rows, int64_t cols);
int64_t logistic_mixture_workspace(int64_t images, int64_t pixels);
void likelihood_gaussian_nll(const GaussianNll<Nll>&, void* stream);
void likelihood_gaussian_nll_backward(const GaussianNll<NllBackward>&, void* stream);
void likelihood_discretized_gaussian_nll(const DiscretizedGaussianNll<Nll>&, void* stream);
void likelihood_discretized_gaussian_nll_backward(const DiscretizedGaussianNll<NllBackward>&, void* stream);
void likelihood_generalized_gaussian_nll(const GeneralizedGaussianNll<Nll>&, void* stream);
void likelihood_generalized_gaussian_nll_backward(const GeneralizedGaussianNll<NllBackward>&, void* stream);
void likelihood_discretized_logistic_mixture_nll(const LogisticMixture&, void* stream);
void likelihood_discretized_logistic_mixture_nll_backward(const LogisticMixtureBackward&, void* stream);
}  // namespace cuda

}  // namespace isthmus
