// Host entries of the codebook family: checks, allocation, dispatch. Schemas in csrc/library.cpp.

#include "op.h"
#include "codebook/kernels.h"

namespace isthmus {
namespace {

constexpr int64_t max_codes = INT32_MAX;

// ---- arguments -----------------------------------------------------------------------------------------------------

CodeGradient parse_gradient(const std::string& name) {
  if (name == "straight_through") return CodeGradient::straight_through;
  if (name == "rotation") return CodeGradient::rotation;
  if (name == "codebook") return CodeGradient::codebook;
  fail("gradient is '", name, "'; expected one of 'straight_through', 'rotation', 'codebook'");
}

void check_vectors(const Tensor& x) {
  if (x.dim() == 0) fail("x has shape []; expected [..., D]");
}

// A codebook [K, D], or [H, K, D] with x [H, ..., D].
void check_codebook(const Tensor& codebook, const Tensor& x) {
  check_vectors(x);
  check_device(codebook, "codebook", x, "x");
  check_dtype(codebook, "codebook", x, "x");
  const int64_t dims = codebook.dim(), dim = last_size(x);
  if ((dims != 2 && dims != 3) || last_size(codebook) != dim) {
    fail("codebook has shape ", shape_of(codebook), "; expected [K, ", dim, "] or [H, K, ", dim, "], as x has shape ",
         shape_of(x));
  }
  const int64_t codes = codebook.size(dims - 2);
  if (codes < 1 || codes > max_codes) {
    fail("codebook has shape ", shape_of(codebook), ", K = ", codes, "; expected 1 <= K <= ", max_codes);
  }
  if (dims == 3 && (x.dim() < 2 || x.size(0) != codebook.size(0))) {
    fail("x has shape ", shape_of(x), "; expected [", codebook.size(0), ", ..., ", dim, "], as codebook has shape ",
         shape_of(codebook), ", a codebook for each head");
  }
}

void check_leading(const Tensor& t, const char* argument, const Tensor& x) {
  check_device(t, argument, x, "x");
  if (sizes_of(t) != leading_sizes(x)) {
    fail(argument, " has shape ", shape_of(t), "; expected the leading dimensions of x, which has shape ", shape_of(x));
  }
}

// One index for each row of x.
void check_indices(const Tensor& indices, const Tensor& x, int64_t codes) {
  check_leading(indices, "indices", x);
  check_codes(indices, "indices", codes);
}

OptionalTensor checked_mask(const OptionalTensor& mask, const Tensor& x) {
  if (!mask.has_value()) return mask;
  if (mask->scalar_type() != ScalarType::Bool) {
    fail("mask has dtype ", name_of(mask->scalar_type()), "; expected bool");
  }
  check_leading(*mask, "mask", x);
  return as_contiguous(mask);
}

// ---- search --------------------------------------------------------------------------------------------------------

// Where the dimensions [first, last) of t can be walked with one stride: that stride, else -1.
int64_t common_stride(const Tensor& t, int64_t first, int64_t last) {
  int64_t stride = -1, extent = 0;
  for (int64_t d = last - 1; d >= first; --d) {
    if (t.size(d) == 1) continue;
    if (stride < 0) {
      stride = t.stride(d);
    } else if (t.stride(d) != extent) {
      return -1;
    }
    extent = t.stride(d) * t.size(d);
  }
  return stride < 0 ? last_size(t) : stride;
}

// x is read where it is if its rows have one stride, as in x.movedim(-2, 0) of a contiguous [N, H, D]; else copied.
struct SearchInputs {
  Tensor x, codebook;
  CodeSearch args;

  SearchInputs(const Tensor& x_, const Tensor& codebook_) : x(x_), codebook(as_contiguous(codebook_)) {
    check_codebook(codebook_, x_);
    const bool has_heads = codebook.dim() == 3;
    const int64_t last = x.dim() - 1, first = has_heads ? 1 : 0;
    const bool neighbours = x.size(last) <= 1 || x.stride(last) == 1;
    if (!neighbours || common_stride(x, first, last) < 0) x = as_contiguous(x);
    const int64_t heads = has_heads ? codebook.size(0) : 1;
    args = {.dtype = dtype_of(x, "x"),
            .metric = Metric::euclidean,
            .heads = heads,
            .rows = heads == 0 ? 0 : leading_size(x) / heads,
            .codes = codebook.size(codebook.dim() - 2),
            .dim = last_size(x),
            .best = 1,
            .x = data(x),
            .head_stride = has_heads ? x.stride(0) : 0,
            .row_stride = common_stride(x, first, last),
            .codebook = data(codebook),
            .mask = nullptr,
            .indices = nullptr,
            .quantized = nullptr,
            .squared_error = nullptr,
            .workspace = nullptr};
  }
};

Tensor vq_assign(const Tensor& x, const Tensor& codebook, const OptionalTensor& mask_, const std::string& metric,
                 int64_t topk) {
  SearchInputs inputs(x, codebook);
  const OptionalTensor mask = checked_mask(mask_, x);
  if (topk < 1 || topk > inputs.args.codes) {
    fail("topk is ", topk, "; expected 1 to ", inputs.args.codes, ", the number of codes");
  }
  std::vector<int64_t> shape = leading_sizes(x);
  if (topk > 1) shape.push_back(topk);
  const Tensor indices = empty(shape, ScalarType::Long, x);
  CodeSearch& args = inputs.args;
  args.metric = parse_metric(metric);
  args.best = topk;
  args.mask = static_cast<const bool*>(data(mask));
  args.indices = static_cast<int64_t*>(mutable_data(indices));
  const Tensor workspace = ISTHMUS_ALLOCATE(x, codebook, args);
  ISTHMUS_LAUNCH(x, codebook, search, args);
  return indices;
}

std::tuple<Tensor, Tensor> vq_match(const Tensor& x_, const Tensor& codebook_, const std::string& metric) {
  check_codebook(codebook_, x_);
  const int64_t dims = codebook_.dim();
  if (x_.dim() != dims) {
    fail("x has shape ", shape_of(x_), "; expected ", dims, " dimensions, as codebook has shape ", shape_of(codebook_));
  }
  const int64_t rows = x_.size(dims - 2);
  if (rows < 1 || rows > max_codes) {
    fail("x has shape ", shape_of(x_), ", N = ", rows, "; expected 1 <= N <= ", max_codes);
  }
  const Tensor x = as_contiguous(x_), codebook = as_contiguous(codebook_);
  const Tensor nearest_code = empty(leading_sizes(x), ScalarType::Long, x);
  const Tensor nearest_row = empty(leading_sizes(codebook), ScalarType::Long, x);
  CodeMatch args{.dtype = dtype_of(x, "x"),
                 .metric = parse_metric(metric),
                 .heads = dims == 3 ? codebook.size(0) : 1,
                 .rows = rows,
                 .codes = codebook.size(dims - 2),
                 .dim = last_size(x),
                 .x = data(x),
                 .codebook = data(codebook),
                 .nearest_code = static_cast<int64_t*>(mutable_data(nearest_code)),
                 .nearest_row = static_cast<int64_t*>(mutable_data(nearest_row)),
                 .workspace = nullptr};
  const Tensor workspace = ISTHMUS_ALLOCATE(x, codebook, args);
  ISTHMUS_LAUNCH(x, codebook, match, args);
  return {nearest_code, nearest_row};
}

// The kind of gradient and its commitment weight matter to the gradient alone.
std::tuple<Tensor, Tensor, Tensor> vq_quantize(const Tensor& x, const Tensor& codebook, const OptionalTensor& mask_,
                                               const std::string& metric, const std::string& gradient, double) {
  SearchInputs inputs(x, codebook);
  const OptionalTensor mask = checked_mask(mask_, x);
  parse_gradient(gradient);
  const Tensor quantized = empty(sizes_of(x), x.scalar_type(), x);
  const Tensor indices = empty(leading_sizes(x), ScalarType::Long, x);
  const Tensor squared_error = empty(leading_sizes(x), accumulate_type(x), x);
  CodeSearch& args = inputs.args;
  args.metric = parse_metric(metric);
  args.mask = static_cast<const bool*>(data(mask));
  args.indices = static_cast<int64_t*>(mutable_data(indices));
  args.quantized = mutable_data(quantized);
  args.squared_error = mutable_data(squared_error);
  const Tensor workspace = ISTHMUS_ALLOCATE(x, codebook, args);
  ISTHMUS_LAUNCH(x, codebook, search, args);
  return {quantized, indices, squared_error};
}

std::tuple<Tensor, Tensor> vq_gather(const Tensor& x, const Tensor& codebook, const Tensor& indices_,
                                     const std::string& gradient, double) {
  SearchInputs inputs(x, codebook);
  const Tensor indices = as_contiguous(indices_);
  CodeSearch& args = inputs.args;
  check_indices(indices, x, args.codes);
  parse_gradient(gradient);
  const Tensor quantized = empty(sizes_of(x), x.scalar_type(), x);
  const Tensor squared_error = empty(leading_sizes(x), accumulate_type(x), x);
  args.indices = const_cast<int64_t*>(int64_data(indices));  // only read: they are given
  args.quantized = mutable_data(quantized);
  args.squared_error = mutable_data(squared_error);
  ISTHMUS_LAUNCH(x, codebook, gather, args);
  return {quantized, squared_error};
}

// ---- backward ------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> vq_quantize_backward(const Tensor& grad_quantized_, const Tensor& grad_error_,
                                                const Tensor& x_, const Tensor& codebook_, const Tensor& indices_,
                                                const std::string& gradient, double commitment_weight, bool need_x,
                                                bool need_codebook) {
  check_codebook(codebook_, x_);
  check_like(grad_quantized_, "grad_quantized", x_, "x");
  const Tensor grad_quantized = as_contiguous(grad_quantized_), grad_error = as_contiguous(grad_error_);
  const Tensor x = as_contiguous(x_), codebook = as_contiguous(codebook_), indices = as_contiguous(indices_);
  const bool has_heads = codebook.dim() == 3;
  const int64_t heads = has_heads ? codebook.size(0) : 1, codes = codebook.size(codebook.dim() - 2);
  check_indices(indices, x, codes);
  check_accumulated(grad_error, "grad_error", sizes_of(indices), x, "x");
  const Tensor grad_x = need_x ? empty(sizes_of(x), x.scalar_type(), x) : absent(x);
  const Tensor grad_codebook = need_codebook ? empty(sizes_of(codebook), x.scalar_type(), x) : absent(x);
  QuantizeBackward args{.dtype = dtype_of(x, "x"),
                        .gradient = parse_gradient(gradient),
                        .heads = heads,
                        .rows = heads == 0 ? 0 : leading_size(x) / heads,
                        .codes = codes,
                        .dim = last_size(x),
                        .commitment_weight = commitment_weight,
                        .grad_quantized = data(grad_quantized),
                        .grad_error = data(grad_error),
                        .x = data(x),
                        .codebook = data(codebook),
                        .indices = int64_data(indices),
                        .grad_x = need_x ? mutable_data(grad_x) : nullptr,
                        .grad_codebook = need_codebook ? mutable_data(grad_codebook) : nullptr,
                        .workspace = nullptr};
  const Tensor workspace = ISTHMUS_ALLOCATE(x, codebook, args);
  ISTHMUS_LAUNCH(x, codebook, backward, args);
  return {grad_x, grad_codebook};
}

// ---- statistics and updates ----------------------------------------------------------------------------------------

Tensor code_totals(const Tensor& x_, const Tensor& indices_, int64_t num_codes) {
  check_vectors(x_);
  if (num_codes < 0 || num_codes > max_codes) fail("num_codes is ", num_codes, "; expected 0 to ", max_codes);
  const Tensor x = as_contiguous(x_), indices = as_contiguous(indices_);
  check_indices(indices, x, num_codes);
  const Tensor totals = empty({num_codes * (1 + last_size(x))}, accumulate_type(x), x);
  const int64_t number = accumulate_type(x) == ScalarType::Double ? 8 : 4;
  char* counts = static_cast<char*>(mutable_data(totals));
  CodeStatistics args{.dtype = dtype_of(x, "x"),
                      .rows = leading_size(x),
                      .codes = num_codes,
                      .dim = last_size(x),
                      .x = data(x),
                      .indices = int64_data(indices),
                      .counts = counts,
                      .sums = counts + num_codes * number,
                      .workspace = nullptr};
  const Tensor workspace = ISTHMUS_ALLOCATE(x, codebook, args);
  ISTHMUS_LAUNCH(x, codebook, statistics, args);
  return totals;
}

// What is written in place must be the tensor itself, not a copy.
void check_in_place(const Tensor& t, const char* argument) {
  if (!t.is_contiguous()) fail(argument, " is not contiguous; expected contiguous memory, as it is written in place");
}

void check_rate(double value, const char* argument) {
  if (!(value >= 0 && value <= 1)) fail(argument, " is ", value, "; expected 0 to 1");
}

void update_codebook_(const Tensor& codebook, const Tensor& usage, const OptionalTensor& sums, const Tensor& counts_,
                      const OptionalTensor& batch_sums_, const OptionalTensor& code_weight_,
                      const OptionalTensor& candidates_, double decay, double eps, double revive_below,
                      bool normalize) {
  const int64_t dims = codebook.dim();
  if (dims != 2 && dims != 3) fail("codebook has shape ", shape_of(codebook), "; expected [K, D] or [H, K, D]");
  const std::vector<int64_t> per_code = leading_sizes(codebook), whole = sizes_of(codebook);
  check_rate(decay, "decay");
  if (!(eps >= 0)) fail("eps is ", eps, "; expected 0 or more");
  check_accumulated(usage, "usage", per_code, codebook, "codebook");
  check_accumulated(counts_, "counts", per_code, codebook, "codebook");
  if (code_weight_.has_value()) check_accumulated(*code_weight_, "code_weight", per_code, codebook, "codebook");
  if (candidates_.has_value()) check_like(*candidates_, "candidates", codebook, "codebook");
  if (sums.has_value() != batch_sums_.has_value()) {
    fail("sums and batch_sums belong together; expected both or neither, got only ",
         sums.has_value() ? "sums" : "batch_sums");
  }
  if (sums.has_value()) {
    check_accumulated(*sums, "sums", whole, codebook, "codebook");
    check_accumulated(*batch_sums_, "batch_sums", whole, codebook, "codebook");
    check_in_place(*sums, "sums");
  }
  check_in_place(codebook, "codebook");
  check_in_place(usage, "usage");
  const Tensor counts = as_contiguous(counts_);
  const OptionalTensor batch_sums = as_contiguous(batch_sums_), code_weight = as_contiguous(code_weight_),
                       candidates = as_contiguous(candidates_);
  CodebookUpdate args{.dtype = dtype_of(codebook, "codebook"),
                      .heads = dims == 3 ? codebook.size(0) : 1,
                      .codes = codebook.size(dims - 2),
                      .dim = last_size(codebook),
                      .decay = decay,
                      .epsilon = eps,
                      .revive_below = revive_below,
                      .normalize = normalize,
                      .counts = data(counts),
                      .batch_sums = data(batch_sums),
                      .code_weight = data(code_weight),
                      .candidates = data(candidates),
                      .usage = mutable_data(usage),
                      .sums = sums.has_value() ? mutable_data(*sums) : nullptr,
                      .codebook = mutable_data(codebook),
                      .workspace = nullptr};
  const Tensor workspace = ISTHMUS_ALLOCATE(codebook, codebook, args);
  ISTHMUS_LAUNCH(codebook, codebook, update, args);
}

}  // namespace

void register_codebook(StableLibrary& m) {
  m.impl("vq_assign", TORCH_BOX(&vq_assign));
  m.impl("vq_match", TORCH_BOX(&vq_match));
  m.impl("vq_quantize", TORCH_BOX(&vq_quantize));
  m.impl("vq_gather", TORCH_BOX(&vq_gather));
  m.impl("vq_quantize_backward", TORCH_BOX(&vq_quantize_backward));
  m.impl("code_totals", TORCH_BOX(&code_totals));
  m.impl("update_codebook_", TORCH_BOX(&update_codebook_));
}

}  // namespace isthmus
