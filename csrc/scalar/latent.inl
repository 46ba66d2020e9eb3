// One scalar codebook for each dimension: the nearest value by a scan, and the decoding of indices by table. Gradients
// of values are sums over the rows that chose them: each item of work adds up its own, and these are added in order.

#pragma once

#include "scalar/digits.inl"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

// ---- nearest value -------------------------------------------------------------------------------------------------

template <class T>
class LatentRows {
 public:
  using C = Compute<T>;
  using V = Vec<C>;

  LatentRows(const Latent& args, const RowGroups& groups) : table_(size_of(args, groups)) {
    const T* values = static_cast<const T*>(args.codebooks);
    for (int64_t d = 0; d < groups.cols; values += args.levels.size[d++]) {
      for (int64_t l = 0; l < most_; ++l) {
        const C value = l < args.levels.size[d] ? load_one(values + l) : C(__builtin_inf());  // never nearest
        for (int64_t r = 0; r < groups.rows_per_group; ++r) table_.data[l * stride_ + r * groups.cols + d] = value;
      }
    }
  }

  struct Choice {
    V value;
    Mask<C> digit;
  };

  ISTHMUS_INLINE Choice nearest(int64_t j, V x) const {
    const C* table = table_.data + j;
    Choice best{load(table), {}};
    V distance = abs(x - best.value);
    for (int64_t l = 1; l < most_; ++l) {
      const V value = load(table + l * stride_), other = abs(x - value);
      const Mask<C> nearer = other < distance;
      distance = nearer ? other : distance;
      best.value = nearer ? value : best.value;
      best.digit = nearer ? Mask<C>{} + static_cast<Digit<C>>(l) : best.digit;
    }
    return best;
  }

 private:
  int64_t size_of(const Latent& args, const RowGroups& groups) {
    for (int d = 0; d < args.levels.dims; ++d) most_ = args.levels.size[d] > most_ ? args.levels.size[d] : most_;
    stride_ = groups.elements() / lanes<C> * lanes<C> + lanes<C>;
    return most_ * stride_;
  }

  int64_t most_ = 0, stride_ = 0;
  Buffer<C> table_;
};

void latent_quantize(const LatentQuantize& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    using C = Compute<T>;
    using V = Vec<C>;
    const RowGroups groups(args.rows, args.levels.dims);
    const LatentRows<T> rows(args, groups);
    T* quantized = static_cast<T*>(args.quantized);
    C* error = static_cast<C*>(args.error);
    over_groups(groups, [&] {
      return [&, indices = RowIndices<C>(args.levels, groups),
              terms = Scratch<C, 1>(groups.elements())](const Group& group) mutable {
        const T* x = static_cast<const T*>(args.x) + group.first();
        for_vectors<C>(group.count(), [&](int64_t j, int64_t left) {
          const V v = load_first(x + j, left);
          const auto [value, digit] = rows.nearest(j, v);
          const V off = v - value;
          store_first(quantized + group.first() + j, v == v ? value : v, left);
          store(terms[0] + j, off * off);
          indices.put(j, __builtin_convertvector(digit, V));
        });
        indices.write(group, args.indices);
        sum_rows(group, terms[0], error + group.row);
        const Group single{group.row, group.rows, 1};
        fill_masked(args.mask, group, quantized, T{});
        fill_masked(args.mask, single, args.indices, int64_t(-1));
        fill_masked(args.mask, single, error, C(0));
      };
    });
  });
}

// sums[entries before the column + digit] += values, for each element of a group in working memory.
template <class C>
void add_by_digit(const Group& group, const Levels& levels, const Digit<C>* digits, const C* values, double* sums) {
  int64_t i = 0;
  for (int64_t r = 0; r < group.rows; ++r) {
    double* column = sums;
    for (int64_t c = 0; c < group.cols; column += levels.size[c++], ++i) column[digits[i]] += values[i];
  }
}

void latent_backward(const LatentBackward& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    using C = Compute<T>;
    using V = Vec<C>;
    const RowGroups groups(args.rows, args.levels.dims);
    const LatentRows<T> rows(args, groups);
    const C to_x = static_cast<C>(2 * args.commitment_weight);
    T* grad_x = static_cast<T*>(args.grad_x);
    const auto body = [&] {
      return [&, digits = Scratch<Digit<C>, 1>(groups.elements()), scratch = Scratch<C, 2>(groups.elements())](
                 const Group& group, double* sums) {
        const T* x = static_cast<const T*>(args.x) + group.first();
        const T* grad = static_cast<const T*>(args.grad_quantized) + group.first();
        const PerRow<C> grad_error(group, static_cast<const C*>(args.grad_error) + group.row, scratch[0]);
        for_vectors<C>(group.count(), [&](int64_t j, int64_t left) {
          const V v = load_first(x + j, left);
          const auto [value, digit] = rows.nearest(j, v);
          const V pull = grad_error.at(j) * (v - value);
          store_first(grad_x + group.first() + j, load_first(grad + j, left) + to_x * pull, left);
          store(scratch[1] + j, C(-2) * pull);
          std::memcpy(digits[0] + j, &digit, sizeof digit);
        });
        fill_masked(args.mask, group, grad_x, T{});
        if (sums == nullptr) return;
        clear_masked(args.mask, group, scratch[1]);
        add_by_digit<C>(group, args.levels, digits[0], scratch[1], sums);
      };
    };
    if (args.grad_codebooks != nullptr) {
      sum_over_groups(groups, args.levels.total(), static_cast<T*>(args.grad_codebooks), body);
    } else {
      over_groups(groups, [&] { return [inner = body()](const Group& group) mutable { inner(group, nullptr); }; });
    }
  });
}

// ---- indices to values ---------------------------------------------------------------------------------------------

void latent_decode(const LatentDecode& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    const Starts starts(args.levels);
    const T* codebooks = static_cast<const T*>(args.codebooks);
    decode_rows(args.rows, args.levels, false, args.indices, static_cast<T*>(args.out),
                [&](int d, int64_t digit) { return codebooks[starts.of[d] + digit]; });
  });
}

void latent_decode_backward(const LatentDecodeBackward& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    const Digits digits(args.levels, false);
    const Starts starts(args.levels);
    const T* grad = static_cast<const T*>(args.grad);
    const RowGroups groups(args.rows, args.levels.dims);
    sum_over_groups(groups, args.levels.total(), static_cast<T*>(args.grad_codebooks), [&] {
      return [&](const Group& group, double* sums) {
        for (int64_t row = group.row; row < group.row + group.rows; ++row) {
          if (args.indices[row] < 0) continue;
          digits.each(args.indices[row], [&](int d, int64_t digit) {
            sums[starts.of[d] + digit] += load_one(grad + row * group.cols + d);
          });
        }
      };
    });
  });
}

}  // namespace
}  // namespace isthmus::ISTHMUS_LEVEL
