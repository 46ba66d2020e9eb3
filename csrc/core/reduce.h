// Sums of a tensor's elements as a Reduction asks for them, in an order that depends on the shape alone: elements come
// by pieces (core/tiles.h), sums that span several items go through partial sums that finish() adds in item order.
#pragma once

#include "core/buffer.h"
#include "core/gaussians.h"
#include "core/simd.h"
#include "core/tiles.h"

namespace isthmus {
namespace {

constexpr int64_t max_row_items = 64;  // each keeps one partial sum for every column

inline RowTiles tiles_for(const Reduction& reduction) {
  return {reduction.rows, reduction.cols, reduction.over_rows ? (reduction.rows - 1) / max_row_items + 1 : 1};
}

// For kernels that need a row's elements in one item.
inline RowTiles whole_rows(const Reduction& reduction) { return {reduction.rows, reduction.cols, 1, false}; }

// Four running sums: one would wait for its own addition.
template <class C>
ISTHMUS_INLINE C sum_elements(const C* elements, int64_t count) {
  constexpr int64_t step = 4 * lanes<C>;
  Vec<C> sums[4] = {};
  int64_t i = 0;
  for (; i + step <= count; i += step) {
    for (int n = 0; n < 4; ++n) sums[n] += load(elements + i + n * lanes<C>);
  }
  for (; i < count; i += lanes<C>) sums[0] += load_first(elements + i, count - i);
  return sum_lanes<C>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class C>
class Sums {
 public:
  Sums(const RowTiles& tiles, const Reduction& reduction, void* sums)
      : tiles_(tiles),
        reduction_(reduction),
        weight_(static_cast<C>(reduction.weight)),
        sums_(static_cast<C*>(sums)),
        parts_(reduction.over_rows ? tiles.items / tiles.chunks_per_row : tiles.chunks_per_row),
        partial_(sums != nullptr && parts_ > 1 ? new C[parts_ * reduction.sums()] : sums_) {}
  ~Sums() {
    if (partial_ != sums_) delete[] partial_;
  }
  Sums(const Sums&) = delete;
  Sums& operator=(const Sums&) = delete;

  // Adds a piece, whose elements stand in a tile.
  void add(const Piece& piece, const C* elements) const {
    if (reduction_.over_rows) return add_to_columns(piece, elements);
    if (tiles_.cols == 1) return copy(piece, elements);
    const int64_t chunk = piece.col / tiles_.cols_per_item;
    for (int64_t r = 0; r < piece.rows; ++r) {
      C& sum = partial_[(piece.row + r) * parts_ + chunk];
      const C more = weight_ * sum_elements(elements + r * piece.cols, piece.cols);
      sum = piece.begins_rows ? more : sum + more;
    }
  }

  void finish() const {
    const int64_t count = reduction_.sums();
    if (sums_ == nullptr) return;
    if (tiles_.rows * tiles_.cols == 0) {
      for (int64_t i = 0; i < count; ++i) sums_[i] = 0 * weight_;  // the mean of nothing is NaN
      return;
    }
    if (partial_ == sums_) return;
    const int64_t from_sum = reduction_.over_rows ? 1 : parts_, from_part = reduction_.over_rows ? count : 1;
    for (int64_t i = 0; i < count; ++i) {
      C sum = 0;
      for (int64_t part = 0; part < parts_; ++part) sum += partial_[i * from_sum + part * from_part];
      sums_[i] = sum;
    }
  }

 private:
  void add_to_columns(const Piece& piece, const C* elements) const {
    C* columns = partial_ + piece.item / tiles_.chunks_per_row * tiles_.cols + piece.col;
    for (int64_t r = 0; r < piece.rows; ++r) {
      const bool begins = piece.begins_cols && r == 0;
      for (int64_t c = 0; c < piece.cols; c += lanes<C>) {
        const int64_t left = piece.cols - c;
        const Vec<C> more = weight_ * load_first(elements + r * piece.cols + c, left);
        store_first(columns + c, begins ? more : load_first(columns + c, left) + more, left);
      }
    }
  }

  void copy(const Piece& piece, const C* elements) const {
    for (int64_t i = 0; i < piece.rows; i += lanes<C>) {
      store_first(sums_ + piece.row + i, weight_ * load(elements + i), piece.rows - i);
    }
  }

  const RowTiles& tiles_;
  const Reduction& reduction_;
  C weight_;
  C* sums_;
  int64_t parts_;  // partial results of each sum
  C* partial_;     // [sums, parts], or over rows [parts, sums]
};

// The other way: the gradient of each element of a piece, given those of the sums.
template <class C>
inline void spread(const Reduction& reduction, const Piece& piece, const C* grad, C* elements) {
  const C weight = static_cast<C>(reduction.weight);
  for (int64_t r = 0; r < piece.rows; ++r) {
    C* row = elements + r * piece.cols;
    if (reduction.over_rows) {
      for (int64_t c = 0; c < piece.cols; ++c) row[c] = weight * grad[piece.col + c];
    } else if (reduction.cols == 1) {
      row[0] = weight * grad[piece.row + r];
    } else {
      const C value = weight * grad[piece.row + r];
      for (int64_t c = 0; c < piece.cols; ++c) row[c] = value;
    }
  }
}

}  // namespace
}  // namespace isthmus
