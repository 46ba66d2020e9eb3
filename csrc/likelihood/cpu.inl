// Negative log-likelihoods on the CPU: densities evaluated element by element (elementwise.inl, densities.h) and the
// mixture of logistics (mixture.inl, logistic.h).
//
// Bound by arithmetic in cache and by memory beyond it: nothing is stored between the passes.

#include "core/dispatch.h"
#include "core/normal.h"
#include "core/special.h"
#include "likelihood/densities.h"
#include "likelihood/elementwise.inl"
#include "likelihood/mixture.inl"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

// Calls f<T, S, shared>() for the dtype and the scale type of `args`, and whether its scale is one element.
template <class Args, class F>
void dispatch_scaled(const Args& args, F&& f) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    dispatch_scale(args.scale_type, [&]<ScaleType S>() {
      args.in[scale_argument].shared ? f.template operator()<T, S, true>() : f.template operator()<T, S, false>();
    });
  });
}

template <class T, ScaleType S, bool SharedScale, class Args>
Gaussian<Compute<T>, S, SharedScale> gaussian(const Args& args) {
  return {static_cast<Compute<T>>(args.beta)};
}

void gaussian_nll(const GaussianNll<Nll>& args) {
  dispatch_scaled(args, [&]<class T, ScaleType S, bool Shared>() { sum_nll<T>(args, gaussian<T, S, Shared>(args)); });
}

void gaussian_nll_backward(const GaussianNll<NllBackward>& args) {
  dispatch_scaled(
      args, [&]<class T, ScaleType S, bool Shared>() { write_nll_gradients<T>(args, gaussian<T, S, Shared>(args)); });
}

template <class T, ScaleType S, bool SharedScale, class Args>
DiscretizedGaussian<Compute<T>, S, SharedScale> discretized_gaussian(const Args& args) {
  using C = Compute<T>;
  return {static_cast<C>(0.5 * args.bin_width), static_cast<C>(__builtin_log(args.bin_width)), static_cast<C>(args.low),
          static_cast<C>(args.high)};
}

void discretized_gaussian_nll(const DiscretizedGaussianNll<Nll>& args) {
  dispatch_scaled(
      args, [&]<class T, ScaleType S, bool Shared>() { sum_nll<T>(args, discretized_gaussian<T, S, Shared>(args)); });
}

void discretized_gaussian_nll_backward(const DiscretizedGaussianNll<NllBackward>& args) {
  dispatch_scaled(args, [&]<class T, ScaleType S, bool Shared>() {
    write_nll_gradients<T>(args, discretized_gaussian<T, S, Shared>(args));
  });
}

void generalized_gaussian_nll(const GeneralizedGaussianNll<Nll>& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    args.in[scale_argument].shared ? sum_nll<T>(args, GeneralizedGaussian<Compute<T>, true>{})
                                   : sum_nll<T>(args, GeneralizedGaussian<Compute<T>, false>{});
  });
}

void generalized_gaussian_nll_backward(const GeneralizedGaussianNll<NllBackward>& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    args.in[scale_argument].shared ? write_nll_gradients<T>(args, GeneralizedGaussian<Compute<T>, true>{})
                                   : write_nll_gradients<T>(args, GeneralizedGaussian<Compute<T>, false>{});
  });
}

}  // namespace

extern const LikelihoodKernels likelihood_table;
const LikelihoodKernels likelihood_table = {
    gaussian_nll,
    gaussian_nll_backward,
    discretized_gaussian_nll,
    discretized_gaussian_nll_backward,
    generalized_gaussian_nll,
    generalized_gaussian_nll_backward,
    discretized_logistic_mixture_nll,
    discretized_logistic_mixture_nll_backward,
};

}  // namespace isthmus::ISTHMUS_LEVEL
