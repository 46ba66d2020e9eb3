// Host entries of the topk family: checks, allocation, dispatch. Schemas in csrc/library.cpp.

#include "op.h"
#include "sparse/code.h"
#include "topk/kernels.h"

namespace isthmus {
namespace {

Activation parse_activation(const std::string& name) {
  if (name == "relu") return Activation::relu;
  if (name == "identity") return Activation::identity;
  if (name == "abs") return Activation::abs;
  fail("activation is '", name, "'; expected 'relu', 'identity' or 'abs'");
}

void check_shapes(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  if (x.dim() != 2) fail("x has shape ", shape_of(x), "; expected [rows, columns]");
  if (weight.dim() != 2) fail("weight has shape ", shape_of(weight), "; expected [features, columns]");
  check_matrix(weight, "weight", -1, x.size(1), x, "x");
  constexpr int64_t limit = int64_t(1) << 31;
  if (weight.size(0) >= limit) fail("weight has ", weight.size(0), " rows; expected fewer than 2^31 features");
  if (bias) check_vector(*bias, "bias", weight.size(0), x, "x");
}

void check_selection(int64_t k, int64_t groups, const OptionalTensor& among, int64_t features, const Tensor& x) {
  if (k < 1 || k > features) fail("k is ", k, "; expected 1 to ", features, ", the number of features");
  if (groups < 1 || features % groups != 0 || k % groups != 0) {
    fail("groups is ", groups, "; expected a divisor of ", features, ", the number of features, and of k, which is ",
         k);
  }
  if (among) check_tensor(*among, "among", ScalarType::Bool, {features}, x, "x");
}

// The order is that of the entries that have a gradient; without one, its tensors are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> topk_encode(const Tensor& x_, const Tensor& weight_,
                                                               const OptionalTensor& bias_, int64_t k,
                                                               const std::string& activation_, int64_t groups,
                                                               const OptionalTensor& among_, bool return_order) {
  check_shapes(x_, weight_, bias_);
  const int64_t rows = x_.size(0), features = weight_.size(0);
  check_selection(k, groups, among_, features, x_);
  const Tensor x = as_contiguous(x_), weight = as_contiguous(weight_);
  const OptionalTensor bias = as_contiguous(bias_), among = as_contiguous(among_);
  const Tensor values = empty({rows, k}, x.scalar_type(), x), indices = empty({rows, k}, ScalarType::Long, x);
  const Activation activation = parse_activation(activation_);
  TopkEncode args{.dtype = dtype_of(x, "x"),
                  .activation = activation,
                  .rows = rows,
                  .cols = x.size(1),
                  .features = features,
                  .k = k,
                  .groups = groups,
                  .x = data(x),
                  .weight = data(weight),
                  .bias = data(bias),
                  .among = static_cast<const bool*>(data(among)),
                  .values = mutable_data(values),
                  .indices = static_cast<int64_t*>(mutable_data(indices)),
                  .workspace = nullptr};
  [[maybe_unused]] const Tensor workspace = ISTHMUS_ALLOCATE(x, topk, args);
  ISTHMUS_LAUNCH(x, topk, encode, args);
  if (!return_order) {
    const auto none = [&] { return empty({0}, ScalarType::Long, x); };
    return {values, indices, none(), none(), none()};
  }
  const SparseCode code(indices, std::nullopt, features);
  const Order order =
      sort_latents(code, features, activation == Activation::relu ? OptionalTensor(values) : std::nullopt);
  return {values, indices, order.entries, order.rows, order.starts};
}

}  // namespace

void register_topk(StableLibrary& m) { m.impl("topk_encode", TORCH_BOX(&topk_encode)); }

}  // namespace isthmus
