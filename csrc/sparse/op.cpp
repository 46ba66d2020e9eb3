// Host entries of the sparse family: checks, allocation, dispatch. Schemas in csrc/library.cpp.

#include "op.h"
#include "core/sort.h"
#include "sparse/kernels.h"

namespace isthmus {
namespace {

Activation parse_activation(const std::string& name) {
  if (name == "relu") return Activation::relu;
  if (name == "identity") return Activation::identity;
  fail("activation is '", name, "'; expected 'relu' or 'identity'");
}

// A matrix [features, cols]; cols < 0 leaves the width free.
void check_weight(const Tensor& weight, int64_t cols, const Tensor& like, const char* like_name) {
  if (weight.dim() != 2) fail("weight has shape ", shape_of(weight), "; expected [features, columns]");
  check_matrix(weight, "weight", -1, cols < 0 ? weight.size(1) : cols, like, like_name);
  constexpr int64_t limit = int64_t(1) << 31;
  if (weight.size(0) >= limit) fail("weight has ", weight.size(0), " rows; expected fewer than 2^31 features");
}

// On a GPU the kernels check, so that the host need not wait: a wrong index stops the device with a message.
void check_indices(const Tensor& indices, const Tensor& values, const Tensor& weight) {
  check_int64(indices, "indices");
  check_device(indices, "indices", values, "values");
  if (!same_shape(indices, values)) {
    fail("indices has shape ", shape_of(indices), "; expected ", shape_of(values), ", like values");
  }
  if (indices.is_cuda()) return;
  const Tensor entries = as_contiguous(indices);
  const int64_t features = weight.size(0), wrong = find_outside(int64_data(entries), entries.numel(), features);
  if (wrong >= 0) {
    fail("indices holds ", int64_data(entries)[wrong], "; expected values in [0, ", features, "), the rows of weight");
  }
}

// The memory a CUDA kernel works in; on the CPU a kernel takes its own.
template <class Args>
Tensor workspace_for([[maybe_unused]] const Args& args, const Tensor& like) {
  int64_t bytes = 0;
#if defined(ISTHMUS_CUDA)
  if (like.is_cuda()) bytes = cuda::sparse_workspace(args);
#endif
  return empty({bytes}, ScalarType::Byte, like);
}

std::tuple<Tensor, Tensor, Tensor> topk_encode_backward(const Tensor& grad_, const Tensor& x_, const Tensor& weight_,
                                                        const Tensor& values_, const Tensor& indices_,
                                                        const std::string& activation) {
  const int64_t rows = values_.size(0), k = values_.size(1);
  check_like(grad_, "grad", values_, "values");
  check_matrix(x_, "x", rows, weight_.size(1), values_, "values");
  check_weight(weight_, x_.size(1), values_, "values");
  check_indices(indices_, values_, weight_);
  const Tensor grad = as_contiguous(grad_), x = as_contiguous(x_), weight = as_contiguous(weight_);
  const Tensor values = as_contiguous(values_), indices = as_contiguous(indices_);
  const ScalarType type = x.scalar_type();
  const Tensor grad_x = empty(sizes_of(x), type, x), grad_weight = empty(sizes_of(weight), type, x);
  const Tensor grad_bias = empty({weight.size(0)}, type, x);
  TopkEncodeBackward args{.dtype = dtype_of(x, "x"),
                          .activation = parse_activation(activation),
                          .rows = rows,
                          .cols = x.size(1),
                          .features = weight.size(0),
                          .k = k,
                          .grad = data(grad),
                          .x = data(x),
                          .weight = data(weight),
                          .values = data(values),
                          .indices = int64_data(indices),
                          .grad_x = mutable_data(grad_x),
                          .grad_weight = mutable_data(grad_weight),
                          .grad_bias = mutable_data(grad_bias),
                          .workspace = nullptr};
  const Tensor workspace = workspace_for(args, x);
  args.workspace = mutable_data(workspace);
  ISTHMUS_LAUNCH(x, sparse, encode_backward, args);
  return {grad_x, grad_weight, grad_bias};
}

Tensor sparse_decode(const Tensor& values_, const Tensor& indices_, const Tensor& weight_,
                     const OptionalTensor& bias_) {
  if (values_.dim() != 2) fail("values has shape ", shape_of(values_), "; expected [rows, k]");
  check_weight(weight_, -1, values_, "values");
  const int64_t rows = values_.size(0), cols = weight_.size(1);
  check_indices(indices_, values_, weight_);
  if (bias_) check_vector(*bias_, "bias", cols, values_, "values");
  const Tensor values = as_contiguous(values_), indices = as_contiguous(indices_), weight = as_contiguous(weight_);
  const OptionalTensor bias = as_contiguous(bias_);
  const Tensor out = empty({rows, cols}, values.scalar_type(), values);
  const SparseDecode args{.dtype = dtype_of(values, "values"),
                          .rows = rows,
                          .cols = cols,
                          .features = weight.size(0),
                          .k = values.size(1),
                          .values = data(values),
                          .indices = int64_data(indices),
                          .weight = data(weight),
                          .bias = data(bias),
                          .out = mutable_data(out)};
  ISTHMUS_LAUNCH(values, sparse, decode, args);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> sparse_decode_backward(const Tensor& grad_, const Tensor& values_,
                                                          const Tensor& indices_, const Tensor& weight_) {
  const int64_t rows = values_.size(0);
  check_weight(weight_, -1, values_, "values");
  check_matrix(grad_, "grad", rows, weight_.size(1), values_, "values");
  check_indices(indices_, values_, weight_);
  const Tensor grad = as_contiguous(grad_), weight = as_contiguous(weight_);
  const Tensor values = as_contiguous(values_), indices = as_contiguous(indices_);
  const ScalarType type = values.scalar_type();
  const Tensor grad_values = empty(sizes_of(values), type, values), grad_weight = empty(sizes_of(weight), type, values);
  const Tensor grad_bias = empty({weight.size(1)}, type, values);
  SparseDecodeBackward args{.dtype = dtype_of(values, "values"),
                            .rows = rows,
                            .cols = weight.size(1),
                            .features = weight.size(0),
                            .k = values.size(1),
                            .grad = data(grad),
                            .values = data(values),
                            .indices = int64_data(indices),
                            .weight = data(weight),
                            .grad_values = mutable_data(grad_values),
                            .grad_weight = mutable_data(grad_weight),
                            .grad_bias = mutable_data(grad_bias),
                            .workspace = nullptr};
  const Tensor workspace = workspace_for(args, values);
  args.workspace = mutable_data(workspace);
  ISTHMUS_LAUNCH(values, sparse, decode_backward, args);
  return {grad_values, grad_weight, grad_bias};
}

}  // namespace

void register_sparse(StableLibrary& m) {
  m.impl("topk_encode_backward", TORCH_BOX(&topk_encode_backward));
  m.impl("sparse_decode", TORCH_BOX(&sparse_decode));
  m.impl("sparse_decode_backward", TORCH_BOX(&sparse_decode_backward));
}

}  // namespace isthmus
