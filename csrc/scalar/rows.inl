// What the scalar quantizers do with rows: values that belong to columns, sums of rows, digits and bits that make an
// index, masks, and sums over rows.
//
// Rows have at most 62 numbers, so kernels work on groups of whole rows (categorical/rows.inl): elementwise over the
// group as if it were one row, at full vector width. What differs between columns stands in a table that repeats it for
// every row of a group.
#pragma once

#include "categorical/rows.inl"
#include "core/parallel.h"
#include "scalar/kernels.h"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

// N values of each column, repeated for all rows of a group.
template <class C, int N>
class Columns {
 public:
  explicit Columns(const RowGroups& groups) : groups_(groups), table_(groups.elements()) {}

  // value(column)
  template <class F>
  void set(int which, F&& value) {
    C* to = table_[which];
    for (int64_t c = 0; c < groups_.cols; ++c) to[c] = static_cast<C>(value(c));
    for (int64_t i = groups_.cols; i < groups_.elements(); ++i) to[i] = to[i - groups_.cols];
  }
  ISTHMUS_INLINE Vec<C> at(int which, int64_t j) const { return load(table_[which] + j); }

 private:
  const RowGroups& groups_;
  Scratch<C, N> table_;
};

// ---- sums of rows --------------------------------------------------------------------------------------------------

// Lane i: the sum of the lanes of rows[i]. Each round adds pairs of lanes Step apart and joins two vectors into one.
template <class C, int Step = 1>
ISTHMUS_INLINE Vec<C> sum_each(Vec<C>* rows) {
  if constexpr (Step == lanes<C>) {
    return rows[0];
  } else {
    Mask<C> kept, moved;
    for (int i = 0; i < lanes<C>; ++i) {
      kept[i] = (i & Step) ? lanes<C> + i : i;
      moved[i] = (i & Step) ? lanes<C> + i - Step : i + Step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes<C> / Step; i += 2) {
      rows[i / 2] = __builtin_shuffle(rows[i], rows[i + 1], kept) + __builtin_shuffle(rows[i], rows[i + 1], moved);
    }
    return sum_each<C, 2 * Step>(rows);
  }
}

// sums[r] = Σ of row r of a group in working memory (padded as Scratch is), as many rows at a time as a vector has
// lanes: rows are short here, and summed one by one they would leave most lanes idle.
template <class C>
void sum_rows(const Group& group, const C* x, C* sums) {
  const int64_t whole = (group.cols - 1) / lanes<C> * lanes<C>;
  const Mask<C> last = first_lanes<C>(group.cols - whole);
  for (int64_t first = 0; first < group.rows; first += lanes<C>) {
    Vec<C> rows[lanes<C>];
#pragma GCC unroll 16
    for (int i = 0; i < lanes<C>; ++i) {
      const C* row = x + (first + i < group.rows ? first + i : group.rows - 1) * group.cols;
      rows[i] = last ? load(row + whole) : Vec<C>{};
      for (int64_t c = 0; c < whole; c += lanes<C>) rows[i] += load(row + c);
    }
    store_first(sums + first, sum_each<C>(rows), group.rows - first);
  }
}

// ---- indices -------------------------------------------------------------------------------------------------------

// Whole numbers of the width of C, as comparisons give them.
template <class C>
using Digit = decltype(+Mask<C>{}[0]);

// Indices of a group from its digits, one for each stage. Where every index is a number of C, they are sums of rows.
template <class C>
class RowIndices {
 public:
  RowIndices(const Levels& levels, const RowGroups& groups, int64_t stages = 1)
      : stages_(stages),
        columns_(groups),
        sums_(groups.rows_per_group),
        stride_((groups.elements() / lanes<C> + 2) * lanes<C>),
        terms_(stages * stride_) {
    double codes = 1;
    int64_t stride = 1;
    for (int d = 0; d < levels.dims; ++d, stride *= levels.size[d - 1]) {
      strides_[d] = stride;
      codes *= static_cast<double>(levels.size[d]);
    }
    exact_ = codes <= (sizeof(C) == 4 ? 0x1p24 : 0x1p53);
    columns_.set(0, [&](int64_t c) { return exact_ ? strides_[c] : 1; });
  }

  ISTHMUS_INLINE void put(int64_t j, Vec<C> digits, int64_t stage = 0) {
    store(terms_.data + stage * stride_ + j, digits * columns_.at(0, j));
  }

  // indices: [rows, stages]
  void write(const Group& group, int64_t* indices) const {
    for (int64_t stage = 0; stage < stages_; ++stage) {
      write_stage(group, terms_.data + stage * stride_, indices + group.row * stages_ + stage);
    }
  }

 private:
  void write_stage(const Group& group, const C* terms, int64_t* indices) const {
    if (exact_) {
      sum_rows(group, terms, sums_[0]);
      for (int64_t r = 0; r < group.rows; ++r) indices[r * stages_] = static_cast<int64_t>(sums_[0][r]);
      return;
    }
    for (int64_t r = 0; r < group.rows; ++r, terms += group.cols) {
      int64_t index = 0;
      for (int64_t c = 0; c < group.cols; ++c) index += static_cast<int64_t>(terms[c]) * strides_[c];
      indices[r * stages_] = index;
    }
  }

  int64_t stages_, strides_[max_scalar_dims];
  bool exact_;
  Columns<C, 1> columns_;
  Scratch<C, 1> sums_;
  int64_t stride_;
  Buffer<C> terms_;
};

// One bit for each lane of a comparison.
template <class M>
ISTHMUS_INLINE uint64_t bits_of(M mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof(mask[0]) == 4) return _mm512_movepi32_mask((__m512i)mask);
  return _mm512_movepi64_mask((__m512i)mask);
#elif defined(__AVX2__)
  if constexpr (sizeof(mask[0]) == 4) return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
  return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)mask));
#elif defined(__SSE2__)
  if constexpr (sizeof(mask[0]) == 4) return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask));
  return static_cast<uint32_t>(_mm_movemask_pd((__m128d)mask));
#else
  uint64_t bits = 0;
  for (size_t i = 0; i < sizeof(M) / sizeof(mask[0]); ++i) bits |= static_cast<uint64_t>(mask[i] != 0) << i;
  return bits;
#endif
}

ISTHMUS_INLINE uint64_t reverse_bits(uint64_t x) {
  x = ((x >> 1) & 0x5555555555555555u) | ((x & 0x5555555555555555u) << 1);
  x = ((x >> 2) & 0x3333333333333333u) | ((x & 0x3333333333333333u) << 2);
  x = ((x >> 4) & 0x0f0f0f0f0f0f0f0fu) | ((x & 0x0f0f0f0f0f0f0f0fu) << 4);
  return __builtin_bswap64(x);
}

// The bits of a group's elements in memory order, and its rows' indices, whose most significant bit comes first.
class BitString {
 public:
  explicit BitString(const RowGroups& groups) : size_(groups.elements() / 64 + 3), words_(size_) {}

  void clear() { std::memset(words_.data, 0, static_cast<size_t>(size_) * sizeof(uint64_t)); }

  // Of the vector that begins at element j.
  template <class M>
  ISTHMUS_INLINE void put(int64_t j, M mask) {
    words_.data[j / 64] |= bits_of(mask) << (j % 64);
  }

  void write_indices(const Group& group, int64_t* indices) const {
    for (int64_t r = 0; r < group.rows; ++r) indices[group.row + r] = index(r * group.cols, group.cols);
  }

 private:
  int64_t index(int64_t first, int64_t count) const {
    const uint64_t* word = words_.data + first / 64;
    const int64_t shift = first % 64;
    const uint64_t bits = shift == 0 ? word[0] : word[0] >> shift | word[1] << (64 - shift);
    return static_cast<int64_t>(reverse_bits(bits) >> (64 - count));
  }

  int64_t size_;
  Buffer<uint64_t> words_;
};

// ---- masks ---------------------------------------------------------------------------------------------------------

// value in all columns of the rows that the mask excludes; tensor is that of the whole problem.
template <class T>
void fill_masked(const bool* mask, const Group& group, T* tensor, T value) {
  if (mask == nullptr) return;
  for (int64_t row = group.row; row < group.row + group.rows; ++row) {
    if (mask[row]) continue;
    for (int64_t c = 0; c < group.cols; ++c) tensor[row * group.cols + c] = value;
  }
}

// The same in working memory, where the group begins at `values`.
template <class C>
void clear_masked(const bool* mask, const Group& group, C* values) {
  if (mask != nullptr) fill_masked(mask + group.row, {0, group.rows, group.cols}, values, C(0));
}

// ---- sums over rows ------------------------------------------------------------------------------------------------

// Groups whose sums are kept together: so many that all partial sums are small beside the data.
struct GroupItems {
  int64_t per_item, count;

  GroupItems(const RowGroups& groups, int64_t sums) {
    constexpr int64_t least = 32 * 1024;
    const int64_t wanted = 4 * sums > least ? 4 * sums : least;
    per_item = wanted / (groups.elements() + 1) + 1;
    count = (groups.count + per_item - 1) / per_item;
  }
};

// Calls f(group index, sums of its item) for every group, and writes the `width` totals, added in order.
template <class T, class F>
void sum_over_groups(const RowGroups& groups, int64_t width, T* totals, F&& make) {
  const GroupItems items(groups, width);
  const Buffer<double> partial(items.count * width);
  std::memset(partial.data, 0, static_cast<size_t>(items.count * width) * sizeof(double));
  parallel_for(items.count, 1, [&](int64_t begin, int64_t end) {
    auto body = make();
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item * items.per_item, last = first + items.per_item;
      for (int64_t g = first; g < last && g < groups.count; ++g) body(groups[g], partial.data + item * width);
    }
  });
  for (int64_t i = 0; i < width; ++i) {
    double sum = 0;
    for (int64_t item = 0; item < items.count; ++item) sum += partial.data[item * width + i];
    store_one(totals + i, static_cast<Compute<T>>(sum));
  }
}

// Calls a fresh body(group) for each range of groups.
template <class F>
void over_groups(const RowGroups& groups, F&& make) {
  parallel_for(groups.count, groups.grain(), [&](int64_t begin, int64_t end) {
    auto body = make();
    for (int64_t g = begin; g < end; ++g) body(groups[g]);
  });
}

// sums[c] += Σ over the rows of the group; elements is padded as Scratch is.
template <class C>
void add_column_sums(const Group& group, const C* elements, double* sums) {
  for (int64_t c = 0; c < group.cols; c += lanes<C>) {
    Vec<C> even = {}, odd = {};
    int64_t r = 0;
    for (; r + 2 <= group.rows; r += 2) {
      even += load(elements + r * group.cols + c);
      odd += load(elements + (r + 1) * group.cols + c);
    }
    if (r < group.rows) even += load(elements + r * group.cols + c);
    const Vec<C> sum = even + odd;
    for (int64_t i = 0; i < lanes<C> && c + i < group.cols; ++i) sums[c + i] += sum[i];
  }
}

}  // namespace
}  // namespace isthmus::ISTHMUS_LEVEL
