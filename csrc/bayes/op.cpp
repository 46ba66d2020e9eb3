// Host entries of the bayes family: checks, allocation, dispatch. Schemas in csrc/library.cpp.

#include "op.h"
#include "bayes/kernels.h"

namespace isthmus {
namespace {

Estimator parse_estimator(const std::string& name) {
  if (name == "weight") return Estimator::weight;
  if (name == "local") return Estimator::local;
  fail("estimator is '", name, "'; expected 'weight' or 'local'");
}

// What both directions check: x [*, inputs], weights [features, inputs], bias_scale [features].
struct Layer {
  Tensor x, weight_mean, weight_scale, key;
  OptionalTensor bias_scale;
  int64_t rows, inputs, features;

  Layer(const Tensor& x_, const Tensor& weight_mean_, const Tensor& weight_scale_, const OptionalTensor& bias_scale_,
        const Tensor& key_)
      : x(as_contiguous(x_)),
        weight_mean(as_contiguous(weight_mean_)),
        weight_scale(as_contiguous(weight_scale_)),
        key(as_contiguous(key_)),
        bias_scale(as_contiguous(bias_scale_)) {
    check_key(key);
    check_device(key, "key", x, "x");
    if (x.dim() == 0) fail("x has shape []; expected [..., ", last_size(weight_mean), "], like weight_mean");
    rows = leading_size(x);
    inputs = last_size(x);
    check_matrix(weight_mean, "weight_mean", -1, inputs, x, "x");
    check_like(weight_scale, "weight_scale", weight_mean, "weight_mean");
    features = weight_mean.size(0);
    if (bias_scale) check_vector(*bias_scale, "bias_scale", features, x, "x");
  }

  std::vector<int64_t> out_sizes() const {
    std::vector<int64_t> sizes = leading_sizes(x);
    sizes.push_back(features);
    return sizes;
  }
};

Tensor bayes_linear(const Tensor& x, const Tensor& weight_mean, const Tensor& weight_scale,
                    const OptionalTensor& bias_mean_, const OptionalTensor& bias_scale, const Tensor& key,
                    const std::string& scale_type, const std::string& estimator) {
  const Layer layer(x, weight_mean, weight_scale, bias_scale, key);
  const OptionalTensor bias_mean = as_contiguous(bias_mean_);
  if (bias_mean) check_vector(*bias_mean, "bias_mean", layer.features, x, "x");
  if (bias_scale && !bias_mean) fail("bias_mean is missing; bias_scale, which was given, is the spread around it");
  const Tensor out = empty(layer.out_sizes(), x.scalar_type(), x);
  const BayesLinear args{dtype_of(x, "x"),
                         parse_scale_type(scale_type),
                         parse_estimator(estimator),
                         layer.rows,
                         layer.inputs,
                         layer.features,
                         int64_data(layer.key),
                         data(layer.x),
                         data(layer.weight_mean),
                         data(layer.weight_scale),
                         data(bias_mean),
                         data(layer.bias_scale),
                         mutable_data(out)};
  ISTHMUS_LAUNCH(x, bayes, linear, args);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bayes_linear_backward(
    const Tensor& grad_, const Tensor& x, const Tensor& weight_mean, const Tensor& weight_scale,
    const OptionalTensor& bias_scale, const Tensor& key, const std::string& scale_type,
    const std::string& estimator_name) {
  const Layer layer(x, weight_mean, weight_scale, bias_scale, key);
  const Estimator estimator = parse_estimator(estimator_name);
  const Tensor grad = as_contiguous(grad_);
  check_dtype(grad, "grad", x, "x");
  if (sizes_of(grad) != layer.out_sizes()) fail("grad has shape ", shape_of(grad), "; expected that of the output");
  const auto gradient = [&](const std::vector<int64_t>& sizes) { return empty(sizes, x.scalar_type(), x); };
  const Tensor grad_x = gradient(sizes_of(x));
  const Tensor grad_weight_mean = gradient(sizes_of(weight_mean)), grad_weight_scale = gradient(sizes_of(weight_mean));
  const Tensor grad_bias_mean = gradient({layer.features});
  const Tensor grad_bias_scale = layer.bias_scale ? gradient({layer.features}) : absent(x);
  const Tensor workspace = empty({estimator == Estimator::local ? grad.numel() : 0}, accumulate_type(x), x);
  const BayesLinearBackward args{dtype_of(x, "x"),
                                 parse_scale_type(scale_type),
                                 estimator,
                                 layer.rows,
                                 layer.inputs,
                                 layer.features,
                                 int64_data(layer.key),
                                 data(grad),
                                 data(layer.x),
                                 data(layer.weight_mean),
                                 data(layer.weight_scale),
                                 data(layer.bias_scale),
                                 mutable_data(grad_x),
                                 mutable_data(grad_weight_mean),
                                 mutable_data(grad_weight_scale),
                                 mutable_data(grad_bias_mean),
                                 mutable_data(grad_bias_scale),
                                 mutable_data(workspace)};
  ISTHMUS_LAUNCH(x, bayes, linear_backward, args);
  return {grad_x, grad_weight_mean, grad_weight_scale, grad_bias_mean, grad_bias_scale};
}

}  // namespace

void register_bayes(StableLibrary& m) {
  m.impl("bayes_linear", TORCH_BOX(&bayes_linear));
  m.impl("bayes_linear_backward", TORCH_BOX(&bayes_linear_backward));
}

}  // namespace isthmus
