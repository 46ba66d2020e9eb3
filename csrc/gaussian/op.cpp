// Host entries of the gaussian family: checks, allocation, dispatch. Schemas in csrc/library.cpp.

#include "gaussian/kernels.h"
#include "gaussian_arguments.h"

namespace isthmus {
namespace {

Tensor gaussian_noise(const Tensor& key, const std::vector<int64_t>& shape, ScalarType dtype) {
  check_key(key);
  const Tensor key_data = as_contiguous(key);
  const Tensor noise = empty(shape, dtype, key);
  const GaussianNoise args{dtype_of(dtype, "dtype"), int64_data(key_data), noise.numel(), mutable_data(noise)};
  ISTHMUS_LAUNCH(key, gaussian, noise, args);
  return noise;
}

// How samples are drawn.
struct Draw {
  Tensor key;
  int64_t num_samples;  // 0: one, without an axis of its own
  bool antithetic;
  double temperature;

  Draw(const Tensor& key_, const Tensor& mean, int64_t num_samples_, bool antithetic_, double temperature_)
      : key(key_), num_samples(num_samples_), antithetic(antithetic_), temperature(temperature_) {
    check_key(key);
    check_device(key, "key", mean, "mean");
    key = as_contiguous(key);
    if (num_samples < 0) fail("num_samples is ", num_samples, "; expected 0 (no sample axis) or more");
    if (antithetic && (num_samples == 0 || num_samples % 2 != 0)) {
      fail("num_samples is ", num_samples, "; expected an even number of antithetic samples");
    }
  }

  int64_t count() const { return num_samples == 0 ? 1 : num_samples; }
  std::vector<int64_t> sizes(std::vector<int64_t> of_one) const {
    if (num_samples > 0) of_one.insert(of_one.begin(), num_samples);
    return of_one;
  }
};

GaussianSample sample_arguments(const GaussianArguments& q, const Draw& draw, const Reduction& reduction) {
  GaussianSample args = {};
  args.posterior = q.gaussians;
  args.reduction = reduction;
  args.num_samples = draw.count();
  args.antithetic = draw.antithetic;
  args.temperature = draw.temperature;
  args.key = int64_data(draw.key);
  return args;
}

GaussianSampleBackward backward_arguments(const GaussianArguments& q, const Draw& draw, const Reduction& reduction,
                                          const GaussianGradientTensors& grads) {
  GaussianSampleBackward args = {};
  args.posterior = q.gaussians;
  args.reduction = reduction;
  args.num_samples = draw.count();
  args.antithetic = draw.antithetic;
  args.temperature = draw.temperature;
  args.key = int64_data(draw.key);
  args.posterior_weight = args.prior_weight = 1;
  args.grads = grads.results;
  return args;
}

void launch_sample(const GaussianArguments& q, const GaussianSample& args) {
#if defined(ISTHMUS_CUDA)
  if (q.mean.is_cuda()) {
    const Tensor workspace = empty({cuda::gaussian_sample_workspace(args.reduction)}, accumulate_type(q.mean), q.mean);
    const CudaScope scope(q.mean);
    return cuda::gaussian_sample(args, mutable_data(workspace), scope.stream);
  }
#else
  (void)q;
#endif
  gaussian_kernels().sample(args);
}

Reduction rows_of(const GaussianArguments& q) { return DivergenceReduction("row", 0, 1, q).view; }

// ---- samples -------------------------------------------------------------------------------------------------------

Tensor gaussian_sample(const Tensor& mean, const OptionalTensor& scale, const Tensor& key,
                       const std::string& scale_type, int64_t packed_dim, const std::string& clamp_mode,
                       double clamp_low, double clamp_high, int64_t num_samples, bool antithetic, double temperature) {
  const GaussianArguments q(mean, scale, std::nullopt, std::nullopt, std::nullopt,
                            {scale_type, packed_dim, false, clamp_mode, clamp_low, clamp_high});
  const Draw draw(key, mean, num_samples, antithetic, temperature);
  const Tensor z = empty(draw.sizes(q.sizes), mean.scalar_type(), mean);
  GaussianSample args = sample_arguments(q, draw, rows_of(q));
  args.z = mutable_data(z);
  launch_sample(q, args);
  return z;
}

// The mean is taken for its layout only: no gradient depends on its values.
std::tuple<Tensor, Tensor> gaussian_sample_backward(const Tensor& grad_, const Tensor& mean,
                                                    const OptionalTensor& scale, const Tensor& key,
                                                    const std::string& scale_type, int64_t packed_dim,
                                                    const std::string& clamp_mode, double clamp_low, double clamp_high,
                                                    int64_t num_samples, bool antithetic, double temperature) {
  const GaussianArguments q(mean, scale, std::nullopt, std::nullopt, std::nullopt,
                            {scale_type, packed_dim, false, clamp_mode, clamp_low, clamp_high});
  const Draw draw(key, mean, num_samples, antithetic, temperature);
  check_tensor(grad_, "grad", mean.scalar_type(), draw.sizes(q.sizes), mean, "mean");
  const Tensor grad = as_contiguous(grad_);
  const GaussianGradientTensors grads(q, false);
  GaussianSampleBackward args = backward_arguments(q, draw, rows_of(q), grads);
  args.grad_z = data(grad);
  ISTHMUS_LAUNCH(mean, gaussian, sample_backward, args);
  return {grads.mean, grads.scale};
}

// ---- samples and divergence ----------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> gaussian_sample_kl(const Tensor& mean, const OptionalTensor& scale,
                                              const OptionalTensor& prior_mean, const OptionalTensor& prior_scale,
                                              const OptionalTensor& mask, const Tensor& key,
                                              const std::string& scale_type, int64_t packed_dim, bool residual,
                                              const std::string& clamp_mode, double clamp_low, double clamp_high,
                                              int64_t num_samples, bool antithetic, double temperature,
                                              const std::string& reduction, int64_t groups, double weight, double,
                                              double) {
  const GaussianArguments q(mean, scale, prior_mean, prior_scale, mask,
                            {scale_type, packed_dim, residual, clamp_mode, clamp_low, clamp_high});
  const Draw draw(key, mean, num_samples, antithetic, temperature);
  const DivergenceReduction sums(reduction, groups, weight, q);
  const Tensor z = empty(draw.sizes(q.sizes), mean.scalar_type(), mean);
  const Tensor kl = empty(sums.sizes, accumulate_type(mean), mean);
  GaussianSample args = sample_arguments(q, draw, sums.view);
  args.z = mutable_data(z);
  args.kl = mutable_data(kl);
  launch_sample(q, args);
  return {z, kl};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_sample_kl_backward(
    const Tensor& grad_z_, const Tensor& grad_kl_, const Tensor& mean, const OptionalTensor& scale,
    const OptionalTensor& prior_mean, const OptionalTensor& prior_scale, const OptionalTensor& mask, const Tensor& key,
    const std::string& scale_type, int64_t packed_dim, bool residual, const std::string& clamp_mode, double clamp_low,
    double clamp_high, int64_t num_samples, bool antithetic, double temperature, const std::string& reduction,
    int64_t groups, double weight, double posterior_weight, double prior_weight, bool prior_gradient) {
  const GaussianArguments q(mean, scale, prior_mean, prior_scale, mask,
                            {scale_type, packed_dim, residual, clamp_mode, clamp_low, clamp_high});
  const Draw draw(key, mean, num_samples, antithetic, temperature);
  const DivergenceReduction sums(reduction, groups, weight, q);
  check_tensor(grad_z_, "grad_z", mean.scalar_type(), draw.sizes(q.sizes), mean, "mean");
  check_accumulated(grad_kl_, "grad_kl", sums.sizes, mean, "mean");
  const Tensor grad_z = as_contiguous(grad_z_), grad_kl = as_contiguous(grad_kl_);
  const GaussianGradientTensors grads(q, prior_gradient);
  GaussianSampleBackward args = backward_arguments(q, draw, sums.view, grads);
  args.grad_z = data(grad_z);
  args.grad_kl = data(grad_kl);
  args.posterior_weight = posterior_weight;
  args.prior_weight = prior_weight;
  ISTHMUS_LAUNCH(mean, gaussian, sample_backward, args);
  return grads.tensors();
}

// ---- samples, divergence and log-densities -------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_sample_log_prob(
    const Tensor& mean, const OptionalTensor& scale, const OptionalTensor& prior_mean,
    const OptionalTensor& prior_scale, const Tensor& key, const std::string& scale_type, int64_t packed_dim,
    bool residual, const std::string& clamp_mode, double clamp_low, double clamp_high, int64_t num_samples,
    bool antithetic, double temperature, const std::string&, int64_t) {
  const GaussianArguments q(mean, scale, prior_mean, prior_scale, std::nullopt,
                            {scale_type, packed_dim, residual, clamp_mode, clamp_low, clamp_high});
  const Draw draw(key, mean, num_samples, antithetic, temperature);
  const ScalarType wide = accumulate_type(mean);
  const Tensor z = empty(draw.sizes(q.sizes), mean.scalar_type(), mean);
  const Tensor kl = empty(q.leading_sizes(), wide, mean);
  const Tensor log_q = empty(draw.sizes(q.leading_sizes()), wide, mean);
  const Tensor log_p = empty(draw.sizes(q.leading_sizes()), wide, mean);
  GaussianSample args = sample_arguments(q, draw, rows_of(q));
  args.z = mutable_data(z);
  args.kl = mutable_data(kl);
  args.log_q = mutable_data(log_q);
  args.log_p = mutable_data(log_p);
  launch_sample(q, args);
  return {z, kl, log_q, log_p};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_sample_log_prob_backward(
    const Tensor& grad_z_, const Tensor& grad_kl_, const Tensor& grad_log_q_, const Tensor& grad_log_p_,
    const OptionalTensor& gate_, const Tensor& mean, const OptionalTensor& scale, const OptionalTensor& prior_mean,
    const OptionalTensor& prior_scale, const Tensor& key, const std::string& scale_type, int64_t packed_dim,
    bool residual, const std::string& clamp_mode, double clamp_low, double clamp_high, int64_t num_samples,
    bool antithetic, double temperature, bool path_only, bool prior_gradient) {
  const GaussianArguments q(mean, scale, prior_mean, prior_scale, std::nullopt,
                            {scale_type, packed_dim, residual, clamp_mode, clamp_low, clamp_high});
  const Draw draw(key, mean, num_samples, antithetic, temperature);
  check_tensor(grad_z_, "grad_z", mean.scalar_type(), draw.sizes(q.sizes), mean, "mean");
  check_accumulated(grad_kl_, "grad_kl", q.leading_sizes(), mean, "mean");
  check_accumulated(grad_log_q_, "grad_log_q", draw.sizes(q.leading_sizes()), mean, "mean");
  check_accumulated(grad_log_p_, "grad_log_p", draw.sizes(q.leading_sizes()), mean, "mean");
  if (gate_) check_accumulated(*gate_, "gate", draw.sizes(q.leading_sizes()), mean, "mean");
  const Tensor grad_z = as_contiguous(grad_z_), grad_kl = as_contiguous(grad_kl_);
  const Tensor grad_log_q = as_contiguous(grad_log_q_), grad_log_p = as_contiguous(grad_log_p_);
  const OptionalTensor gate = as_contiguous(gate_);
  const GaussianGradientTensors grads(q, prior_gradient);
  GaussianSampleBackward args = backward_arguments(q, draw, rows_of(q), grads);
  args.grad_z = data(grad_z);
  args.grad_kl = data(grad_kl);
  args.grad_log_q = data(grad_log_q);
  args.grad_log_p = data(grad_log_p);
  args.path_only = path_only;
  args.gate = data(gate);
  ISTHMUS_LAUNCH(mean, gaussian, sample_backward, args);
  return grads.tensors();
}

}  // namespace

void register_gaussian(StableLibrary& m) {
  m.impl("gaussian_noise", TORCH_BOX(&gaussian_noise));
  m.impl("gaussian_sample", TORCH_BOX(&gaussian_sample));
  m.impl("gaussian_sample_backward", TORCH_BOX(&gaussian_sample_backward));
  m.impl("gaussian_sample_kl", TORCH_BOX(&gaussian_sample_kl));
  m.impl("gaussian_sample_kl_backward", TORCH_BOX(&gaussian_sample_kl_backward));
  m.impl("gaussian_sample_log_prob", TORCH_BOX(&gaussian_sample_log_prob));
  m.impl("gaussian_sample_log_prob_backward", TORCH_BOX(&gaussian_sample_log_prob_backward));
}

}  // namespace isthmus
