// Host entries of the likelihood family: checks, allocation, dispatch. Schemas in csrc/library.cpp.

#include "op.h"
#include "likelihood/kernels.h"

namespace isthmus {
namespace {

// Room for the gradient of `t`, if somebody asks for it.
Tensor gradient_like(const Tensor& t, bool need) { return need ? empty(sizes_of(t), t.scalar_type(), t) : absent(t); }
void* wanted(bool need, const Tensor& gradient) { return need ? mutable_data(gradient) : nullptr; }

// An argument beside x: of its shape and dtype; or one element, in the type of sums, that serves every element.
struct DensityArgument {
  Tensor tensor;
  bool shared;

  DensityArgument(const Tensor& t, const char* name, const Tensor& x)
      : tensor(as_contiguous(t)), shared(t.numel() == 1) {
    check_device(t, name, x, "x");
    if (!shared) {
      check_like(t, name, x, "x");
    } else if (t.scalar_type() != accumulate_type(x)) {
      fail(name, " has one element of dtype ", name_of(t.scalar_type()), "; expected ", name_of(accumulate_type(x)),
           ", the type of sums");
    }
  }

  Argument argument() const { return {data(tensor), shared}; }
};

// A reduction as the kernels see it: sums over the columns of a [rows, cols] view, and the shape of the result.
struct NllShape {
  int64_t rows, cols;
  double weight = 1;
  std::vector<int64_t> sizes;

  NllShape(const std::string& reduction, const Tensor& x) : rows(leading_size(x)), cols(last_size(x)) {
    if (reduction == "none") {
      rows *= cols;
      cols = 1;
      sizes = sizes_of(x);
    } else if (reduction == "row") {
      sizes = leading_sizes(x);
    } else if (reduction == "sum" || reduction == "mean") {
      if (reduction == "mean") weight = 1 / static_cast<double>(rows);
      cols *= rows;
      rows = 1;
    } else {
      fail("reduction is '", reduction, "'; expected 'none', 'row', 'sum' or 'mean'");
    }
  }
};

// What a GPU needs beside its inputs: `elements(rows, cols)` numbers of the accumulate type.
#if defined(ISTHMUS_CUDA)
#define ISTHMUS_WORKSPACE(x, elements, ...) \
  empty({(x).is_cuda() ? cuda::elements(__VA_ARGS__) : 0}, accumulate_type(x), x)
#else
#define ISTHMUS_WORKSPACE(x, elements, ...) absent(x)
#endif

Argument argument_x(const Tensor& x) { return {data(x), false}; }

// ---- gaussian_nll --------------------------------------------------------------------------------------------------

struct GaussianArguments {
  Tensor x;
  DensityArgument mean, scale;
  std::optional<DensityArgument> weight;

  GaussianArguments(const Tensor& x_, const Tensor& mean_, const Tensor& scale_, const OptionalTensor& weight_)
      : x(as_contiguous(x_)), mean(mean_, "mean", x_), scale(scale_, "scale", x_) {
    if (weight_) weight.emplace(*weight_, "weight", x_);
  }

  Argument weights() const { return weight ? weight->argument() : Argument{nullptr, true}; }
};

Tensor gaussian_nll(const Tensor& x, const Tensor& mean, const Tensor& scale, const OptionalTensor& weight,
                    const std::string& scale_type, double beta, const std::string& reduction) {
  const GaussianArguments in(x, mean, scale, weight);
  const NllShape shape(reduction, x);
  const Tensor nll = empty(shape.sizes, accumulate_type(x), x);
  const Tensor workspace = ISTHMUS_WORKSPACE(x, nll_workspace, shape.rows, shape.cols);
  const GaussianNll<Nll> args{{dtype_of(x, "x"),
                               shape.rows,
                               shape.cols,
                               shape.weight,
                               {argument_x(in.x), in.mean.argument(), in.scale.argument(), in.weights()},
                               mutable_data(nll),
                               mutable_data(workspace)},
                              parse_scale_type(scale_type),
                              beta};
  ISTHMUS_LAUNCH(x, likelihood, gaussian_nll, args);
  return nll;
}

std::tuple<Tensor, Tensor, Tensor> gaussian_nll_backward(const Tensor& grad_, const Tensor& x, const Tensor& mean,
                                                         const Tensor& scale, const OptionalTensor& weight,
                                                         const std::string& scale_type, double beta,
                                                         const std::string& reduction, bool need_x, bool need_mean,
                                                         bool need_scale) {
  const GaussianArguments in(x, mean, scale, weight);
  const NllShape shape(reduction, x);
  check_accumulated(grad_, "grad", shape.sizes, x, "x");
  const Tensor grad = as_contiguous(grad_);
  const Tensor grad_x = gradient_like(in.x, need_x), grad_mean = gradient_like(in.mean.tensor, need_mean),
               grad_scale = gradient_like(in.scale.tensor, need_scale);
  const Tensor workspace = ISTHMUS_WORKSPACE(x, nll_backward_workspace, shape.rows, shape.cols);
  const GaussianNll<NllBackward> args{
      {dtype_of(x, "x"),
       shape.rows,
       shape.cols,
       shape.weight,
       data(grad),
       {argument_x(in.x), in.mean.argument(), in.scale.argument(), in.weights()},
       {wanted(need_x, grad_x), wanted(need_mean, grad_mean), wanted(need_scale, grad_scale)},
       mutable_data(workspace)},
      parse_scale_type(scale_type),
      beta};
  ISTHMUS_LAUNCH(x, likelihood, gaussian_nll_backward, args);
  return {grad_x, grad_mean, grad_scale};
}

// ---- discretized_gaussian_nll --------------------------------------------------------------------------------------

struct Bins {
  double width, low, high;

  Bins(double width_, double low_, double high_) : width(width_), low(low_), high(high_) {
    if (!(width > 0)) fail("bin_width is ", width, "; expected a positive number");
    if (!(low < high)) fail("low is ", low, " and high is ", high, "; expected low < high");
  }
};

Tensor discretized_gaussian_nll(const Tensor& x, const Tensor& mean, const Tensor& scale, double bin_width, double low,
                                double high, const std::string& scale_type, const std::string& reduction) {
  const GaussianArguments in(x, mean, scale, std::nullopt);
  const Bins bins(bin_width, low, high);
  const NllShape shape(reduction, x);
  const Tensor nll = empty(shape.sizes, accumulate_type(x), x);
  const Tensor workspace = ISTHMUS_WORKSPACE(x, nll_workspace, shape.rows, shape.cols);
  const DiscretizedGaussianNll<Nll> args{{dtype_of(x, "x"),
                                          shape.rows,
                                          shape.cols,
                                          shape.weight,
                                          {argument_x(in.x), in.mean.argument(), in.scale.argument()},
                                          mutable_data(nll),
                                          mutable_data(workspace)},
                                         parse_scale_type(scale_type),
                                         bins.width,
                                         bins.low,
                                         bins.high};
  ISTHMUS_LAUNCH(x, likelihood, discretized_gaussian_nll, args);
  return nll;
}

std::tuple<Tensor, Tensor, Tensor> discretized_gaussian_nll_backward(const Tensor& grad_, const Tensor& x,
                                                                     const Tensor& mean, const Tensor& scale,
                                                                     double bin_width, double low, double high,
                                                                     const std::string& scale_type,
                                                                     const std::string& reduction, bool need_x,
                                                                     bool need_mean, bool need_scale) {
  const GaussianArguments in(x, mean, scale, std::nullopt);
  const Bins bins(bin_width, low, high);
  const NllShape shape(reduction, x);
  check_accumulated(grad_, "grad", shape.sizes, x, "x");
  const Tensor grad = as_contiguous(grad_);
  const Tensor grad_x = gradient_like(in.x, need_x), grad_mean = gradient_like(in.mean.tensor, need_mean),
               grad_scale = gradient_like(in.scale.tensor, need_scale);
  const Tensor workspace = ISTHMUS_WORKSPACE(x, nll_backward_workspace, shape.rows, shape.cols);
  const DiscretizedGaussianNll<NllBackward> args{
      {dtype_of(x, "x"),
       shape.rows,
       shape.cols,
       shape.weight,
       data(grad),
       {argument_x(in.x), in.mean.argument(), in.scale.argument()},
       {wanted(need_x, grad_x), wanted(need_mean, grad_mean), wanted(need_scale, grad_scale)},
       mutable_data(workspace)},
      parse_scale_type(scale_type),
      bins.width,
      bins.low,
      bins.high};
  ISTHMUS_LAUNCH(x, likelihood, discretized_gaussian_nll_backward, args);
  return {grad_x, grad_mean, grad_scale};
}

// ---- generalized_gaussian_nll --------------------------------------------------------------------------------------

Tensor generalized_gaussian_nll(const Tensor& x_, const Tensor& mean_, const Tensor& scale_, const Tensor& shape_,
                                const std::string& reduction) {
  const Tensor x = as_contiguous(x_);
  const DensityArgument mean(mean_, "mean", x), scale(scale_, "scale", x), shape(shape_, "shape", x);
  const NllShape sums(reduction, x);
  const Tensor nll = empty(sums.sizes, accumulate_type(x), x);
  const Tensor workspace = ISTHMUS_WORKSPACE(x, nll_workspace, sums.rows, sums.cols);
  const GeneralizedGaussianNll<Nll> args{{dtype_of(x, "x"),
                                          sums.rows,
                                          sums.cols,
                                          sums.weight,
                                          {argument_x(x), mean.argument(), scale.argument(), shape.argument()},
                                          mutable_data(nll),
                                          mutable_data(workspace)}};
  ISTHMUS_LAUNCH(x, likelihood, generalized_gaussian_nll, args);
  return nll;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> generalized_gaussian_nll_backward(
    const Tensor& grad_, const Tensor& x_, const Tensor& mean_, const Tensor& scale_, const Tensor& shape_,
    const std::string& reduction, bool need_x, bool need_mean, bool need_scale, bool need_shape) {
  const Tensor x = as_contiguous(x_);
  const DensityArgument mean(mean_, "mean", x), scale(scale_, "scale", x), shape(shape_, "shape", x);
  const NllShape sums(reduction, x);
  check_accumulated(grad_, "grad", sums.sizes, x, "x");
  const Tensor grad = as_contiguous(grad_);
  const Tensor grad_x = gradient_like(x, need_x), grad_mean = gradient_like(mean.tensor, need_mean),
               grad_scale = gradient_like(scale.tensor, need_scale),
               grad_shape = gradient_like(shape.tensor, need_shape);
  const Tensor workspace = ISTHMUS_WORKSPACE(x, nll_backward_workspace, sums.rows, sums.cols);
  const GeneralizedGaussianNll<NllBackward> args{{dtype_of(x, "x"),
                                                  sums.rows,
                                                  sums.cols,
                                                  sums.weight,
                                                  data(grad),
                                                  {argument_x(x), mean.argument(), scale.argument(), shape.argument()},
                                                  {wanted(need_x, grad_x), wanted(need_mean, grad_mean),
                                                   wanted(need_scale, grad_scale), wanted(need_shape, grad_shape)},
                                                  mutable_data(workspace)}};
  ISTHMUS_LAUNCH(x, likelihood, generalized_gaussian_nll_backward, args);
  return {grad_x, grad_mean, grad_scale, grad_shape};
}

// ---- discretized_logistic_mixture_nll ------------------------------------------------------------------------------

// Checks the arguments and describes the problem, but for its outputs.
LogisticMixture logistic_mixture(const Tensor& x, const Tensor& parameters, int64_t num_mixtures, int64_t bins,
                                 double min_log_scale, const std::string& reduction) {
  if (x.dim() != 4 || (x.size(1) != 1 && x.size(1) != 3)) {
    fail("x has shape ", shape_of(x), "; expected [B, C, H, W] with C = 1 or 3");
  }
  if (num_mixtures < 1) fail("num_mixtures is ", num_mixtures, "; expected at least 1");
  if (bins < 2) fail("bins is ", bins, "; expected at least 2");
  check_device(parameters, "parameters", x, "x");
  check_dtype(parameters, "parameters", x, "x");
  const int64_t planes = num_mixtures * mixture_planes(x.size(1));
  const std::vector<int64_t> expected{x.size(0), planes, x.size(2), x.size(3)};
  if (sizes_of(parameters) != expected) {
    fail("parameters has shape ", shape_of(parameters), "; expected [", x.size(0), ", ", planes, ", ", x.size(2), ", ",
         x.size(3), "]: ", num_mixtures, " mixtures of ", x.size(1), " channels");
  }
  LogisticMixture args{};
  args.dtype = dtype_of(x, "x");
  args.images = x.size(0);
  args.channels = x.size(1);
  args.pixels = x.size(2) * x.size(3);
  args.mixtures = num_mixtures;
  args.bins = bins;
  args.min_log_scale = min_log_scale;
  args.weight = reduction == "mean" ? 1 / static_cast<double>(args.images) : 1;
  args.sum_pixels = reduction != "none";
  args.results = reduction == "none" ? args.images * args.pixels : reduction == "image" ? args.images : 1;
  return args;
}

std::vector<int64_t> mixture_sizes(const Tensor& x, const std::string& reduction) {
  if (reduction == "none") return {x.size(0), x.size(2), x.size(3)};
  if (reduction == "image") return {x.size(0)};
  if (reduction == "sum" || reduction == "mean") return {};
  fail("reduction is '", reduction, "'; expected 'none', 'image', 'sum' or 'mean'");
}

Tensor discretized_logistic_mixture_nll(const Tensor& x_, const Tensor& parameters_, int64_t num_mixtures, int64_t bins,
                                        double min_log_scale, const std::string& reduction) {
  LogisticMixture args = logistic_mixture(x_, parameters_, num_mixtures, bins, min_log_scale, reduction);
  const Tensor x = as_contiguous(x_), parameters = as_contiguous(parameters_);
  const Tensor nll = empty(mixture_sizes(x, reduction), accumulate_type(x), x);
  const Tensor workspace = ISTHMUS_WORKSPACE(x, logistic_mixture_workspace, args.images, args.pixels);
  args.x = data(x);
  args.parameters = data(parameters);
  args.nll = mutable_data(nll);
  args.workspace = mutable_data(workspace);
  ISTHMUS_LAUNCH(x, likelihood, discretized_logistic_mixture_nll, args);
  return nll;
}

std::tuple<Tensor, Tensor> discretized_logistic_mixture_nll_backward(const Tensor& grad_, const Tensor& x_,
                                                                     const Tensor& parameters_, int64_t num_mixtures,
                                                                     int64_t bins, double min_log_scale,
                                                                     const std::string& reduction, bool need_x,
                                                                     bool need_parameters) {
  LogisticMixtureBackward args = {};
  static_cast<LogisticMixture&>(args) = logistic_mixture(x_, parameters_, num_mixtures, bins, min_log_scale, reduction);
  check_accumulated(grad_, "grad", mixture_sizes(x_, reduction), x_, "x");
  const Tensor x = as_contiguous(x_), parameters = as_contiguous(parameters_), grad = as_contiguous(grad_);
  const Tensor grad_x = gradient_like(x, need_x), grad_parameters = gradient_like(parameters, need_parameters);
  args.x = data(x);
  args.parameters = data(parameters);
  args.grad = data(grad);
  args.grad_x = wanted(need_x, grad_x);
  args.grad_parameters = wanted(need_parameters, grad_parameters);
  ISTHMUS_LAUNCH(x, likelihood, discretized_logistic_mixture_nll_backward, args);
  return {grad_x, grad_parameters};
}

}  // namespace

void register_likelihood(StableLibrary& m) {
  m.impl("gaussian_nll", TORCH_BOX(&gaussian_nll));
  m.impl("gaussian_nll_backward", TORCH_BOX(&gaussian_nll_backward));
  m.impl("discretized_gaussian_nll", TORCH_BOX(&discretized_gaussian_nll));
  m.impl("discretized_gaussian_nll_backward", TORCH_BOX(&discretized_gaussian_nll_backward));
  m.impl("generalized_gaussian_nll", TORCH_BOX(&generalized_gaussian_nll));
  m.impl("generalized_gaussian_nll_backward", TORCH_BOX(&generalized_gaussian_nll_backward));
  m.impl("discretized_logistic_mixture_nll", TORCH_BOX(&discretized_logistic_mixture_nll));
  m.impl("discretized_logistic_mixture_nll_backward", TORCH_BOX(&discretized_logistic_mixture_nll_backward));
}

}  // namespace isthmus
