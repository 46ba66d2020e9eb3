// Indices back to digits, and digits to values. Bound by the divisions, one a digit, each after the one before.

#pragma once

#include "scalar/rows.inl"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

// The digits of an index. Divisions are shifts where the number of levels is a power of two; else, for indices below
// 2^32, products with m = ⌊2^48 / size⌋ + 1: m size - 2^48 is at most size < 2^16, and times the index below 2^48.
class Digits {
 public:
  Digits(const Levels& levels, bool first_highest) : levels_(levels), first_highest_(first_highest) {
    for (int d = 0; d < levels.dims; ++d) {
      const uint64_t size = static_cast<uint64_t>(levels.size[d]);
      shift_[d] = (size & (size - 1)) == 0 ? __builtin_ctzll(size) : -1;
      reciprocal_[d] = (uint64_t{1} << 48) / size + 1;
    }
  }

  // visit(dimension, digit)
  template <class F>
  ISTHMUS_INLINE void each(int64_t index, F&& visit) const {
    uint64_t rest = static_cast<uint64_t>(index);
    for (int i = 0; i < levels_.dims; ++i) {
      const int d = first_highest_ ? levels_.dims - 1 - i : i;
      const uint64_t size = static_cast<uint64_t>(levels_.size[d]), next = divide(rest, d);
      visit(d, static_cast<int64_t>(rest - next * size));
      rest = next;
    }
  }

 private:
  ISTHMUS_INLINE uint64_t divide(uint64_t x, int d) const {
    if (shift_[d] >= 0) return x >> shift_[d];
    if (x >> 32 != 0) return x / static_cast<uint64_t>(levels_.size[d]);
    return static_cast<uint64_t>(static_cast<unsigned __int128>(x) * reciprocal_[d] >> 48);
  }

  const Levels& levels_;
  bool first_highest_;
  int shift_[max_scalar_dims];
  uint64_t reciprocal_[max_scalar_dims];
};

// Where the entries of each dimension begin in a table of all.
struct Starts {
  int64_t of[max_scalar_dims];

  explicit Starts(const Levels& levels) {
    int64_t start = 0;
    for (int d = 0; d < levels.dims; start += levels.size[d++]) of[d] = start;
  }
};

// out[row, d] = value(d, digit d of the row's index), of the type of out; zeros for index -1.
template <class T, class F>
void decode_rows(int64_t rows, const Levels& levels, bool first_highest, const int64_t* indices, T* out, F&& value) {
  const Digits digits(levels, first_highest);
  const RowGroups groups(rows, levels.dims);
  over_groups(groups, [&] {
    return [&](const Group& group) {
      for (int64_t row = group.row; row < group.row + group.rows; ++row) {
        T* to = out + row * group.cols;
        if (indices[row] < 0) {
          for (int64_t c = 0; c < group.cols; ++c) to[c] = T{};
        } else {
          digits.each(indices[row], [&](int d, int64_t digit) { to[d] = value(d, digit); });
        }
      }
    };
  });
}

}  // namespace
}  // namespace isthmus::ISTHMUS_LEVEL
