// Host entries of the codebook family: checks, allocation, dispatch. Schemas in csrc/library.cpp.

#include "op.h"
#include "codebook/kernels.h"
#include "core/sort.h"

namespace isthmus {
namespace {

void check_vectors(const Tensor& x) {
  if (x.dim() == 0) fail("x has shape []; expected [..., D]");
}

void check_codebook(const Tensor& codebook, const Tensor& x) {
  check_vectors(x);
  check_matrix(codebook, "codebook", -1, last_size(x), x, "x");
  constexpr int64_t max_codes = INT32_MAX;
  if (codebook.size(0) < 1 || codebook.size(0) > max_codes) {
    fail("codebook has shape ", shape_of(codebook), "; expected [K, ", last_size(x), "] with 1 <= K <= ", max_codes);
  }
}

// One index in [0, codes) for each row of x. CUDA indices are checked by the kernels.
void check_indices(const Tensor& indices, const Tensor& x, int64_t codes) {
  check_int64(indices, "indices");
  check_device(indices, "indices", x, "x");
  if (sizes_of(indices) != leading_sizes(x)) {
    fail("indices has shape ", shape_of(indices), "; expected the leading dimensions of x, which has shape ",
         shape_of(x));
  }
  if (x.is_cuda()) return;
  const int64_t outside = find_outside(int64_data(indices), indices.numel(), codes);
  if (outside >= 0) {
    fail("indices holds ", int64_data(indices)[outside], "; expected 0 <= index < ", codes, ", the number of codes");
  }
}

// Scratch memory for a kernel on the device of `like`; args.workspace points to it.
template <class Args>
Tensor allocate_workspace([[maybe_unused]] Args& args, const Tensor& like) {
  int64_t bytes = 0;
#if defined(ISTHMUS_CUDA)
  if (like.is_cuda()) {
    const CudaScope scope(like);
    bytes = cuda::codebook_workspace(args);
  }
#endif
  const Tensor workspace = empty({bytes}, ScalarType::Byte, like);
  args.workspace = mutable_data(workspace);
  return workspace;
}

void search(CodeSearch args, const Tensor& x) {
  const Tensor workspace = allocate_workspace(args, x);
  ISTHMUS_LAUNCH(x, codebook, search, args);
}

Tensor vq_assign(const Tensor& x_, const Tensor& codebook_) {
  check_codebook(codebook_, x_);
  const Tensor x = as_contiguous(x_), codebook = as_contiguous(codebook_);
  const Tensor indices = empty(leading_sizes(x), ScalarType::Long, x);
  search({.dtype = dtype_of(x, "x"),
          .rows = leading_size(x),
          .codes = codebook.size(0),
          .dim = last_size(x),
          .x = data(x),
          .codebook = data(codebook),
          .indices = static_cast<int64_t*>(mutable_data(indices)),
          .quantized = nullptr,
          .squared_error = nullptr,
          .workspace = nullptr},
         x);
  return indices;
}

// commitment_weight matters to the gradient alone.
std::tuple<Tensor, Tensor, Tensor> vq_quantize(const Tensor& x_, const Tensor& codebook_, double) {
  check_codebook(codebook_, x_);
  const Tensor x = as_contiguous(x_), codebook = as_contiguous(codebook_);
  const Tensor quantized = empty(sizes_of(x), x.scalar_type(), x);
  const Tensor indices = empty(leading_sizes(x), ScalarType::Long, x);
  const Tensor squared_error = empty(leading_sizes(x), accumulate_type(x), x);
  search({.dtype = dtype_of(x, "x"),
          .rows = leading_size(x),
          .codes = codebook.size(0),
          .dim = last_size(x),
          .x = data(x),
          .codebook = data(codebook),
          .indices = static_cast<int64_t*>(mutable_data(indices)),
          .quantized = mutable_data(quantized),
          .squared_error = mutable_data(squared_error),
          .workspace = nullptr},
         x);
  return {quantized, indices, squared_error};
}

std::tuple<Tensor, Tensor> vq_quantize_backward(const Tensor& grad_quantized_, const Tensor& grad_error_,
                                                const Tensor& x_, const Tensor& codebook_, const Tensor& indices_,
                                                double commitment_weight) {
  check_codebook(codebook_, x_);
  check_like(grad_quantized_, "grad_quantized", x_, "x");
  const Tensor grad_quantized = as_contiguous(grad_quantized_), grad_error = as_contiguous(grad_error_);
  const Tensor x = as_contiguous(x_), codebook = as_contiguous(codebook_), indices = as_contiguous(indices_);
  check_indices(indices, x, codebook.size(0));
  check_device(grad_error, "grad_error", x, "x");
  if (grad_error.scalar_type() != accumulate_type(x) || !same_shape(grad_error, indices)) {
    fail("grad_error is ", name_of(grad_error.scalar_type()), shape_of(grad_error), "; expected ",
         name_of(accumulate_type(x)), shape_of(indices));
  }
  const Tensor grad_x = empty(sizes_of(x), x.scalar_type(), x);
  const Tensor grad_codebook = empty(sizes_of(codebook), x.scalar_type(), x);
  QuantizeBackward args{.dtype = dtype_of(x, "x"),
                        .rows = leading_size(x),
                        .codes = codebook.size(0),
                        .dim = last_size(x),
                        .commitment_weight = commitment_weight,
                        .grad_quantized = data(grad_quantized),
                        .grad_error = data(grad_error),
                        .x = data(x),
                        .codebook = data(codebook),
                        .indices = int64_data(indices),
                        .grad_x = mutable_data(grad_x),
                        .grad_codebook = mutable_data(grad_codebook),
                        .workspace = nullptr};
  const Tensor workspace = allocate_workspace(args, x);
  ISTHMUS_LAUNCH(x, codebook, backward, args);
  return {grad_x, grad_codebook};
}

std::tuple<Tensor, Tensor> code_statistics(const Tensor& x_, const Tensor& indices_, int64_t num_codes) {
  check_vectors(x_);
  if (num_codes < 0 || num_codes > INT32_MAX) fail("num_codes is ", num_codes, "; expected 0 to ", INT32_MAX);
  const Tensor x = as_contiguous(x_), indices = as_contiguous(indices_);
  check_indices(indices, x, num_codes);
  const Tensor counts = empty({num_codes}, accumulate_type(x), x);
  const Tensor sums = empty({num_codes, last_size(x)}, accumulate_type(x), x);
  CodeStatistics args{.dtype = dtype_of(x, "x"),
                      .rows = leading_size(x),
                      .codes = num_codes,
                      .dim = last_size(x),
                      .x = data(x),
                      .indices = int64_data(indices),
                      .counts = mutable_data(counts),
                      .sums = mutable_data(sums),
                      .workspace = nullptr};
  const Tensor workspace = allocate_workspace(args, x);
  ISTHMUS_LAUNCH(x, codebook, statistics, args);
  return {counts, sums};
}

}  // namespace

void register_codebook(StableLibrary& m) {
  m.impl("vq_assign", TORCH_BOX(&vq_assign));
  m.impl("vq_quantize", TORCH_BOX(&vq_quantize));
  m.impl("vq_quantize_backward", TORCH_BOX(&vq_quantize_backward));
  m.impl("code_statistics", TORCH_BOX(&code_statistics));
}

}  // namespace isthmus
