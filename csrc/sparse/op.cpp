// Host entries of the sparse family: checks, allocation, dispatch. Schemas in csrc/library.cpp.

#include "op.h"
#include "core/pages.h"
#include "sparse/code.h"
#include "sparse/kernels.h"

namespace isthmus {
namespace {

void check_weight(const Tensor& weight, const Tensor& like, const char* like_name) {
  if (weight.dim() != 2) fail("weight has shape ", shape_of(weight), "; expected [features, columns]");
  check_matrix(weight, "weight", -1, weight.size(1), like, like_name);
}

std::tuple<Tensor, Tensor, Tensor> latent_order(const Tensor& indices, int64_t num_features,
                                                const OptionalTensor& values, const OptionalTensor& offsets) {
  if (num_features < 0) fail("num_features is ", num_features, "; expected at least 0");
  const SparseCode code(indices, offsets, num_features);
  const OptionalTensor numbers = values ? OptionalTensor(code.check_numbers(*values, "values")) : std::nullopt;
  const Order order = sort_latents(code, num_features, numbers);
  return {order.entries, order.rows, order.starts};
}

// ---- decode --------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> run_decode(const Tensor& values_, const Tensor& indices, const Tensor& weight_,
                                      const OptionalTensor& bias_, const OptionalTensor& target_,
                                      const OptionalTensor& offsets) {
  check_weight(weight_, values_, "values");
  const SparseCode code(indices, offsets, weight_.size(0));
  const Tensor values = code.check_numbers(values_, "values"), weight = as_contiguous(weight_);
  const int64_t rows = code.rows(), cols = weight.size(1);
  if (bias_) check_vector(*bias_, "bias", cols, values, "values");
  if (target_) check_matrix(*target_, "target", rows, cols, values, "values");
  const OptionalTensor bias = as_contiguous(bias_), target = as_contiguous(target_);
  const Tensor out = empty({rows, cols}, values.scalar_type(), values);
  const Tensor squared_error = empty({target ? rows : 0}, accumulate_type(values), values);
  const SparseDecode args{.dtype = dtype_of(values, "values"),
                          .code = code.layout(),
                          .cols = cols,
                          .features = weight.size(0),
                          .values = data(values),
                          .weight = data(weight),
                          .bias = data(bias),
                          .target = data(target),
                          .out = mutable_data(out),
                          .squared_error = target ? mutable_data(squared_error) : nullptr};
  ISTHMUS_LAUNCH(values, sparse, decode, args);
  return {out, squared_error};
}

// The order is for the gradient; nothing here needs it.
Tensor sparse_decode(const Tensor& values, const Tensor& indices, const Tensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& offsets, const OptionalTensor&, const OptionalTensor&,
                     const OptionalTensor&) {
  return std::get<0>(run_decode(values, indices, weight, bias, std::nullopt, offsets));
}

std::tuple<Tensor, Tensor> sparse_reconstruct(const Tensor& values, const Tensor& indices, const Tensor& weight,
                                              const OptionalTensor& bias, const Tensor& target,
                                              const OptionalTensor& offsets, const OptionalTensor&,
                                              const OptionalTensor&, const OptionalTensor&) {
  return run_decode(values, indices, weight, bias, target, offsets);
}

// ---- gradients -----------------------------------------------------------------------------------------------------

// A gradient to fill, or none. That of a weight may be the largest tensor of a training step.
Tensor gradient(bool wanted, const std::vector<int64_t>& sizes, const Tensor& like) {
  if (!wanted) return absent(like);
  const Tensor result = empty(sizes, like.scalar_type(), like);
  if (!result.is_cuda()) {
    prefer_huge_pages(mutable_data(result), result.numel() * element_size(dtype_of(result, "gradient")));
  }
  return result;
}

void* wanted_data(bool wanted, const Tensor& t) { return wanted ? mutable_data(t) : nullptr; }

std::tuple<Tensor, Tensor, Tensor> sparse_decode_backward(const Tensor& grad_, const Tensor& values_,
                                                          const Tensor& indices, const Tensor& weight_,
                                                          const OptionalTensor& offsets, const OptionalTensor& entries,
                                                          const OptionalTensor& rows, const OptionalTensor& starts,
                                                          bool need_values, bool need_weight, bool need_bias) {
  check_weight(weight_, values_, "values");
  const int64_t features = weight_.size(0), cols = weight_.size(1);
  const SparseCode code(indices, offsets, features);
  const Tensor values = code.check_numbers(values_, "values"), weight = as_contiguous(weight_);
  check_matrix(grad_, "grad", code.rows(), cols, values, "values");
  const Tensor grad = as_contiguous(grad_);
  const std::optional<Order> order =
      need_weight ? std::optional(order_of(code, features, entries, rows, starts)) : std::nullopt;
  const Tensor grad_values = gradient(need_values, sizes_of(values), values);
  const Tensor grad_weight = gradient(need_weight, sizes_of(weight), values);
  const Tensor grad_bias = gradient(need_bias, {cols}, values);
  SparseDecodeBackward args{.dtype = dtype_of(values, "values"),
                            .code = code.layout(),
                            .order = order ? order->view() : LatentOrder{},
                            .cols = cols,
                            .features = features,
                            .grad = data(grad),
                            .values = data(values),
                            .weight = data(weight),
                            .grad_values = wanted_data(need_values, grad_values),
                            .grad_weight = wanted_data(need_weight, grad_weight),
                            .grad_bias = wanted_data(need_bias, grad_bias),
                            .workspace = nullptr};
  const Tensor workspace = ISTHMUS_ALLOCATE(values, sparse, args);
  ISTHMUS_LAUNCH(values, sparse, decode_backward, args);
  return {grad_values, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor> sparse_encode_backward(const Tensor& grad_, const Tensor& x_, const Tensor& weight_,
                                                          const Tensor& indices, const OptionalTensor& offsets,
                                                          const OptionalTensor& entries, const OptionalTensor& rows,
                                                          const OptionalTensor& starts, bool need_x, bool need_weight,
                                                          bool need_bias) {
  check_weight(weight_, grad_, "grad");
  const int64_t features = weight_.size(0), cols = weight_.size(1);
  const SparseCode code(indices, offsets, features);
  const Tensor grad = code.check_numbers(grad_, "grad"), weight = as_contiguous(weight_);
  check_matrix(x_, "x", code.rows(), cols, grad, "grad");
  const Tensor x = as_contiguous(x_);
  const std::optional<Order> order =
      need_weight || need_bias ? std::optional(order_of(code, features, entries, rows, starts)) : std::nullopt;
  const Tensor grad_x = gradient(need_x, sizes_of(x), x);
  const Tensor grad_weight = gradient(need_weight, sizes_of(weight), x);
  const Tensor grad_bias = gradient(need_bias, {features}, x);
  SparseEncodeBackward args{.dtype = dtype_of(x, "x"),
                            .code = code.layout(),
                            .order = order ? order->view() : LatentOrder{},
                            .cols = cols,
                            .features = features,
                            .grad = data(grad),
                            .x = data(x),
                            .weight = data(weight),
                            .grad_x = wanted_data(need_x, grad_x),
                            .grad_weight = wanted_data(need_weight, grad_weight),
                            .grad_bias = wanted_data(need_bias, grad_bias),
                            .workspace = nullptr};
  const Tensor workspace = ISTHMUS_ALLOCATE(x, sparse, args);
  ISTHMUS_LAUNCH(x, sparse, encode_backward, args);
  return {grad_x, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_reconstruct_backward(
    const OptionalTensor& grad_reconstruction_, const Tensor& grad_error_, const Tensor& values, const Tensor& indices,
    const Tensor& weight, const Tensor& target_, const Tensor& reconstruction_, const OptionalTensor& offsets,
    const OptionalTensor& entries, const OptionalTensor& order_rows, const OptionalTensor& starts, bool need_values,
    bool need_weight, bool need_bias, bool need_target) {
  if (target_.dim() != 2) fail("target has shape ", shape_of(target_), "; expected [rows, columns]");
  const int64_t rows = target_.size(0), cols = target_.size(1);
  check_like(reconstruction_, "reconstruction", target_, "target");
  if (grad_reconstruction_) check_like(*grad_reconstruction_, "grad_reconstruction", target_, "target");
  check_accumulated(grad_error_, "grad_error", {rows}, target_, "target");
  const Tensor target = as_contiguous(target_), reconstruction = as_contiguous(reconstruction_);
  const Tensor grad_error = as_contiguous(grad_error_);
  const OptionalTensor grad_reconstruction = as_contiguous(grad_reconstruction_);
  const Tensor grad = empty({rows, cols}, target.scalar_type(), target);
  const Tensor grad_target = gradient(need_target, {rows, cols}, target);
  const ReconstructionGradient args{.dtype = dtype_of(target, "target"),
                                    .rows = rows,
                                    .cols = cols,
                                    .grad_reconstruction = data(grad_reconstruction),
                                    .grad_error = data(grad_error),
                                    .reconstruction = data(reconstruction),
                                    .target = data(target),
                                    .grad = mutable_data(grad),
                                    .grad_target = wanted_data(need_target, grad_target)};
  ISTHMUS_LAUNCH(target, sparse, reconstruction_gradient, args);
  const auto [grad_values, grad_weight, grad_bias] = sparse_decode_backward(
      grad, values, indices, weight, offsets, entries, order_rows, starts, need_values, need_weight, need_bias);
  return {grad_values, grad_weight, grad_bias, grad_target};
}

}  // namespace

void register_sparse(StableLibrary& m) {
  m.impl("latent_order", TORCH_BOX(&latent_order));
  m.impl("sparse_decode", TORCH_BOX(&sparse_decode));
  m.impl("sparse_decode_backward", TORCH_BOX(&sparse_decode_backward));
  m.impl("sparse_encode_backward", TORCH_BOX(&sparse_encode_backward));
  m.impl("sparse_reconstruct", TORCH_BOX(&sparse_reconstruct));
  m.impl("sparse_reconstruct_backward", TORCH_BOX(&sparse_reconstruct_backward));
}

}  // namespace isthmus
