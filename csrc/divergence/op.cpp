// Host entries of the divergence family: checks, allocation, dispatch. Schemas in csrc/library.cpp.

#include "op.h"
#include "divergence/kernels.h"

namespace isthmus {
namespace {

// One value expanded to a whole tensor: every step leads back to it.
bool is_expanded_value(const Tensor& t) {
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) != 1 && t.stride(d) != 0) return false;
  }
  return t.numel() > 0;
}

struct Prior {
  OptionalTensor mean, scale;
  bool shared = false;

  Prior(const OptionalTensor& mean_, const OptionalTensor& scale_, const Tensor& like) : mean(mean_), scale(scale_) {
    if (mean.has_value() != scale.has_value()) {
      fail(mean ? "prior_scale" : "prior_mean", " is missing; give both prior_mean and prior_scale, or neither");
    }
    if (!mean) return;
    check_like(*mean, "prior_mean", like, "mean");
    check_like(*scale, "prior_scale", like, "mean");
    shared = is_expanded_value(*mean) && is_expanded_value(*scale);
    if (!shared) {
      mean = as_contiguous(mean);
      scale = as_contiguous(scale);
    }
  }
};

// A reduction as the kernels see it: sums over the columns of a [rows, cols] view, and the shape of the result.
struct Reduction {
  int64_t rows, cols;
  double weight = 1;
  std::vector<int64_t> sizes;

  Reduction(const std::string& name, const Tensor& mean) : rows(leading_size(mean)), cols(last_size(mean)) {
    if (name == "none") {
      rows *= cols;
      cols = 1;
      sizes = sizes_of(mean);
    } else if (name == "row") {
      sizes = leading_sizes(mean);
    } else if (name == "sum" || name == "mean") {
      if (name == "mean") weight = 1 / static_cast<double>(rows);
      cols *= rows;
      rows = 1;
    } else {
      fail("reduction is '", name, "'; expected 'none', 'row', 'sum' or 'mean'");
    }
  }
};

Tensor gaussian_kl(const Tensor& mean_, const Tensor& scale_, const OptionalTensor& prior_mean,
                   const OptionalTensor& prior_scale, const std::string& scale_type,
                   const std::string& reduction_name) {
  check_like(scale_, "scale", mean_, "mean");
  const Prior prior(prior_mean, prior_scale, mean_);
  const Tensor mean = as_contiguous(mean_), scale = as_contiguous(scale_);
  const Reduction reduction(reduction_name, mean);
  const Tensor kl = empty(reduction.sizes, accumulate_type(mean), mean);
#if defined(ISTHMUS_CUDA)
  const int64_t partial_sums = mean.is_cuda() ? cuda::gaussian_kl_workspace(reduction.rows, reduction.cols) : 0;
#else
  const int64_t partial_sums = 0;
#endif
  const Tensor workspace = empty({partial_sums}, accumulate_type(mean), mean);
  const GaussianKl args{dtype_of(mean, "mean"),
                        parse_scale_type(scale_type),
                        reduction.rows,
                        reduction.cols,
                        reduction.weight,
                        data(mean),
                        data(scale),
                        data(prior.mean),
                        data(prior.scale),
                        prior.shared,
                        mutable_data(kl),
                        mutable_data(workspace)};
  ISTHMUS_LAUNCH(mean, divergence, gaussian_kl, args);
  return kl;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_kl_backward(const Tensor& grad_, const Tensor& mean_,
                                                                const Tensor& scale_, const OptionalTensor& prior_mean,
                                                                const OptionalTensor& prior_scale,
                                                                const std::string& scale_type,
                                                                const std::string& reduction_name) {
  check_like(scale_, "scale", mean_, "mean");
  const Prior prior(prior_mean, prior_scale, mean_);
  const Tensor mean = as_contiguous(mean_), scale = as_contiguous(scale_), grad = as_contiguous(grad_);
  const Reduction reduction(reduction_name, mean);
  if (grad.scalar_type() != accumulate_type(mean) || sizes_of(grad) != reduction.sizes) {
    fail("grad has dtype ", name_of(grad.scalar_type()), " and shape ", shape_of(grad),
         "; expected those of the divergence it belongs to");
  }
  const Tensor grad_mean = empty(sizes_of(mean), mean.scalar_type(), mean);
  const Tensor grad_scale = empty(sizes_of(mean), mean.scalar_type(), mean);
  const auto prior_gradient = [&] {
    return prior.mean ? empty(sizes_of(mean), mean.scalar_type(), mean) : absent(mean);
  };
  const Tensor grad_prior_mean = prior_gradient(), grad_prior_scale = prior_gradient();
  const GaussianKlBackward args{dtype_of(mean, "mean"),
                                parse_scale_type(scale_type),
                                reduction.rows,
                                reduction.cols,
                                reduction.weight,
                                data(grad),
                                data(mean),
                                data(scale),
                                data(prior.mean),
                                data(prior.scale),
                                prior.shared,
                                mutable_data(grad_mean),
                                mutable_data(grad_scale),
                                mutable_data(grad_prior_mean),
                                mutable_data(grad_prior_scale)};
  ISTHMUS_LAUNCH(mean, divergence, gaussian_kl_backward, args);
  return {grad_mean, grad_scale, grad_prior_mean, grad_prior_scale};
}

}  // namespace

void register_divergence(StableLibrary& m) {
  m.impl("gaussian_kl", TORCH_BOX(&gaussian_kl));
  m.impl("gaussian_kl_backward", TORCH_BOX(&gaussian_kl_backward));
}

}  // namespace isthmus
