// Host entries of the divergence family: checks, allocation, dispatch. Schemas in csrc/library.cpp.

#include "divergence/kernels.h"
#include "gaussian_arguments.h"

namespace isthmus {
namespace {

// ---- Gaussians -----------------------------------------------------------------------------------------------------

Tensor gaussian_kl(const Tensor& mean, const OptionalTensor& scale, const OptionalTensor& prior_mean,
                   const OptionalTensor& prior_scale, const OptionalTensor& mask, const std::string& scale_type,
                   int64_t packed_dim, bool residual, const std::string& clamp_mode, double clamp_low,
                   double clamp_high, const std::string& reduction, int64_t groups, double weight, double, double) {
  const GaussianArguments q(mean, scale, prior_mean, prior_scale, mask,
                            {scale_type, packed_dim, residual, clamp_mode, clamp_low, clamp_high});
  const DivergenceReduction sums(reduction, groups, weight, q);
  const Tensor kl = empty(sums.sizes, accumulate_type(mean), mean);
#if defined(ISTHMUS_CUDA)
  const int64_t partial_sums = mean.is_cuda() ? cuda::gaussian_kl_workspace(sums.view) : 0;
#else
  const int64_t partial_sums = 0;
#endif
  const Tensor workspace = empty({partial_sums}, accumulate_type(mean), mean);
  const GaussianKl args{q.gaussians, sums.view, mutable_data(kl), mutable_data(workspace)};
  ISTHMUS_LAUNCH(mean, divergence, gaussian_kl, args);
  return kl;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_kl_backward(
    const Tensor& grad_, const Tensor& mean, const OptionalTensor& scale, const OptionalTensor& prior_mean,
    const OptionalTensor& prior_scale, const OptionalTensor& mask, const std::string& scale_type, int64_t packed_dim,
    bool residual, const std::string& clamp_mode, double clamp_low, double clamp_high, const std::string& reduction,
    int64_t groups, double weight, double posterior_weight, double prior_weight, bool prior_gradient) {
  const GaussianArguments q(mean, scale, prior_mean, prior_scale, mask,
                            {scale_type, packed_dim, residual, clamp_mode, clamp_low, clamp_high});
  const DivergenceReduction sums(reduction, groups, weight, q);
  const Tensor grad = as_contiguous(grad_);
  check_accumulated(grad, "grad", sums.sizes, mean, "mean");
  const GaussianGradientTensors grads(q, prior_gradient);
  const GaussianKlBackward args{q.gaussians, sums.view, data(grad), posterior_weight, prior_weight, grads.results};
  ISTHMUS_LAUNCH(mean, divergence, gaussian_kl_backward, args);
  return grads.tensors();
}

// ---- importance weights --------------------------------------------------------------------------------------------

// log_weights [groups · samples, *] as [groups, samples, cols].
struct Weights {
  int64_t groups, samples, cols;

  Weights(const Tensor& log_weights, int64_t groups_) : groups(groups_) {
    if (log_weights.dim() == 0) fail("log_weights has shape []; expected [samples, *]");
    const int64_t total = log_weights.size(0);
    if (groups < 1 || total == 0 || total % groups != 0) {
      fail("groups is ", groups, ", log_weights has ", total, " samples; expected a divisor of their number");
    }
    samples = total / groups;
    cols = 1;
    for (int64_t d = 1; d < log_weights.dim(); ++d) cols *= log_weights.size(d);
  }
};

Tensor log_mean_exp(const Tensor& log_weights_, int64_t groups) {
  const Weights weights(log_weights_, groups);
  const Tensor log_weights = as_contiguous(log_weights_);
  std::vector<int64_t> sizes = sizes_of(log_weights);
  sizes[0] = groups;
  const Tensor bound = empty(sizes, accumulate_type(log_weights), log_weights);
  const LogMeanExp args{dtype_of(log_weights, "log_weights"),
                        groups,
                        weights.samples,
                        weights.cols,
                        data(log_weights),
                        mutable_data(bound)};
  ISTHMUS_LAUNCH(log_weights, divergence, log_mean_exp, args);
  return bound;
}

Tensor log_mean_exp_backward(const Tensor& grad_, const Tensor& log_weights_, const Tensor& bound_) {
  const Weights weights(log_weights_, bound_.size(0));
  check_like(grad_, "grad", bound_, "bound");
  const Tensor grad = as_contiguous(grad_), log_weights = as_contiguous(log_weights_), bound = as_contiguous(bound_);
  const Tensor result = empty(sizes_of(log_weights), log_weights.scalar_type(), log_weights);
  const LogMeanExpBackward args{dtype_of(log_weights, "log_weights"),
                                weights.groups,
                                weights.samples,
                                weights.cols,
                                data(grad),
                                data(log_weights),
                                data(bound),
                                mutable_data(result)};
  ISTHMUS_LAUNCH(log_weights, divergence, log_mean_exp_backward, args);
  return result;
}

}  // namespace

void register_divergence(StableLibrary& m) {
  m.impl("gaussian_kl", TORCH_BOX(&gaussian_kl));
  m.impl("gaussian_kl_backward", TORCH_BOX(&gaussian_kl_backward));
  m.impl("log_mean_exp", TORCH_BOX(&log_mean_exp));
  m.impl("log_mean_exp_backward", TORCH_BOX(&log_mean_exp_backward));
}

}  // namespace isthmus
