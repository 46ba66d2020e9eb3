// Divergences between Gaussians, and the streaming mean of importance weights, on CUDA; what is computed stands in
// kl.inl and log_mean_exp.inl.
//
// Bound by memory: forward reads every input once, in accesses of 16 bytes where the layout allows, and sums in one
// pass (core/reduce.cuh); backward reads them again and writes all gradients.

#include "core/gaussian_packs.cuh"
#include "core/reduce.cuh"
#include "divergence/kernels.h"

namespace isthmus::cuda {
namespace {

#include "divergence/kl.cuh"
#include "divergence/log_mean_exp.cuh"

template <class T>
constexpr int widest_pack = 16 / sizeof(T);

// Calls f<T, P, N>() for the dtype and the prior of `args`, N as wide as its layout and that of the results allows:
// `sums` of the compute type, or `grads`.
template <class Args, class F>
void dispatch(const Args& args, const void* sums, const GaussianGradients& grads, F&& f) {
  dispatch_gaussians(args.posterior, [&]<class T, Prior P>() {
    constexpr int widest = widest_pack<T>;
    const bool fits = packs_fit<widest>(args.reduction) && packs_fit<T, widest>(args.posterior) &&
                      packs_fit<Compute<T>, widest>(sums) && packs_fit<T, widest>(grads);
    fits ? f.template operator()<T, P, widest>() : f.template operator()<T, P, 1>();
  });
}

}  // namespace

int64_t gaussian_kl_workspace(const Reduction& view) { return sum_workspace(view); }

void divergence_gaussian_kl(const GaussianKl& args, void* stream) {
  dispatch(args, args.kl, {}, [&]<class T, Prior P, int N>() {
    sum<N, Compute<T>>("gaussian_kl", KlElements<T, P, N>{args.posterior}, args.reduction, args.kl, args.workspace,
                       stream);
  });
}

void divergence_gaussian_kl_backward(const GaussianKlBackward& args, void* stream) {
  dispatch(args, nullptr, args.grads, [&]<class T, Prior P, int N>() {
    const int64_t blocks = divide_up(args.reduction.rows * args.reduction.cols, threads_per_block * N);
    launch("gaussian_kl_backward", kl_backward_kernel<T, P, N>, blocks, threads_per_block, 0, stream, args);
  });
}

void divergence_log_mean_exp(const LogMeanExp& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    const Columns columns(args.samples, args.cols);
    launch("log_mean_exp", log_mean_exp_kernel<T>, args.groups * columns.tiles, threads_per_block, 0, stream, args,
           columns);
  });
}

void divergence_log_mean_exp_backward(const LogMeanExpBackward& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    const auto run = [&]<int N>() {
      const int64_t blocks = divide_up(args.groups * args.samples * args.cols, threads_per_block * N);
      launch("log_mean_exp_backward", log_mean_exp_backward_kernel<T, N>, blocks, threads_per_block, 0, stream, args);
    };
    constexpr int widest = widest_pack<T>;
    const bool fits = args.cols % widest == 0 && packs_fit<T, widest>(args.log_weights) &&
                      packs_fit<T, widest>(args.grad_log_weights);
    fits ? run.template operator()<widest>() : run.template operator()<1>();
  });
}

}  // namespace isthmus::cuda
