// Host entries of the categorical family: checks, allocation, dispatch. Schemas in csrc/library.cpp.

#include "op.h"
#include "categorical/kernels.h"

namespace isthmus {
namespace {

// The same row everywhere: every step but the one along the columns leads nowhere.
bool is_shared_row(const Tensor& t) {
  for (int64_t d = 0; d < t.dim() - 1; ++d) {
    if (t.size(d) != 1 && t.stride(d) != 0) return false;
  }
  return t.numel() > 0 && t.dim() > 0 && (t.size(t.dim() - 1) == 1 || t.stride(t.dim() - 1) == 1);
}

// Logits and prior as the kernels want them; keeps what it copied alive.
struct Arguments {
  Tensor logits;
  OptionalTensor prior;
  Categories in;

  Arguments(const Tensor& logits_, const OptionalTensor& prior_) : logits(as_contiguous(logits_)), prior(prior_) {
    bool shared = false;
    if (prior) {
      check_like(*prior, "prior_logits", logits, "logits");
      shared = is_shared_row(*prior);
      if (!shared) prior = as_contiguous(prior);
    }
    in = {dtype_of(logits, "logits"), leading_size(logits), last_size(logits), data(logits), data(prior), shared};
  }

  Tensor like_logits() const { return empty(sizes_of(logits), logits.scalar_type(), logits); }
  Tensor row_values() const { return empty(leading_sizes(logits), accumulate_type(logits), logits); }

  void check_row_gradient(const Tensor& grad, const char* argument) const {
    check_accumulated(grad, argument, leading_sizes(logits), logits, "logits");
  }

  Tensor prior_gradient(bool wanted) const {
    if (wanted && !prior) fail("prior_gradient is true without prior_logits");
    return wanted ? like_logits() : absent(logits);
  }
};

void check_temperature(double temperature) {
  if (!(temperature > 0)) fail("temperature is ", temperature, "; expected a positive number");
}

Tensor gumbel_noise(const Tensor& key, const std::vector<int64_t>& shape, ScalarType dtype) {
  check_key(key);
  const Tensor key_data = as_contiguous(key);
  const Tensor noise = empty(shape, dtype, key);
  const GumbelNoise args{dtype_of(dtype, "dtype"), int64_data(key_data), noise.numel(), mutable_data(noise)};
  ISTHMUS_LAUNCH(key, categorical, noise, args);
  return noise;
}

// kl may be null.
void sample(const Arguments& in, const Tensor& key_, double temperature, bool hard, const Tensor& y, void* kl) {
  check_key(key_);
  check_device(key_, "key", in.logits, "logits");
  check_temperature(temperature);
  const Tensor key = as_contiguous(key_);
  const GumbelSoftmax args{in.in, temperature, hard, int64_data(key), mutable_data(y), kl};
  ISTHMUS_LAUNCH(in.logits, categorical, gumbel_softmax, args);
}

Tensor gumbel_softmax(const Tensor& logits, const Tensor& key, double temperature, bool hard) {
  const Arguments in(logits, std::nullopt);
  const Tensor y = in.like_logits();
  sample(in, key, temperature, hard, y, nullptr);
  return y;
}

Tensor gumbel_softmax_backward(const Tensor& grad_, const Tensor& y_, double temperature) {
  check_like(grad_, "grad", y_, "y");
  check_temperature(temperature);
  const Tensor grad = as_contiguous(grad_), y = as_contiguous(y_);
  const Tensor grad_logits = empty(sizes_of(y), y.scalar_type(), y);
  const SoftmaxBackward args{dtype_of(y, "y"), leading_size(y),          last_size(y), temperature, data(grad),
                             data(y),          mutable_data(grad_logits)};
  ISTHMUS_LAUNCH(y, categorical, softmax_backward, args);
  return grad_logits;
}

Tensor gumbel_softmax_hard_backward(const Tensor& grad_, const Tensor& logits, const Tensor& key_, double temperature) {
  const Arguments in(logits, std::nullopt);
  check_like(grad_, "grad", logits, "logits");
  const Tensor grad = as_contiguous(grad_), key = as_contiguous(key_), grad_logits = in.like_logits();
  const GumbelSoftmaxBackward args{in.in,  temperature, int64_data(key), data(grad), nullptr, mutable_data(grad_logits),
                                   nullptr};
  ISTHMUS_LAUNCH(in.logits, categorical, gumbel_softmax_backward, args);
  return grad_logits;
}

std::tuple<Tensor, Tensor> gumbel_softmax_kl(const Tensor& logits, const OptionalTensor& prior_logits,
                                             const Tensor& key, double temperature, bool hard) {
  const Arguments in(logits, prior_logits);
  const Tensor y = in.like_logits(), kl = in.row_values();
  sample(in, key, temperature, hard, y, mutable_data(kl));
  return {y, kl};
}

std::tuple<Tensor, Tensor> gumbel_softmax_kl_backward(const Tensor& grad_y_, const Tensor& grad_kl_,
                                                      const Tensor& logits, const OptionalTensor& prior_logits,
                                                      const Tensor& key_, double temperature, bool prior_gradient) {
  const Arguments in(logits, prior_logits);
  check_like(grad_y_, "grad_y", logits, "logits");
  in.check_row_gradient(grad_kl_, "grad_kl");
  const Tensor grad_y = as_contiguous(grad_y_), grad_kl = as_contiguous(grad_kl_), key = as_contiguous(key_);
  const Tensor grad_logits = in.like_logits(), grad_prior = in.prior_gradient(prior_gradient);
  const GumbelSoftmaxBackward args{in.in,
                                   temperature,
                                   int64_data(key),
                                   data(grad_y),
                                   data(grad_kl),
                                   mutable_data(grad_logits),
                                   prior_gradient ? mutable_data(grad_prior) : nullptr};
  ISTHMUS_LAUNCH(in.logits, categorical, gumbel_softmax_backward, args);
  return {grad_logits, grad_prior};
}

Tensor categorical_kl(const Tensor& logits, const OptionalTensor& prior_logits) {
  const Arguments in(logits, prior_logits);
  const Tensor kl = in.row_values();
  const CategoricalKl args{in.in, mutable_data(kl)};
  ISTHMUS_LAUNCH(in.logits, categorical, kl, args);
  return kl;
}

std::tuple<Tensor, Tensor> categorical_kl_backward(const Tensor& grad_, const Tensor& logits,
                                                   const OptionalTensor& prior_logits, bool prior_gradient) {
  const Arguments in(logits, prior_logits);
  in.check_row_gradient(grad_, "grad");
  const Tensor grad = as_contiguous(grad_);
  const Tensor grad_logits = in.like_logits(), grad_prior = in.prior_gradient(prior_gradient);
  const CategoricalKlBackward args{in.in, data(grad), mutable_data(grad_logits),
                                   prior_gradient ? mutable_data(grad_prior) : nullptr};
  ISTHMUS_LAUNCH(in.logits, categorical, kl_backward, args);
  return {grad_logits, grad_prior};
}

}  // namespace

void register_categorical(StableLibrary& m) {
  m.impl("gumbel_noise", TORCH_BOX(&gumbel_noise));
  m.impl("gumbel_softmax", TORCH_BOX(&gumbel_softmax));
  m.impl("gumbel_softmax_backward", TORCH_BOX(&gumbel_softmax_backward));
  m.impl("gumbel_softmax_hard_backward", TORCH_BOX(&gumbel_softmax_hard_backward));
  m.impl("gumbel_softmax_kl", TORCH_BOX(&gumbel_softmax_kl));
  m.impl("gumbel_softmax_kl_backward", TORCH_BOX(&gumbel_softmax_kl_backward));
  m.impl("categorical_kl", TORCH_BOX(&categorical_kl));
  m.impl("categorical_kl_backward", TORCH_BOX(&categorical_kl_backward));
}

}  // namespace isthmus
