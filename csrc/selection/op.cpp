// Host entries of the selection family: checks, allocation, dispatch. Schemas in csrc/library.cpp.

#include "op.h"
#include "selection/kernels.h"
#include "sparse/code.h"

namespace isthmus {
namespace {

constexpr int64_t feature_limit = int64_t(1) << 31, row_limit = int64_t(1) << 32;

// x, weight and bias as the kernels read them.
struct Encoder {
  Tensor x, weight;
  OptionalTensor bias;

  Encoder(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_) {
    if (x_.dim() != 2) fail("x has shape ", shape_of(x_), "; expected [rows, columns]");
    if (x_.size(0) >= row_limit) fail("x has ", x_.size(0), " rows; expected fewer than 2^32");
    if (weight_.dim() != 2) fail("weight has shape ", shape_of(weight_), "; expected [features, columns]");
    check_matrix(weight_, "weight", -1, x_.size(1), x_, "x");
    const int64_t features = weight_.size(0);
    if (features >= feature_limit) fail("weight has ", features, " rows; expected fewer than 2^31 features");
    if (bias_) check_vector(*bias_, "bias", features, x_, "x");
    x = as_contiguous(x_);
    weight = as_contiguous(weight_);
    bias = as_contiguous(bias_);
  }

  int64_t rows() const { return x.size(0); }
  int64_t features() const { return weight.size(0); }
};

// The entries of a ragged code sorted by latent, or empty tensors.
Order order_if(bool wanted, const Tensor& indices, const Tensor& offsets, int64_t features,
               const OptionalTensor& values) {
  const auto none = [&] { return empty({0}, ScalarType::Long, indices); };
  if (!wanted) return {none(), none(), none()};
  return sort_latents(SparseCode(indices, offsets, features), features, values);
}

// ---- threshold_encode ----------------------------------------------------------------------------------------------

// What a kernel finds, as tensors.
struct Found {
  const Tensor& like;
  Tensor values, indices;

  static Entries allocate(void* context, int64_t count) {
    Found& found = *static_cast<Found*>(context);
    found.values = empty({count}, found.like.scalar_type(), found.like);
    found.indices = empty({count}, ScalarType::Long, found.like);
    return {mutable_data(found.values), static_cast<int64_t*>(mutable_data(found.indices))};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> threshold_encode(const Tensor& x, const Tensor& weight,
                                                                            const OptionalTensor& bias,
                                                                            const Tensor& threshold,
                                                                            bool return_order) {
  const Encoder encoder(x, weight, bias);
  const int64_t features = encoder.features();
  check_device(threshold, "threshold", x, "x");
  if (threshold.scalar_type() != ScalarType::Double) {
    fail("threshold has dtype ", name_of(threshold.scalar_type()), "; expected Double");
  }
  if (threshold.dim() > 1 || (threshold.dim() == 1 && threshold.size(0) != features)) {
    fail("threshold has shape ", shape_of(threshold), "; expected [", features, "] or []");
  }
  const Tensor thresholds = as_contiguous(threshold);
  const Tensor offsets = empty({encoder.rows() + 1}, ScalarType::Long, x);
  Found found{x, {}, {}};
  ThresholdEncode args{.dtype = dtype_of(x, "x"),
                       .rows = encoder.rows(),
                       .cols = x.size(1),
                       .features = features,
                       .x = data(encoder.x),
                       .weight = data(encoder.weight),
                       .bias = data(encoder.bias),
                       .thresholds = static_cast<const double*>(data(thresholds)),
                       .one_threshold = threshold.dim() == 0,
                       .offsets = static_cast<int64_t*>(mutable_data(offsets)),
                       .allocate = Found::allocate,
                       .context = &found,
                       .workspace = nullptr};
  const Tensor workspace = ISTHMUS_ALLOCATE(x, selection, args);
  ISTHMUS_LAUNCH(x, selection, threshold_encode, args);
  const Order order = order_if(return_order, found.indices, offsets, features, std::nullopt);
  return {found.values, found.indices, offsets, order.entries, order.rows, order.starts};
}

// ---- batch_topk_encode ---------------------------------------------------------------------------------------------

Activation parse_activation(const std::string& name) {
  if (name == "relu") return Activation::relu;
  if (name == "identity") return Activation::identity;
  fail("activation is '", name, "'; expected 'relu' or 'identity'");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> batch_topk_encode(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t entries, const std::string& activation,
    bool return_order) {
  const Encoder encoder(x, weight, bias);
  const int64_t rows = encoder.rows(), features = encoder.features();
  if (entries < 0 || (rows == 0 ? entries > 0 : (entries + rows - 1) / rows > features)) {
    fail("k asks for ", entries, " entries of ", rows, " rows; expected 0 to ", features,
         " for each, the number of features");
  }
  const Tensor values = empty({entries}, x.scalar_type(), x), indices = empty({entries}, ScalarType::Long, x);
  const Tensor offsets = empty({rows + 1}, ScalarType::Long, x), threshold = empty({}, accumulate_type(x), x);
  BatchTopkEncode args{.dtype = dtype_of(x, "x"),
                       .activation = parse_activation(activation),
                       .rows = rows,
                       .cols = x.size(1),
                       .features = features,
                       .entries = entries,
                       .x = data(encoder.x),
                       .weight = data(encoder.weight),
                       .bias = data(encoder.bias),
                       .values = mutable_data(values),
                       .indices = static_cast<int64_t*>(mutable_data(indices)),
                       .offsets = static_cast<int64_t*>(mutable_data(offsets)),
                       .threshold = mutable_data(threshold),
                       .workspace = nullptr};
  const Tensor workspace = ISTHMUS_ALLOCATE(x, selection, args);
  ISTHMUS_LAUNCH(x, selection, batch_topk_encode, args);
  const OptionalTensor numbers = args.activation == Activation::relu ? OptionalTensor(values) : std::nullopt;
  const Order order = order_if(return_order, indices, offsets, features, numbers);
  return {values, indices, offsets, threshold, order.entries, order.rows, order.starts};
}

}  // namespace

void register_selection(StableLibrary& m) {
  m.impl("threshold_encode", TORCH_BOX(&threshold_encode));
  m.impl("batch_topk_encode", TORCH_BOX(&batch_topk_encode));
}

}  // namespace isthmus
