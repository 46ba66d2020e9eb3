// Host entries of the topk family: checks, allocation, dispatch. Schemas in csrc/library.cpp.

#include "op.h"
#include "topk/kernels.h"

namespace isthmus {
namespace {

Activation parse_activation(const std::string& name) {
  if (name == "relu") return Activation::relu;
  if (name == "identity") return Activation::identity;
  if (name == "abs") return Activation::abs;
  fail("activation is '", name, "'; expected 'relu', 'identity' or 'abs'");
}

// A matrix [features, cols]; cols < 0 leaves the width free.
void check_weight(const Tensor& weight, int64_t cols, const Tensor& like, const char* like_name) {
  if (weight.dim() != 2) fail("weight has shape ", shape_of(weight), "; expected [features, columns]");
  check_matrix(weight, "weight", -1, cols < 0 ? weight.size(1) : cols, like, like_name);
  constexpr int64_t limit = int64_t(1) << 31;
  if (weight.size(0) >= limit) fail("weight has ", weight.size(0), " rows; expected fewer than 2^31 features");
}

// The memory a CUDA kernel works in; on the CPU a kernel takes its own.
template <class Args>
Tensor workspace_for([[maybe_unused]] const Args& args, const Tensor& like) {
  int64_t bytes = 0;
#if defined(ISTHMUS_CUDA)
  if (like.is_cuda()) bytes = cuda::topk_workspace(args);
#endif
  return empty({bytes}, ScalarType::Byte, like);
}

std::tuple<Tensor, Tensor> topk_encode(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_, int64_t k,
                                       const std::string& activation) {
  if (x_.dim() != 2) fail("x has shape ", shape_of(x_), "; expected [rows, columns]");
  check_weight(weight_, x_.size(1), x_, "x");
  const int64_t rows = x_.size(0), features = weight_.size(0);
  if (bias_) check_vector(*bias_, "bias", features, x_, "x");
  if (k < 1 || k > features) fail("k is ", k, "; expected 1 to ", features, ", the number of features");
  const Tensor x = as_contiguous(x_), weight = as_contiguous(weight_);
  const OptionalTensor bias = as_contiguous(bias_);
  const Tensor values = empty({rows, k}, x.scalar_type(), x), indices = empty({rows, k}, ScalarType::Long, x);
  TopkEncode args{.dtype = dtype_of(x, "x"),
                  .activation = parse_activation(activation),
                  .rows = rows,
                  .cols = x.size(1),
                  .features = features,
                  .k = k,
                  .groups = 1,
                  .x = data(x),
                  .weight = data(weight),
                  .bias = data(bias),
                  .among = nullptr,
                  .values = mutable_data(values),
                  .indices = static_cast<int64_t*>(mutable_data(indices)),
                  .workspace = nullptr};
  const Tensor workspace = workspace_for(args, x);
  args.workspace = mutable_data(workspace);
  ISTHMUS_LAUNCH(x, topk, encode, args);
  return {values, indices};
}

}  // namespace

void register_topk(StableLibrary& m) { m.impl("topk_encode", TORCH_BOX(&topk_encode)); }

}  // namespace isthmus
