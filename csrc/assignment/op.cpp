// Host entries of the assignment family: checks, allocation, dispatch. Schemas in csrc/library.cpp.

#include "op.h"
#include "assignment/kernels.h"

namespace isthmus {
namespace {

double check_positive(double value, const char* argument) {
  if (!(value > 0)) fail(argument, " is ", value, "; expected a positive number");
  return value;
}

// The checked and contiguous inputs all ops share.
struct Inputs {
  Tensor x, codebook;
  OptionalTensor mask;
  Assignment args;

  Inputs(const Tensor& x_, const Tensor& codebook_, const OptionalTensor& mask_, const std::string& metric,
         double temperature)
      : x(x_), codebook(codebook_), mask(mask_) {
    if (x.dim() == 0) fail("x has shape []; expected [..., D]");
    check_codebook();
    if (mask) check_tensor(*mask, "mask", ScalarType::Bool, leading_sizes(x), x, "x");
    x = as_contiguous(x);
    codebook = as_contiguous(codebook);
    mask = as_contiguous(mask);
    const int64_t heads = codebook.dim() == 3 ? codebook.size(0) : 1;
    args = {.dtype = dtype_of(x, "x"),
            .metric = parse_metric(metric),
            .temperature = check_positive(temperature, "temperature"),
            .heads = heads,
            .rows = heads == 0 ? 0 : leading_size(x) / heads,
            .codes = codebook.size(codebook.dim() - 2),
            .dim = last_size(x),
            .x = data(x),
            .codebook = data(codebook),
            .mask = static_cast<const bool*>(data(mask))};
  }

  void check_codebook() const {
    check_device(codebook, "codebook", x, "x");
    check_dtype(codebook, "codebook", x, "x");
    const bool heads = codebook.dim() == 3 && x.dim() >= 2 && codebook.size(0) == x.size(0);
    const bool fits = (codebook.dim() == 2 || heads) && last_size(codebook) == last_size(x);
    constexpr int64_t max_codes = INT32_MAX;
    if (fits && codebook.size(codebook.dim() - 2) >= 1 && codebook.size(codebook.dim() - 2) <= max_codes) return;
    fail("codebook has shape ", shape_of(codebook), "; expected [K, D] or [H, K, D] with 1 <= K <= ", max_codes,
         " for x of shape ", shape_of(x), ", which is [..., D] or [H, ..., D]");
  }

  std::vector<int64_t> normalizer_sizes() const {
    std::vector<int64_t> sizes = leading_sizes(x);
    sizes.insert(sizes.begin(), 2);
    return sizes;
  }
  std::vector<int64_t> usage_sizes() const { return leading_sizes(codebook); }

  Tensor of_rows(ScalarType type) const { return empty(leading_sizes(x), type, x); }
  Tensor normalizer() const { return empty(normalizer_sizes(), accumulate_type(x), x); }
  Tensor gradient(const Tensor& t, bool wanted) const {
    return wanted ? empty(sizes_of(t), t.scalar_type(), t) : absent(x);
  }
};

void* data_if(bool wanted, const Tensor& t) { return wanted ? mutable_data(t) : nullptr; }

int64_t* mutable_indices(const Tensor& t) { return static_cast<int64_t*>(mutable_data(t)); }

// ---- samples -------------------------------------------------------------------------------------------------------

Tensor checked_key(const Tensor& key, const Tensor& x) {
  check_key(key);
  check_device(key, "key", x, "x");
  return as_contiguous(key);
}

Tensor vq_sample(const Tensor& x, const Tensor& codebook, const OptionalTensor& mask, const Tensor& key_,
                 const std::string& metric, double temperature) {
  const Inputs in(x, codebook, mask, metric, temperature);
  const Tensor key = checked_key(key_, in.x), indices = in.of_rows(ScalarType::Long);
  CodeSample args{.of = in.args, .key = int64_data(key), .indices = mutable_indices(indices), .workspace = nullptr};
  const Tensor workspace = ISTHMUS_ALLOCATE(in.x, assignment, args);
  ISTHMUS_LAUNCH(in.x, assignment, sample, args);
  return indices;
}

// ---- soft assignment -----------------------------------------------------------------------------------------------

struct NoiseInputs {
  OptionalTensor key;
  Gumbel args;

  NoiseInputs(const OptionalTensor& key_, double relaxation, const Tensor& x)
      : key(key_ ? OptionalTensor(checked_key(*key_, x)) : std::nullopt),
        args{key ? int64_data(*key) : nullptr, check_positive(relaxation, "relaxation")} {}
};

std::tuple<Tensor, Tensor, Tensor, Tensor> vq_soft_quantize(const Tensor& x, const Tensor& codebook,
                                                            const OptionalTensor& mask, const OptionalTensor& key,
                                                            const std::string& metric, double temperature,
                                                            double relaxation, bool hard) {
  const Inputs in(x, codebook, mask, metric, temperature);
  const NoiseInputs noise(key, relaxation, in.x);
  const Tensor quantized = empty(sizes_of(in.x), in.x.scalar_type(), in.x);
  const Tensor indices = in.of_rows(ScalarType::Long), normalizer = in.normalizer();
  const Tensor centred = empty(sizes_of(in.x), accumulate_type(in.x), in.x);
  SoftQuantize args{.of = in.args,
                    .gumbel = noise.args,
                    .hard = hard,
                    .quantized = mutable_data(quantized),
                    .indices = mutable_indices(indices),
                    .centred = mutable_data(centred),
                    .normalizer = mutable_data(normalizer),
                    .workspace = nullptr};
  const Tensor workspace = ISTHMUS_ALLOCATE(in.x, assignment, args);
  ISTHMUS_LAUNCH(in.x, assignment, soft_quantize, args);
  return {quantized, indices, centred, normalizer};
}

std::tuple<Tensor, Tensor> vq_soft_quantize_backward(const Tensor& grad_, const Tensor& centred_,
                                                     const Tensor& normalizer_, const Tensor& x, const Tensor& codebook,
                                                     const OptionalTensor& mask, const OptionalTensor& key,
                                                     const std::string& metric, double temperature, double relaxation,
                                                     bool need_x, bool need_codebook) {
  const Inputs in(x, codebook, mask, metric, temperature);
  const NoiseInputs noise(key, relaxation, in.x);
  check_like(grad_, "grad", in.x, "x");
  check_accumulated(centred_, "centred", sizes_of(in.x), in.x, "x");
  check_accumulated(normalizer_, "normalizer", in.normalizer_sizes(), in.x, "x");
  const Tensor grad = as_contiguous(grad_), centred = as_contiguous(centred_), normalizer = as_contiguous(normalizer_);
  const Tensor grad_x = in.gradient(in.x, need_x), grad_codebook = in.gradient(in.codebook, need_codebook);
  SoftQuantizeBackward args{.of = in.args,
                            .gumbel = noise.args,
                            .grad = data(grad),
                            .centred = data(centred),
                            .normalizer = data(normalizer),
                            .grad_x = data_if(need_x, grad_x),
                            .grad_codebook = data_if(need_codebook, grad_codebook),
                            .workspace = nullptr};
  const Tensor workspace = ISTHMUS_ALLOCATE(in.x, assignment, args);
  ISTHMUS_LAUNCH(in.x, assignment, soft_quantize_backward, args);
  return {grad_x, grad_codebook};
}

// ---- statistics ----------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> vq_soft_statistics(const Tensor& x, const Tensor& codebook,
                                                      const OptionalTensor& mask, const std::string& metric,
                                                      double temperature) {
  const Inputs in(x, codebook, mask, metric, temperature);
  const Tensor entropy = in.of_rows(accumulate_type(in.x)), normalizer = in.normalizer();
  const Tensor usage = empty(in.usage_sizes(), accumulate_type(in.x), in.x);
  SoftStatistics args{.of = in.args,
                      .entropy = mutable_data(entropy),
                      .usage = mutable_data(usage),
                      .normalizer = mutable_data(normalizer),
                      .workspace = nullptr};
  const Tensor workspace = ISTHMUS_ALLOCATE(in.x, assignment, args);
  ISTHMUS_LAUNCH(in.x, assignment, soft_statistics, args);
  return {entropy, usage, normalizer};
}

std::tuple<Tensor, Tensor> vq_soft_statistics_backward(const OptionalTensor& grad_entropy_,
                                                       const OptionalTensor& grad_usage_, const Tensor& entropy_,
                                                       const Tensor& normalizer_, const Tensor& x,
                                                       const Tensor& codebook, const OptionalTensor& mask,
                                                       const std::string& metric, double temperature, bool need_x,
                                                       bool need_codebook) {
  const Inputs in(x, codebook, mask, metric, temperature);
  if (grad_entropy_) check_accumulated(*grad_entropy_, "grad_entropy", leading_sizes(in.x), in.x, "x");
  if (grad_usage_) check_accumulated(*grad_usage_, "grad_usage", in.usage_sizes(), in.x, "x");
  check_accumulated(entropy_, "entropy", leading_sizes(in.x), in.x, "x");
  check_accumulated(normalizer_, "normalizer", in.normalizer_sizes(), in.x, "x");
  const OptionalTensor grad_entropy = as_contiguous(grad_entropy_), grad_usage = as_contiguous(grad_usage_);
  const Tensor entropy = as_contiguous(entropy_), normalizer = as_contiguous(normalizer_);
  const Tensor grad_x = in.gradient(in.x, need_x), grad_codebook = in.gradient(in.codebook, need_codebook);
  SoftStatisticsBackward args{.of = in.args,
                              .entropy = data(entropy),
                              .normalizer = data(normalizer),
                              .grad_entropy = data(grad_entropy),
                              .grad_usage = data(grad_usage),
                              .grad_x = data_if(need_x, grad_x),
                              .grad_codebook = data_if(need_codebook, grad_codebook),
                              .workspace = nullptr};
  const Tensor workspace = ISTHMUS_ALLOCATE(in.x, assignment, args);
  ISTHMUS_LAUNCH(in.x, assignment, soft_statistics_backward, args);
  return {grad_x, grad_codebook};
}

// ---- cross-entropy -------------------------------------------------------------------------------------------------

Tensor checked_indices(const Tensor& indices_, const Inputs& in) {
  check_tensor(indices_, "indices", ScalarType::Long, leading_sizes(in.x), in.x, "x");
  const Tensor indices = as_contiguous(indices_);
  check_codes(indices, "indices", in.args.codes);
  return indices;
}

std::tuple<Tensor, Tensor> vq_cross_entropy(const Tensor& x, const Tensor& codebook, const Tensor& indices_,
                                            const std::string& metric, double temperature) {
  const Inputs in(x, codebook, std::nullopt, metric, temperature);
  const Tensor indices = checked_indices(indices_, in);
  const Tensor loss = in.of_rows(accumulate_type(in.x)), normalizer = in.normalizer();
  CodeCrossEntropy args{.of = in.args,
                        .indices = int64_data(indices),
                        .loss = mutable_data(loss),
                        .normalizer = mutable_data(normalizer),
                        .workspace = nullptr};
  const Tensor workspace = ISTHMUS_ALLOCATE(in.x, assignment, args);
  ISTHMUS_LAUNCH(in.x, assignment, cross_entropy, args);
  return {loss, normalizer};
}

std::tuple<Tensor, Tensor> vq_cross_entropy_backward(const Tensor& grad_, const Tensor& normalizer_, const Tensor& x,
                                                     const Tensor& codebook, const Tensor& indices_,
                                                     const std::string& metric, double temperature, bool need_x,
                                                     bool need_codebook) {
  const Inputs in(x, codebook, std::nullopt, metric, temperature);
  const Tensor indices = checked_indices(indices_, in);
  check_accumulated(grad_, "grad", leading_sizes(in.x), in.x, "x");
  check_accumulated(normalizer_, "normalizer", in.normalizer_sizes(), in.x, "x");
  const Tensor grad = as_contiguous(grad_), normalizer = as_contiguous(normalizer_);
  const Tensor grad_x = in.gradient(in.x, need_x), grad_codebook = in.gradient(in.codebook, need_codebook);
  CodeCrossEntropyBackward args{.of = in.args,
                                .indices = int64_data(indices),
                                .grad = data(grad),
                                .normalizer = data(normalizer),
                                .grad_x = data_if(need_x, grad_x),
                                .grad_codebook = data_if(need_codebook, grad_codebook),
                                .workspace = nullptr};
  const Tensor workspace = ISTHMUS_ALLOCATE(in.x, assignment, args);
  ISTHMUS_LAUNCH(in.x, assignment, cross_entropy_backward, args);
  return {grad_x, grad_codebook};
}

}  // namespace

void register_assignment(StableLibrary& m) {
  m.impl("vq_sample", TORCH_BOX(&vq_sample));
  m.impl("vq_soft_quantize", TORCH_BOX(&vq_soft_quantize));
  m.impl("vq_soft_quantize_backward", TORCH_BOX(&vq_soft_quantize_backward));
  m.impl("vq_soft_statistics", TORCH_BOX(&vq_soft_statistics));
  m.impl("vq_soft_statistics_backward", TORCH_BOX(&vq_soft_statistics_backward));
  m.impl("vq_cross_entropy", TORCH_BOX(&vq_cross_entropy));
  m.impl("vq_cross_entropy_backward", TORCH_BOX(&vq_cross_entropy_backward));
}

}  // namespace isthmus
