// Host entries of the gaussian family: checks, allocation, dispatch. Schemas in csrc/library.cpp.

#include "op.h"
#include "gaussian/kernels.h"

namespace isthmus {
namespace {

struct Prior {
  OptionalTensor mean, scale;

  Prior(const OptionalTensor& mean_, const OptionalTensor& scale_, const Tensor& like)
      : mean(as_contiguous(mean_)), scale(as_contiguous(scale_)) {
    if (mean.has_value() != scale.has_value()) {
      fail(mean ? "prior_scale" : "prior_mean", " is missing; give both prior_mean and prior_scale, or neither");
    }
    if (mean) {
      check_like(*mean, "prior_mean", like, "mean");
      check_like(*scale, "prior_scale", like, "mean");
    }
  }

  bool given() const { return mean.has_value(); }
};

int64_t sample_count(int64_t num_samples) {
  if (num_samples < 0) fail("num_samples is ", num_samples, "; expected 0 (no sample axis) or more");
  return num_samples == 0 ? 1 : num_samples;
}

std::vector<int64_t> sample_sizes(const Tensor& mean, int64_t num_samples) {
  std::vector<int64_t> sizes = sizes_of(mean);
  if (num_samples > 0) sizes.insert(sizes.begin(), num_samples);
  return sizes;
}

Tensor gaussian_noise(const Tensor& key, const std::vector<int64_t>& shape, ScalarType dtype) {
  check_key(key);
  const Tensor key_data = as_contiguous(key);
  const Tensor noise = empty(shape, dtype, key);
  const GaussianNoise args{dtype_of(dtype, "dtype"), int64_data(key_data), noise.numel(), mutable_data(noise)};
  ISTHMUS_LAUNCH(key, gaussian, noise, args);
  return noise;
}

Tensor gaussian_sample(const Tensor& mean_, const Tensor& scale_, const Tensor& key_, const std::string& scale_type,
                       int64_t num_samples, double temperature) {
  check_key(key_);
  check_like(scale_, "scale", mean_, "mean");
  check_device(key_, "key", mean_, "mean");
  const Tensor mean = as_contiguous(mean_), scale = as_contiguous(scale_), key = as_contiguous(key_);
  const Tensor z = empty(sample_sizes(mean, num_samples), mean.scalar_type(), mean);
  const int64_t cols = last_size(mean);
  const GaussianSample args{dtype_of(mean, "mean"),
                            parse_scale_type(scale_type),
                            leading_size(mean),
                            cols,
                            sample_count(num_samples),
                            temperature,
                            int64_data(key),
                            data(mean),
                            data(scale),
                            nullptr,
                            nullptr,
                            mutable_data(z),
                            nullptr};
  ISTHMUS_LAUNCH(mean, gaussian, sample, args);
  return z;
}

std::tuple<Tensor, Tensor> gaussian_sample_backward(const Tensor& grad_, const Tensor& scale_, const Tensor& key_,
                                                    const std::string& scale_type, int64_t num_samples,
                                                    double temperature) {
  const Tensor grad = as_contiguous(grad_), scale = as_contiguous(scale_), key = as_contiguous(key_);
  check_dtype(grad, "grad", scale, "scale");
  const Tensor grad_mean = empty(sizes_of(scale), scale.scalar_type(), scale);
  const Tensor grad_scale = empty(sizes_of(scale), scale.scalar_type(), scale);
  const GaussianSampleBackward args{dtype_of(scale, "scale"),
                                    parse_scale_type(scale_type),
                                    leading_size(scale),
                                    last_size(scale),
                                    sample_count(num_samples),
                                    temperature,
                                    int64_data(key),
                                    data(grad),
                                    nullptr,
                                    nullptr,
                                    data(scale),
                                    nullptr,
                                    nullptr,
                                    mutable_data(grad_mean),
                                    mutable_data(grad_scale),
                                    nullptr,
                                    nullptr};
  ISTHMUS_LAUNCH(scale, gaussian, sample_backward, args);
  return {grad_mean, grad_scale};
}

std::tuple<Tensor, Tensor> gaussian_sample_kl(const Tensor& mean_, const Tensor& scale_,
                                              const OptionalTensor& prior_mean, const OptionalTensor& prior_scale,
                                              const Tensor& key_, const std::string& scale_type, int64_t num_samples,
                                              double temperature) {
  check_key(key_);
  check_like(scale_, "scale", mean_, "mean");
  check_device(key_, "key", mean_, "mean");
  const Prior prior(prior_mean, prior_scale, mean_);
  const Tensor mean = as_contiguous(mean_), scale = as_contiguous(scale_), key = as_contiguous(key_);
  const Tensor z = empty(sample_sizes(mean, num_samples), mean.scalar_type(), mean);
  const Tensor kl = empty(leading_sizes(mean), accumulate_type(mean), mean);
  const GaussianSample args{dtype_of(mean, "mean"),
                            parse_scale_type(scale_type),
                            leading_size(mean),
                            last_size(mean),
                            sample_count(num_samples),
                            temperature,
                            int64_data(key),
                            data(mean),
                            data(scale),
                            data(prior.mean),
                            data(prior.scale),
                            mutable_data(z),
                            mutable_data(kl)};
  ISTHMUS_LAUNCH(mean, gaussian, sample, args);
  return {z, kl};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_sample_kl_backward(
    const Tensor& grad_z_, const Tensor& grad_kl_, const Tensor& mean_, const Tensor& scale_,
    const OptionalTensor& prior_mean, const OptionalTensor& prior_scale, const Tensor& key_,
    const std::string& scale_type, int64_t num_samples, double temperature) {
  check_like(scale_, "scale", mean_, "mean");
  const Prior prior(prior_mean, prior_scale, mean_);
  const Tensor grad_z = as_contiguous(grad_z_), grad_kl = as_contiguous(grad_kl_);
  check_dtype(grad_z, "grad_z", mean_, "mean");
  const Tensor mean = as_contiguous(mean_), scale = as_contiguous(scale_), key = as_contiguous(key_);
  const auto gradient = [&](bool wanted) {
    return wanted ? empty(sizes_of(mean), mean.scalar_type(), mean) : absent(mean);
  };
  const Tensor grad_mean = gradient(true), grad_scale = gradient(true);
  const Tensor grad_prior_mean = gradient(prior.given()), grad_prior_scale = gradient(prior.given());
  const GaussianSampleBackward args{dtype_of(mean, "mean"),
                                    parse_scale_type(scale_type),
                                    leading_size(mean),
                                    last_size(mean),
                                    sample_count(num_samples),
                                    temperature,
                                    int64_data(key),
                                    data(grad_z),
                                    data(grad_kl),
                                    data(mean),
                                    data(scale),
                                    data(prior.mean),
                                    data(prior.scale),
                                    mutable_data(grad_mean),
                                    mutable_data(grad_scale),
                                    mutable_data(grad_prior_mean),
                                    mutable_data(grad_prior_scale)};
  ISTHMUS_LAUNCH(mean, gaussian, sample_backward, args);
  return {grad_mean, grad_scale, grad_prior_mean, grad_prior_scale};
}

}  // namespace

void register_gaussian(StableLibrary& m) {
  m.impl("gaussian_noise", TORCH_BOX(&gaussian_noise));
  m.impl("gaussian_sample", TORCH_BOX(&gaussian_sample));
  m.impl("gaussian_sample_backward", TORCH_BOX(&gaussian_sample_backward));
  m.impl("gaussian_sample_kl", TORCH_BOX(&gaussian_sample_kl));
  m.impl("gaussian_sample_kl_backward", TORCH_BOX(&gaussian_sample_kl_backward));
}

}  // namespace isthmus
