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

struct LikelihoodKernels {
  void (*gaussian_nll)(const GaussianNll<Nll>&);
  void (*gaussian_nll_backward)(const GaussianNll<NllBackward>&);
};

ISTHMUS_DECLARE_KERNELS(LikelihoodKernels, likelihood)

// CUDA: the same arguments with device pointers. Launches on `stream` (a cudaStream_t) of the current device and
// returns without waiting.
namespace cuda {
int64_t nll_workspace(int64_t rows, int64_t cols);
int64_t nll_backward_workspace(int64_t rows, int64_t cols);
void likelihood_gaussian_nll(const GaussianNll<Nll>&, void* stream);
void likelihood_gaussian_nll_backward(const GaussianNll<NllBackward>&, void* stream);
}  // namespace cuda

}  // namespace isthmus
