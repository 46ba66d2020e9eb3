// Negative log-likelihoods on CUDA devices: densities evaluated element by element (elementwise.cuh, densities.h) and
// the mixture of logistics (mixture.cuh, logistic.h).

// First the functions that the formulas use.
#include <cmath>

#include "core/normal.cuh"

#include "likelihood/densities.h"
#include "likelihood/elementwise.cuh"
#include "likelihood/mixture.cuh"

namespace isthmus::cuda {
namespace {

template <class Args, class F>
void dispatch_scaled(const Args& args, F&& f) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    dispatch_scale(args.scale_type, [&]<ScaleType S>() { f.template operator()<T, S>(); });
  });
}

// Whether the scale is shared is looked up at run time here: one more load that the cache serves.
template <class T, ScaleType S, class Args>
Gaussian<Compute<T>, S, false> gaussian(const Args& args) {
  return {static_cast<Compute<T>>(args.beta)};
}

template <class T, ScaleType S, class Args>
DiscretizedGaussian<Compute<T>, S, false> discretized_gaussian(const Args& args) {
  using C = Compute<T>;
  return {static_cast<C>(0.5 * args.bin_width), static_cast<C>(std::log(args.bin_width)), static_cast<C>(args.low),
          static_cast<C>(args.high)};
}

}  // namespace

int64_t nll_workspace(int64_t rows, int64_t cols) {
  const Segments segments(rows, cols, 1);
  return segments.per_row > 1 ? segments.count : 0;
}

int64_t nll_backward_workspace(int64_t rows, int64_t cols) {
  return Nll::max_arguments * Segments(rows, cols, 1).blocks();  // of all packs, those of one element need most blocks
}

void likelihood_gaussian_nll(const GaussianNll<Nll>& args, void* stream) {
  dispatch_scaled(args,
                  [&]<class T, ScaleType S>() { sum_nll<T>("gaussian_nll", args, gaussian<T, S>(args), stream); });
}

void likelihood_gaussian_nll_backward(const GaussianNll<NllBackward>& args, void* stream) {
  dispatch_scaled(args, [&]<class T, ScaleType S>() {
    write_nll_gradients<T>("gaussian_nll_backward", args, gaussian<T, S>(args), stream);
  });
}

void likelihood_discretized_gaussian_nll(const DiscretizedGaussianNll<Nll>& args, void* stream) {
  dispatch_scaled(args, [&]<class T, ScaleType S>() {
    sum_nll<T>("discretized_gaussian_nll", args, discretized_gaussian<T, S>(args), stream);
  });
}

void likelihood_discretized_gaussian_nll_backward(const DiscretizedGaussianNll<NllBackward>& args, void* stream) {
  dispatch_scaled(args, [&]<class T, ScaleType S>() {
    write_nll_gradients<T>("discretized_gaussian_nll_backward", args, discretized_gaussian<T, S>(args), stream);
  });
}

void likelihood_generalized_gaussian_nll(const GeneralizedGaussianNll<Nll>& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    sum_nll<T>("generalized_gaussian_nll", args, GeneralizedGaussian<Compute<T>, false>{}, stream);
  });
}

void likelihood_generalized_gaussian_nll_backward(const GeneralizedGaussianNll<NllBackward>& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    write_nll_gradients<T>("generalized_gaussian_nll_backward", args, GeneralizedGaussian<Compute<T>, false>{}, stream);
  });
}

}  // namespace isthmus::cuda
