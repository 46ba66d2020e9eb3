// Host entries of the likelihood family: checks, allocation, dispatch. Schemas in csrc/library.cpp.

#include "op.h"
#include "likelihood/kernels.h"

namespace isthmus {
namespace {

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
  Tensor gradient(bool wanted) const {
    return wanted ? empty(sizes_of(tensor), tensor.scalar_type(), tensor) : absent(tensor);
  }
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

void check_grad(const Tensor& grad, const std::vector<int64_t>& sizes, const Tensor& x) {
  if (grad.scalar_type() != accumulate_type(x) || sizes_of(grad) != sizes) {
    fail("grad has dtype ", name_of(grad.scalar_type()), " and shape ", shape_of(grad),
         "; expected those of the likelihood it belongs to");
  }
}

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
  check_grad(grad_, shape.sizes, x);
  const Tensor grad = as_contiguous(grad_);
  const Tensor grad_x = need_x ? empty(sizes_of(x), x.scalar_type(), x) : absent(x);
  const Tensor grad_mean = in.mean.gradient(need_mean), grad_scale = in.scale.gradient(need_scale);
  const Tensor workspace = ISTHMUS_WORKSPACE(x, nll_backward_workspace, shape.rows, shape.cols);
  const auto wanted = [](bool need, const Tensor& t) { return need ? mutable_data(t) : nullptr; };
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

}  // namespace

void register_likelihood(StableLibrary& m) {
  m.impl("gaussian_nll", TORCH_BOX(&gaussian_nll));
  m.impl("gaussian_nll_backward", TORCH_BOX(&gaussian_nll_backward));
}

}  // namespace isthmus
