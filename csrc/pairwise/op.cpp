// Host entries of the pairwise family: checks, allocation, dispatch. Schemas in csrc/library.cpp.

#include <cmath>

#include "op.h"
#include "pairwise/kernels.h"

namespace isthmus {
namespace {

// ---- mixture -------------------------------------------------------------------------------------------------------

SumOver parse_sum_over(const std::string& name) {
  if (name == "components") return SumOver::components;
  if (name == "rows") return SumOver::rows;
  fail("over is '", name, "'; expected 'components' or 'rows'");
}

// The checked and contiguous inputs of a mixture.
struct MixtureInputs {
  Tensor z, mean, scale;
  OptionalTensor log_weight;
  GaussianPairs pairs;
  SumOver over;
  std::vector<int64_t> result_sizes;

  MixtureInputs(const Tensor& z_, const Tensor& mean_, const Tensor& scale_, const OptionalTensor& log_weight_,
                const std::string& scale_type, const std::string& over_)
      : z(z_), mean(mean_), scale(scale_), log_weight(log_weight_), over(parse_sum_over(over_)) {
    if (z.dim() == 0) fail("z has shape []; expected [..., D]");
    const int64_t rows = leading_size(z), dim = last_size(z);
    check_matrix(mean, "mean", -1, dim, z, "z");
    if (mean.size(0) < 1) fail("mean has shape ", shape_of(mean), "; expected [K, ", dim, "] with K >= 1");
    check_like(scale, "scale", mean, "mean");
    const int64_t components = mean.size(0);
    if (log_weight) {
      check_vector(*log_weight, "log_weight", over == SumOver::components ? components : rows, z, "z");
    }
    z = as_contiguous(z);
    mean = as_contiguous(mean);
    scale = as_contiguous(scale);
    log_weight = as_contiguous(log_weight);
    pairs = {dtype_of(z, "z"), parse_scale_type(scale_type), rows, components, dim, data(z), data(mean), data(scale)};
    result_sizes = over == SumOver::components ? leading_sizes(z) : std::vector<int64_t>{components};
  }

  std::vector<int64_t> normalizer_sizes() const {
    std::vector<int64_t> sizes = result_sizes;
    sizes.insert(sizes.begin(), 2);
    return sizes;
  }
};

std::tuple<Tensor, Tensor> mixture_log_prob(const Tensor& z, const Tensor& mean, const Tensor& scale,
                                            const OptionalTensor& log_weight, const std::string& scale_type,
                                            const std::string& over) {
  const MixtureInputs in(z, mean, scale, log_weight, scale_type, over);
  const Tensor log_prob = empty(in.result_sizes, accumulate_type(in.z), in.z);
  const Tensor normalizer = empty(in.normalizer_sizes(), accumulate_type(in.z), in.z);
  Mixture args{.pairs = in.pairs,
               .over = in.over,
               .log_weight = data(in.log_weight),
               .log_prob = mutable_data(log_prob),
               .normalizer = mutable_data(normalizer),
               .workspace = nullptr};
  const Tensor workspace = ISTHMUS_ALLOCATE(in.z, pairwise, args);
  ISTHMUS_LAUNCH(in.z, pairwise, mixture, args);
  return {log_prob, normalizer};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mixture_log_prob_backward(
    const Tensor& grad_, const Tensor& normalizer_, const Tensor& z, const Tensor& mean, const Tensor& scale,
    const OptionalTensor& log_weight, const std::string& scale_type, const std::string& over, bool need_z,
    bool need_components, bool need_log_weight) {
  const MixtureInputs in(z, mean, scale, log_weight, scale_type, over);
  check_accumulated(grad_, "grad", in.result_sizes, in.z, "z");
  check_accumulated(normalizer_, "normalizer", in.normalizer_sizes(), in.z, "z");
  const Tensor grad = as_contiguous(grad_), normalizer = as_contiguous(normalizer_);
  const auto gradient_like = [&](const Tensor& t, bool wanted) {
    return wanted ? empty(sizes_of(t), t.scalar_type(), t) : absent(in.z);
  };
  const Tensor grad_z = gradient_like(in.z, need_z), grad_mean = gradient_like(in.mean, need_components);
  const Tensor grad_scale = gradient_like(in.scale, need_components);
  const bool has_weight = need_log_weight && in.log_weight.has_value();
  const Tensor grad_log_weight = has_weight ? gradient_like(*in.log_weight, true) : absent(in.z);
  MixtureBackward args{.pairs = in.pairs,
                       .over = in.over,
                       .log_weight = data(in.log_weight),
                       .normalizer = data(normalizer),
                       .grad = data(grad),
                       .grad_z = need_z ? mutable_data(grad_z) : nullptr,
                       .grad_mean = need_components ? mutable_data(grad_mean) : nullptr,
                       .grad_scale = need_components ? mutable_data(grad_scale) : nullptr,
                       .grad_log_weight = has_weight ? mutable_data(grad_log_weight) : nullptr,
                       .workspace = nullptr};
  const Tensor workspace = ISTHMUS_ALLOCATE(in.z, pairwise, args);
  ISTHMUS_LAUNCH(in.z, pairwise, mixture_backward, args);
  return {grad_z, grad_mean, grad_scale, grad_log_weight};
}

// ---- aggregate posterior -------------------------------------------------------------------------------------------

// N and M as in the paper: the data set, and the batch without the row itself.
AggregateWeights aggregate_weights(const std::string& estimator, int64_t dataset_size, int64_t batch) {
  const double n = static_cast<double>(dataset_size), m = static_cast<double>(batch) - 1;
  if (dataset_size < 1 || dataset_size < batch) {
    fail("dataset_size is ", dataset_size, "; expected at least the number of rows, ", batch);
  }
  if (estimator == "weighted") {
    const double log_weight = -std::log(n * (m + 1));
    return {log_weight, log_weight, log_weight};
  }
  if (estimator != "stratified") fail("estimator is '", estimator, "'; expected 'weighted' or 'stratified'");
  if (batch == 1) fail("z has 1 row; the stratified estimator expects at least 2");
  return {-std::log(n), std::log((n - m) / (n * m)), -std::log(m)};
}

struct AggregateInputs {
  Tensor z, mean, scale;
  GaussianPairs pairs;
  AggregateWeights weights;

  AggregateInputs(const Tensor& z_, const Tensor& mean_, const Tensor& scale_, int64_t dataset_size,
                  const std::string& estimator, const std::string& scale_type)
      : z(z_), mean(mean_), scale(scale_) {
    if (z.dim() != 2) fail("z has shape ", shape_of(z), "; expected [B, D]");
    check_like(mean, "mean", z, "z");
    check_like(scale, "scale", z, "z");
    weights = aggregate_weights(estimator, dataset_size, z.size(0));
    z = as_contiguous(z);
    mean = as_contiguous(mean);
    scale = as_contiguous(scale);
    pairs = {dtype_of(z, "z"), parse_scale_type(scale_type), z.size(0), z.size(0), z.size(1), data(z), data(mean),
             data(scale)};
  }
};

std::tuple<Tensor, Tensor, Tensor> aggregate_log_prob(const Tensor& z, const Tensor& mean, const Tensor& scale,
                                                      int64_t dataset_size, const std::string& estimator,
                                                      const std::string& scale_type) {
  const AggregateInputs in(z, mean, scale, dataset_size, estimator, scale_type);
  const Tensor log_joint = empty({in.pairs.rows}, accumulate_type(in.z), in.z);
  const Tensor log_marginal = empty(sizes_of(in.z), accumulate_type(in.z), in.z);
  const Tensor normalizer = empty({2, in.pairs.rows}, accumulate_type(in.z), in.z);
  Aggregate args{.pairs = in.pairs,
                 .weights = in.weights,
                 .log_joint = mutable_data(log_joint),
                 .log_marginal = mutable_data(log_marginal),
                 .normalizer = mutable_data(normalizer),
                 .workspace = nullptr};
  const Tensor workspace = ISTHMUS_ALLOCATE(in.z, pairwise, args);
  ISTHMUS_LAUNCH(in.z, pairwise, aggregate, args);
  return {log_joint, log_marginal, normalizer};
}

std::tuple<Tensor, Tensor, Tensor> aggregate_log_prob_backward(const Tensor& grad_joint_, const Tensor& grad_marginal_,
                                                               const Tensor& log_marginal_, const Tensor& normalizer_,
                                                               const Tensor& z, const Tensor& mean, const Tensor& scale,
                                                               int64_t dataset_size, const std::string& estimator,
                                                               const std::string& scale_type, bool need_z,
                                                               bool need_components) {
  const AggregateInputs in(z, mean, scale, dataset_size, estimator, scale_type);
  const std::vector<int64_t> joint_sizes{in.pairs.rows}, marginal_sizes = sizes_of(in.z);
  check_accumulated(grad_joint_, "grad_joint", joint_sizes, in.z, "z");
  check_accumulated(grad_marginal_, "grad_marginal", marginal_sizes, in.z, "z");
  check_accumulated(log_marginal_, "log_marginal", marginal_sizes, in.z, "z");
  check_accumulated(normalizer_, "normalizer", {2, in.pairs.rows}, in.z, "z");
  const Tensor grad_joint = as_contiguous(grad_joint_), grad_marginal = as_contiguous(grad_marginal_);
  const Tensor log_marginal = as_contiguous(log_marginal_), normalizer = as_contiguous(normalizer_);
  const auto gradient = [&](bool wanted) {
    return wanted ? empty(marginal_sizes, in.z.scalar_type(), in.z) : absent(in.z);
  };
  const Tensor grad_z = gradient(need_z), grad_mean = gradient(need_components), grad_scale = gradient(need_components);
  AggregateBackward args{.pairs = in.pairs,
                         .weights = in.weights,
                         .log_marginal = data(log_marginal),
                         .normalizer = data(normalizer),
                         .grad_joint = data(grad_joint),
                         .grad_marginal = data(grad_marginal),
                         .grad_z = need_z ? mutable_data(grad_z) : nullptr,
                         .grad_mean = need_components ? mutable_data(grad_mean) : nullptr,
                         .grad_scale = need_components ? mutable_data(grad_scale) : nullptr,
                         .workspace = nullptr};
  const Tensor workspace = ISTHMUS_ALLOCATE(in.z, pairwise, args);
  ISTHMUS_LAUNCH(in.z, pairwise, aggregate_backward, args);
  return {grad_z, grad_mean, grad_scale};
}

// ---- maximum mean discrepancy --------------------------------------------------------------------------------------

KernelSum parse_kernel(const std::string& name, const std::vector<double>& bandwidths) {
  KernelSum sum{};
  if (name != "rbf" && name != "imq") fail("kernel is '", name, "'; expected 'rbf' or 'imq'");
  sum.kernel = name == "rbf" ? DistanceKernel::rbf : DistanceKernel::imq;
  if (bandwidths.empty() || bandwidths.size() > KernelSum::max_count) {
    fail("bandwidths has ", bandwidths.size(), " entries; expected 1 to ", KernelSum::max_count);
  }
  for (const double h : bandwidths) {
    if (!(h > 0)) fail("bandwidths holds ", h, "; expected positive numbers");
    sum.factors[sum.count++] = 1 / (2 * h * h);
  }
  return sum;
}

struct DiscrepancyInputs {
  Tensor x, y;
  Discrepancy args;

  DiscrepancyInputs(const Tensor& x_, const Tensor& y_, const std::string& kernel,
                    const std::vector<double>& bandwidths, const std::string& estimator)
      : x(x_), y(y_) {
    if (x.dim() != 2) fail("x has shape ", shape_of(x), "; expected [N, D]");
    check_matrix(y, "y", -1, x.size(1), x, "x");
    if (estimator != "unbiased" && estimator != "biased") {
      fail("estimator is '", estimator, "'; expected 'unbiased' or 'biased'");
    }
    const bool unbiased = estimator == "unbiased";
    check_rows(x, "x", unbiased);
    check_rows(y, "y", unbiased);
    x = as_contiguous(x);
    y = as_contiguous(y);
    const double n = static_cast<double>(x.size(0)), m = static_cast<double>(y.size(0));
    args.dtype = dtype_of(x, "x");
    args.kernel = parse_kernel(kernel, bandwidths);
    args.weight_x = 1 / (n * (unbiased ? n - 1 : n));
    args.weight_y = 1 / (m * (unbiased ? m - 1 : m));
    args.weight_xy = 1 / (n * m);
    args.diagonal = unbiased ? 0 : args.kernel.count * (1 / n + 1 / m);  // k(x, x) is the number of bandwidths
    args.x_rows = x.size(0);
    args.y_rows = y.size(0);
    args.dim = x.size(1);
    args.x = data(x);
    args.y = data(y);
    args.value = args.workspace = nullptr;
  }

  static void check_rows(const Tensor& t, const char* argument, bool unbiased) {
    const int64_t least = unbiased ? 2 : 1;
    if (t.size(0) >= least) return;
    fail(argument, " has ", t.size(0), " rows; the ", unbiased ? "unbiased" : "biased", " estimator expects at least ",
         least);
  }
};

Tensor mmd(const Tensor& x, const Tensor& y, const std::string& kernel, const std::vector<double>& bandwidths,
           const std::string& estimator) {
  DiscrepancyInputs in(x, y, kernel, bandwidths, estimator);
  const Tensor value = empty({}, accumulate_type(in.x), in.x);
  in.args.value = mutable_data(value);
  const Tensor workspace = ISTHMUS_ALLOCATE(in.x, pairwise, in.args);
  ISTHMUS_LAUNCH(in.x, pairwise, discrepancy, in.args);
  return value;
}

std::tuple<Tensor, Tensor> mmd_backward(const Tensor& grad_, const Tensor& x, const Tensor& y,
                                        const std::string& kernel, const std::vector<double>& bandwidths,
                                        const std::string& estimator, bool need_x, bool need_y) {
  const DiscrepancyInputs in(x, y, kernel, bandwidths, estimator);
  check_accumulated(grad_, "grad", {}, in.x, "x");
  const Tensor grad = as_contiguous(grad_);
  const Tensor grad_x = need_x ? empty(sizes_of(in.x), in.x.scalar_type(), in.x) : absent(in.x);
  const Tensor grad_y = need_y ? empty(sizes_of(in.y), in.y.scalar_type(), in.y) : absent(in.y);
  DiscrepancyBackward args{.of = in.args,
                           .grad = data(grad),
                           .grad_x = need_x ? mutable_data(grad_x) : nullptr,
                           .grad_y = need_y ? mutable_data(grad_y) : nullptr,
                           .workspace = nullptr};
  const Tensor workspace = ISTHMUS_ALLOCATE(in.x, pairwise, args);
  ISTHMUS_LAUNCH(in.x, pairwise, discrepancy_backward, args);
  return {grad_x, grad_y};
}

}  // namespace

void register_pairwise(StableLibrary& m) {
  m.impl("mixture_log_prob", TORCH_BOX(&mixture_log_prob));
  m.impl("mixture_log_prob_backward", TORCH_BOX(&mixture_log_prob_backward));
  m.impl("aggregate_log_prob", TORCH_BOX(&aggregate_log_prob));
  m.impl("aggregate_log_prob_backward", TORCH_BOX(&aggregate_log_prob_backward));
  m.impl("mmd", TORCH_BOX(&mmd));
  m.impl("mmd_backward", TORCH_BOX(&mmd_backward));
}

}  // namespace isthmus
