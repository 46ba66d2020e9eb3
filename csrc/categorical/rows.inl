// Rows in working memory: what the categorical kernels do with whole rows, narrow ones many at a time.
//
// A group is one wide row, or as many narrow ones as fit into a tile (core/tiles.h). Elementwise steps run over the
// group as if it were one row, at full vector width; only sums and maxima look at single rows, in L1. A value of each
// row meets the elements again through a table in which it stands once for every column.
#pragma once

#include "core/buffer.h"
#include "core/math.h"
#include "core/tiles.h"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

// Calls f(j, left) for each vector of [0, count).
template <class C, class F>
ISTHMUS_INLINE void for_vectors(int64_t count, F&& f) {
  for (int64_t j = 0; j < count; j += lanes<C>) f(j, count - j);
}

struct Group {
  int64_t row, rows, cols;

  int64_t first() const { return row * cols; }
  int64_t count() const { return rows * cols; }
};

// Softmax needs its whole row, so unlike RowTiles this cut never splits one.
struct RowGroups {
  int64_t rows, cols, rows_per_group, count;

  RowGroups(int64_t rows_, int64_t cols_) : rows(rows_), cols(cols_) {
    rows_per_group = cols >= tile_elements ? 1 : tile_elements / (cols == 0 ? 1 : cols);
    count = (rows + rows_per_group - 1) / rows_per_group;
  }

  Group operator[](int64_t index) const {
    const int64_t row = index * rows_per_group, left = rows - row;
    return {row, left < rows_per_group ? left : rows_per_group, cols};
  }
  int64_t elements() const { return rows_per_group * cols; }
  int64_t grain() const { return elements() >= grain_elements ? 1 : grain_elements / (elements() + 1) + 1; }
};

// N arrays of `size` elements, each with a tail that lets a vector that begins at any of them be stored whole.
template <class C, int N>
struct Scratch {
  int64_t stride;
  Buffer<C> memory;

  explicit Scratch(int64_t size) : stride((size / lanes<C> + 2) * lanes<C>), memory(N * stride) {}
  C* operator[](int i) const { return memory.data + i * stride; }
};

// Room for the tables of PerRow: groups of one row need none.
template <class C, int N>
struct Tables : Scratch<C, N> {
  explicit Tables(const RowGroups& groups) : Scratch<C, N>(groups.rows_per_group > 1 ? groups.elements() : 0) {}
};

// values[row], wherever in the group one of its elements is.
template <class C>
struct PerRow {
  Vec<C> single = {};
  const C* table = nullptr;

  PerRow() = default;
  PerRow(const Group& group, const C* values, C* room)
      : single(splat(values[0])), table(group.rows == 1 ? nullptr : room) {
    if (table == nullptr) return;
    for (int64_t r = 0; r < group.rows; ++r) {
      // Upwards: what a vector writes beyond its row, the next row overwrites.
      for_vectors<C>(group.cols, [&](int64_t c, int64_t) { store(room + r * group.cols + c, splat(values[r])); });
    }
  }

  ISTHMUS_INLINE Vec<C> at(int64_t j) const { return table == nullptr ? single : load(table + j); }
};

// NaN is passed over.
template <class C>
C row_max(const C* x, int64_t cols) {
  C top = -__builtin_inf();
  if (cols < lanes<C>) {
    for (int64_t c = 0; c < cols; ++c) top = x[c] > top ? x[c] : top;
    return top;
  }
  // The last vector overlaps the one before it.
  Vec<C> tops = load(x + cols - lanes<C>);
  tops = tops == tops ? tops : splat(top);
  for (int64_t c = 0; c + lanes<C> <= cols; c += lanes<C>) {
    const Vec<C> v = load(x + c);
    tops = v > tops ? v : tops;
  }
  for (int i = 0; i < lanes<C>; ++i) top = tops[i] > top ? tops[i] : top;
  return top;
}

// In blocks whose sums are added last, so that a row of a million terms keeps its digits.
template <class C>
C row_sum(const C* x, int64_t cols) {
  if (cols < lanes<C>) {
    C sum = 0;
    for (int64_t c = 0; c < cols; ++c) sum += x[c];
    return sum;
  }
  constexpr int64_t block = 256 * lanes<C>;
  Vec<C> total = {};
  for (int64_t begin = 0; begin < cols; begin += block) {
    const int64_t left = cols - begin;
    Vec<C> sum = {};
    for_vectors<C>(left < block ? left : block,
                   [&](int64_t c, int64_t) { sum += load_first(x + begin + c, left - c); });
    total += sum;
  }
  return sum_lanes<C>(total);
}

template <class C>
void row_sums(const Group& group, const C* x, C* sums) {
  for (int64_t r = 0; r < group.rows; ++r) sums[r] = row_sum(x + r * group.cols, group.cols);
}

// Subtracts its maximum from each row. A row without a finite maximum becomes NaN at it.
template <class C>
void subtract_max(const Group& group, C* x, C* row_values, C* table) {
  for (int64_t r = 0; r < group.rows; ++r) row_values[r] = row_max(x + r * group.cols, group.cols);
  const PerRow<C> top(group, row_values, table);
  for_vectors<C>(group.count(), [&](int64_t j, int64_t) { store(x + j, load(x + j) - top.at(j)); });
}

// The first column of the largest entry, or -1 where softmax is NaN: for a NaN, a plus infinity, or nothing finite.
template <class C>
int64_t first_max(const C* x, int64_t cols) {
  int64_t found = -1;
  if (cols < lanes<C>) {
    C top = -__builtin_inf();
    bool spoilt = false;
    for (int64_t c = 0; c < cols; ++c) {
      const bool larger = x[c] > top;
      top = larger ? x[c] : top;
      found = larger ? c : found;
      spoilt |= !(x[c] < C(__builtin_inf()));
    }
    return spoilt ? -1 : found;
  }
  const C top = row_max(x, cols);
  if (!(top - top == 0)) return -1;
  for (int64_t c = 0; c < cols; c += lanes<C>) {
    const Vec<C> v = load_first(x + c, cols - c);
    if (any(v != v)) return -1;
    if (found < 0 && any(v == top)) {
      for (int64_t i = 0; i < lanes<C> && c + i < cols && found < 0; ++i) found = x[c + i] == top ? c + i : -1;
    }
  }
  return found;
}

}  // namespace
}  // namespace isthmus::ISTHMUS_LEVEL
