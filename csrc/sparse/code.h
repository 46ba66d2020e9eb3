// The tensors of a sparse code and of its order by latent, on the host: checked, contiguous, and sorted.
#pragma once

#include "core/sort.h"
#include "op.h"
#include "sparse/kernels.h"

namespace isthmus {

// ---- checks --------------------------------------------------------------------------------------------------------

inline void check_int64_vector(const Tensor& t, const char* argument, int64_t size, const Tensor& like) {
  check_int64(t, argument);
  check_device(t, argument, like, "indices");
  if (t.dim() != 1 || t.size(0) != size) fail(argument, " has shape ", shape_of(t), "; expected [", size, "]");
}

// On a GPU the kernels check, so that the host need not wait: a wrong index stops the device with a message.
inline void check_range(const Tensor& t, int64_t count, const char* argument, int64_t lowest, int64_t end,
                        const char* of_what) {
  if (t.is_cuda()) return;
  const int64_t wrong = find_outside(int64_data(t), count, end, lowest);
  if (wrong >= 0) {
    fail(argument, " holds ", int64_data(t)[wrong], "; expected values in [", lowest, ", ", end, "), ", of_what);
  }
}

// Ascending from 0, and no further than `most`.
inline void check_borders(const Tensor& t, const char* argument, int64_t most) {
  if (t.is_cuda()) return;
  const int64_t *border = int64_data(t), last = t.numel() - 1;
  if (border[0] != 0) fail(argument, " begins with ", border[0], "; expected 0");
  for (int64_t i = 0; i < last; ++i) {
    if (border[i] > border[i + 1]) fail(argument, " falls from ", border[i], " to ", border[i + 1]);
  }
  if (border[last] > most) fail(argument, " ends with ", border[last], "; expected at most ", most);
}

// ---- a code and its order ------------------------------------------------------------------------------------------

// The tensors behind a CodeLayout, checked and contiguous.
class SparseCode {
 public:
  SparseCode(const Tensor& indices, const OptionalTensor& offsets, int64_t features)
      : indices_(as_contiguous(indices)), offsets_(as_contiguous(offsets)) {
    check_int64(indices, "indices");
    if (!offsets) {
      if (indices.dim() != 2) fail("indices has shape ", shape_of(indices), "; expected [rows, k]");
    } else {
      if (indices.dim() != 1)
        fail("indices has shape ", shape_of(indices), "; expected [entries], as offsets is given");
      if (offsets->dim() != 1 || offsets->size(0) < 1) {
        fail("offsets has shape ", shape_of(*offsets), "; expected [rows + 1]");
      }
      check_int64_vector(*offsets, "offsets", offsets->size(0), indices);
      check_borders(*offsets_, "offsets", indices.size(0));
      if (!offsets->is_cuda() && int64_data(*offsets_)[rows()] != indices.size(0)) {
        fail("offsets ends with ", int64_data(*offsets_)[rows()], "; expected ", indices.size(0), ", the entries");
      }
    }
    check_range(indices_, indices_.numel(), "indices", -1, features, "the rows of weight, or -1 for an empty place");
  }

  int64_t rows() const { return offsets_ ? offsets_->size(0) - 1 : indices_.size(0); }
  const Tensor& indices() const { return indices_; }

  CodeLayout layout() const {
    return {.rows = rows(),
            .entries = indices_.numel(),
            .k = offsets_ ? 0 : indices_.size(1),
            .offsets = offsets_ ? int64_data(*offsets_) : nullptr,
            .indices = int64_data(indices_)};
  }

  // The numbers that belong to the entries: of the shape of the indices.
  Tensor check_numbers(const Tensor& numbers, const char* argument) const {
    check_device(indices_, "indices", numbers, argument);
    if (!same_shape(indices_, numbers)) {
      fail("indices has shape ", shape_of(indices_), "; expected ", shape_of(numbers), ", like ", argument);
    }
    return as_contiguous(numbers);
  }

 private:
  Tensor indices_;
  OptionalTensor offsets_;
};

// The tensors behind a LatentOrder.
struct Order {
  Tensor entries, rows, starts;

  LatentOrder view() const { return {int64_data(entries), int64_data(rows), int64_data(starts)}; }
};

inline Order sort_latents(const SparseCode& code, int64_t features, const OptionalTensor& values) {
  const Tensor& like = code.indices();
  const CodeLayout layout = code.layout();
  const Order order{empty({layout.entries}, ScalarType::Long, like), empty({layout.entries}, ScalarType::Long, like),
                    empty({features + 1}, ScalarType::Long, like)};
  SortLatents args{.dtype = values ? dtype_of(*values, "values") : DType::f32,
                   .code = layout,
                   .features = features,
                   .values = data(values),
                   .order_entries = static_cast<int64_t*>(mutable_data(order.entries)),
                   .order_rows = static_cast<int64_t*>(mutable_data(order.rows)),
                   .starts = static_cast<int64_t*>(mutable_data(order.starts)),
                   .workspace = nullptr};
  const Tensor workspace = ISTHMUS_ALLOCATE(like, sparse, args);
  ISTHMUS_LAUNCH(like, sparse, latent_order, args);
  return order;
}

// The order that is given, checked, or that of all entries.
inline Order order_of(const SparseCode& code, int64_t features, const OptionalTensor& entries,
                      const OptionalTensor& rows, const OptionalTensor& starts) {
  if (!entries && !rows && !starts) return sort_latents(code, features, std::nullopt);
  if (!entries || !rows || !starts) fail("the order is not complete; expected entries, rows and starts, or none");
  const int64_t count = code.layout().entries;
  check_int64_vector(*entries, "entries of the order", count, code.indices());
  check_int64_vector(*rows, "rows of the order", count, code.indices());
  check_int64_vector(*starts, "starts of the order", features + 1, code.indices());
  const Order order{as_contiguous(*entries), as_contiguous(*rows), as_contiguous(*starts)};
  check_borders(order.starts, "starts of the order", count);
  const int64_t sorted = count == 0 || starts->is_cuda() ? 0 : int64_data(order.starts)[features];
  check_range(order.entries, sorted, "entries of the order", 0, count, "the entries of the code");
  check_range(order.rows, sorted, "rows of the order", 0, code.rows(), "the rows of the code");
  return order;
}

}  // namespace isthmus
