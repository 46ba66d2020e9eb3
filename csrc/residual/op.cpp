// Host entries of the residual family: checks, allocation, dispatch. Schemas in csrc/library.cpp.

#include "op.h"
#include "residual/kernels.h"

namespace isthmus {
namespace {

CodeGradient parse_gradient(const std::string& name) {
  if (name == "straight_through") return CodeGradient::straight_through;
  if (name == "rotation") return CodeGradient::rotation;
  fail("gradient is '", name, "'; expected 'straight_through' or 'rotation'");
}

// The checked and contiguous inputs of every op: x, and the codebooks of all stages, one behind the other, as tables.
struct ResidualInputs {
  Tensor x, tables;
  std::vector<int64_t> stage_sizes;
  ResidualCodes codes;

  ResidualInputs(const Tensor& x_, const Tensor& tables_, const std::vector<int64_t>& sizes)
      : x(x_), tables(tables_), stage_sizes(sizes) {
    if (x.dim() == 0) fail("x has shape []; expected [..., D]");
    check_device(tables, "codebooks", x, "x");
    check_dtype(tables, "codebooks", x, "x");
    const bool grouped = tables.dim() == 3;
    if ((tables.dim() != 2 && !grouped) || last_size(tables) != last_size(x)) {
      fail("codebooks are tables of shape ", shape_of(tables), "; expected [K, ", last_size(x), "] or [G, K, ",
           last_size(x), "], like x, which has shape ", shape_of(x));
    }
    if (grouped && (x.dim() < 2 || x.size(0) != tables.size(0))) {
      fail("x has shape ", shape_of(x), "; expected [", tables.size(0), ", ..., D], one part for each group");
    }
    int64_t total = 0;
    for (int64_t size : stage_sizes) {
      constexpr int64_t max_codes = INT32_MAX;
      if (size < 1 || size > max_codes) fail("codebooks has a stage of ", size, " codes; expected 1 to ", max_codes);
      total += size;
    }
    if (stage_sizes.empty() || total != tables.size(tables.dim() - 2)) {
      fail("codebooks has stages of ", total, " codes together; expected the ", tables.size(tables.dim() - 2),
           " rows of its table");
    }
    x = as_contiguous(x);
    tables = as_contiguous(tables);
    const int64_t groups = grouped ? tables.size(0) : 1;
    codes = {.dtype = dtype_of(x, "x"),
             .groups = groups,
             .rows = groups == 0 ? 0 : leading_size(x) / groups,
             .dim = last_size(x),
             .stages = static_cast<int64_t>(stage_sizes.size()),
             .codes = total,
             .sizes = stage_sizes.data(),
             .x = data(x),
             .tables = data(tables)};
  }
  ResidualInputs(const ResidualInputs&) = delete;

  // One number for each stage of each row.
  std::vector<int64_t> stage_shape() const {
    std::vector<int64_t> sizes = leading_sizes(x);
    sizes.push_back(codes.stages);
    return sizes;
  }

  // CUDA indices are checked by the kernels.
  void check_indices(const Tensor& indices) const {
    check_int64(indices, "indices");
    check_device(indices, "indices", x, "x");
    if (sizes_of(indices) != stage_shape()) {
      fail("indices has shape ", shape_of(indices), "; expected the leading dimensions of x and ", codes.stages,
           " stages; x has shape ", shape_of(x));
    }
    if (x.is_cuda()) return;
    const int64_t* index = int64_data(indices);
    for (int64_t i = 0; i < indices.numel(); ++i) {
      const int64_t stage = i % codes.stages, size = stage_sizes[static_cast<size_t>(stage)];
      if (index[i] < -1 || index[i] >= size) {
        fail("indices holds ", index[i], " for stage ", stage, "; expected -1 <= index < ", size,
             ", the number of its codes");
      }
    }
  }

  void check_stages(const Tensor& stages) const {
    check_int64(stages, "stages");
    check_device(stages, "stages", x, "x");
    if (sizes_of(stages) != leading_sizes(x)) {
      fail("stages has shape ", shape_of(stages), "; expected the leading dimensions of x, which has shape ",
           shape_of(x));
    }
    if (x.is_cuda()) return;
    for (int64_t i = 0; i < stages.numel(); ++i) {
      const int64_t count = int64_data(stages)[i];
      if (count < 0 || count > codes.stages) fail("stages holds ", count, "; expected 0 to ", codes.stages);
    }
  }
};

// gradient and commitment_weight matter to the backward pass alone.
std::tuple<Tensor, Tensor, Tensor> residual_vq_quantize(const Tensor& x, const Tensor& tables,
                                                        const OptionalTensor& stages_,
                                                        const std::vector<int64_t>& sizes, int64_t beam,
                                                        const std::string& gradient, double) {
  const ResidualInputs in(x, tables, sizes);
  parse_gradient(gradient);
  if (beam < 1) fail("beam is ", beam, "; expected at least 1");
  const OptionalTensor stages = as_contiguous(stages_);
  if (stages) in.check_stages(*stages);
  const Tensor quantized = empty(sizes_of(in.x), in.x.scalar_type(), in.x);
  const Tensor indices = empty(in.stage_shape(), ScalarType::Long, in.x);
  const Tensor squared_error = empty(in.stage_shape(), accumulate_type(in.x), in.x);
  ResidualSearch args{.codes = in.codes,
                      .beam = beam,
                      .active = static_cast<const int64_t*>(data(stages)),
                      .indices = static_cast<int64_t*>(mutable_data(indices)),
                      .quantized = mutable_data(quantized),
                      .squared_error = mutable_data(squared_error),
                      .workspace = nullptr};
  const Tensor workspace = ISTHMUS_ALLOCATE(in.x, residual, args);
  ISTHMUS_LAUNCH(in.x, residual, search, args);
  return {quantized, indices, squared_error};
}

std::tuple<Tensor, Tensor> residual_vq_quantize_backward(const Tensor& grad_quantized_, const Tensor& grad_error_,
                                                         const Tensor& x, const Tensor& tables, const Tensor& indices_,
                                                         const std::vector<int64_t>& sizes, const std::string& gradient,
                                                         double commitment_weight, bool need_x, bool need_codebooks) {
  const ResidualInputs in(x, tables, sizes);
  check_like(grad_quantized_, "grad_quantized", in.x, "x");
  check_accumulated(grad_error_, "grad_error", in.stage_shape(), in.x, "x");
  const Tensor grad_quantized = as_contiguous(grad_quantized_), grad_error = as_contiguous(grad_error_);
  const Tensor indices = as_contiguous(indices_);
  in.check_indices(indices);
  const Tensor grad_x = need_x ? empty(sizes_of(in.x), in.x.scalar_type(), in.x) : absent(in.x);
  const Tensor grad_tables = need_codebooks ? empty(sizes_of(in.tables), in.x.scalar_type(), in.x) : absent(in.x);
  ResidualBackward args{.codes = in.codes,
                        .gradient = parse_gradient(gradient),
                        .commitment_weight = commitment_weight,
                        .grad_quantized = data(grad_quantized),
                        .grad_error = data(grad_error),
                        .indices = int64_data(indices),
                        .grad_x = need_x ? mutable_data(grad_x) : nullptr,
                        .grad_tables = need_codebooks ? mutable_data(grad_tables) : nullptr,
                        .workspace = nullptr};
  const Tensor workspace = ISTHMUS_ALLOCATE(in.x, residual, args);
  ISTHMUS_LAUNCH(in.x, residual, backward, args);
  return {grad_x, grad_tables};
}

Tensor residual_code_totals(const Tensor& x, const Tensor& tables, const Tensor& indices_,
                            const std::vector<int64_t>& sizes) {
  const ResidualInputs in(x, tables, sizes);
  const Tensor indices = as_contiguous(indices_);
  in.check_indices(indices);
  const Tensor totals = empty({in.codes.groups * in.codes.codes * (1 + in.codes.dim)}, accumulate_type(in.x), in.x);
  ResidualTotals args{
      .codes = in.codes, .indices = int64_data(indices), .totals = mutable_data(totals), .workspace = nullptr};
  const Tensor workspace = ISTHMUS_ALLOCATE(in.x, residual, args);
  ISTHMUS_LAUNCH(in.x, residual, totals, args);
  return totals;
}

}  // namespace

void register_residual(StableLibrary& m) {
  m.impl("residual_vq_quantize", TORCH_BOX(&residual_vq_quantize));
  m.impl("residual_vq_quantize_backward", TORCH_BOX(&residual_vq_quantize_backward));
  m.impl("residual_code_totals", TORCH_BOX(&residual_code_totals));
}

}  // namespace isthmus
