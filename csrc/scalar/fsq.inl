// Finite scalar quantization: forward reads x once and writes values and indices; backward reads x and the gradient and
// writes one. A tanh is the arithmetic; digits go to the indices through L1.

#pragma once

#include "core/math.h"
#include "scalar/digits.inl"
#include "scalar/noise.h"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

ISTHMUS_INLINE f32v round_even(f32v x) { return round_to_integer(x).value; }
ISTHMUS_INLINE f64v round_even(f64v x) { return (x + 0x1.8p52) - 0x1.8p52; }

template <class T, bool HardClamp>
class FsqRows {
 public:
  using C = Compute<T>;
  using V = Vec<C>;

  FsqRows(const Fsq& args_, const RowGroups& groups) : args(args_), columns_(groups) {
    const Grid* grid = args.grid;
    columns_.set(0, [&](int64_t c) { return grid[c].shift; });
    columns_.set(1, [&](int64_t c) { return grid[c].half; });
    columns_.set(2, [&](int64_t c) { return grid[c].offset; });
    columns_.set(3, [&](int64_t c) { return grid[c].centre; });
    columns_.set(4, [&](int64_t c) { return grid[c].width; });
    columns_.set(5, [&](int64_t c) { return static_cast<double>(args.levels.size[c] / 2); });
  }

  const Fsq& args;

  const T* x(const Group& group) const { return static_cast<const T*>(args.x) + group.first(); }

  ISTHMUS_INLINE V bounded(int64_t j, V x) const {
    const V t = x + columns_.at(0, j);
    if constexpr (HardClamp) {
      return columns_.at(1, j) * (t > C(1) ? splat(C(1)) : (t < C(-1) ? splat(C(-1)) : t)) - columns_.at(2, j);
    } else {
      return columns_.at(1, j) * tanh(t) - columns_.at(2, j);
    }
  }

  ISTHMUS_INLINE V value(int64_t j, V u) const { return (u + columns_.at(3, j)) / columns_.at(4, j); }

  ISTHMUS_INLINE V digit(int64_t j, V rounded) const {
    const V digit = rounded + columns_.at(5, j);
    return digit == digit ? digit : V{};
  }

  // d value / dx
  ISTHMUS_INLINE V slope(int64_t j, V x) const {
    const V t = x + columns_.at(0, j), steepest = columns_.at(1, j) / columns_.at(4, j);
    if constexpr (HardClamp) {
      return (t >= C(-1)) & (t <= C(1)) ? steepest : V{};
    } else {
      const V s = tanh(t);
      return steepest * (C(1) - s * s);
    }
  }

 private:
  Columns<C, 6> columns_;
};

template <class F>
void dispatch_fsq(const Fsq& args, F&& f) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    const RowGroups groups(args.rows, args.levels.dims);
    if (args.hard_clamp) {
      f(groups, FsqRows<T, true>(args, groups), static_cast<T*>(nullptr));
    } else {
      f(groups, FsqRows<T, false>(args, groups), static_cast<T*>(nullptr));
    }
  });
}

void fsq_quantize(const FsqQuantize& args) {
  dispatch_fsq(args, [&]<class T>(const RowGroups& groups, const auto& rows, T*) {
    using C = Compute<T>;
    using V = Vec<C>;
    const C dropout = static_cast<C>(args.noise_dropout), inverse = static_cast<C>(1 / args.noise_dropout);
    T* quantized = static_cast<T*>(args.quantized);
    over_groups(groups, [&] {
      return [&, indices = RowIndices<C>(args.levels, groups),
              noise = Scratch<C, 1>(args.key == nullptr ? 0 : groups.elements())](const Group& group) mutable {
        const T* x = rows.x(group);
        if (args.key != nullptr) fill_uniform(Key(args.key), group.first(), group.count(), noise[0]);
        for_vectors<C>(group.count(), [&](int64_t j, int64_t left) {
          const V u = rows.bounded(j, load_first(x + j, left)), rounded = round_even(u);
          V value = rounded;
          if (args.key != nullptr) {
            const V word = load(noise[0] + j);
            value = word <= dropout ? u + (word * inverse - C(0.5)) : rounded;
          }
          store_first(quantized + group.first() + j, rows.value(j, value), left);
          indices.put(j, rows.digit(j, rounded));
        });
        indices.write(group, args.indices);
        fill_masked(args.mask, group, quantized, T{});
        fill_masked(args.mask, {group.row, group.rows, 1}, args.indices, int64_t(-1));
      };
    });
  });
}

void fsq_backward(const FsqBackward& args) {
  dispatch_fsq(args, [&]<class T>(const RowGroups& groups, const auto& rows, T*) {
    using C = Compute<T>;
    const T* grad = static_cast<const T*>(args.grad);
    T* grad_x = static_cast<T*>(args.grad_x);
    over_groups(groups, [&] {
      return [&](const Group& group) {
        const T *x = rows.x(group), *g = grad + group.first();
        for_vectors<C>(group.count(), [&](int64_t j, int64_t left) {
          const Vec<C> slope = rows.slope(j, load_first(x + j, left));
          store_first(grad_x + group.first() + j, slope * load_first(g + j, left), left);
        });
        fill_masked(args.mask, group, grad_x, T{});
      };
    });
  });
}

// Every value that can occur, by digit, then one look-up a number.
void fsq_decode(const FsqDecode& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    using C = Compute<T>;
    const Starts starts(args.levels);
    const Buffer<T> table(args.levels.total());
    for (int d = 0; d < args.levels.dims; ++d) {
      const Grid& grid = args.grid[d];
      for (int64_t l = 0; l < args.levels.size[d]; ++l) {
        const C rounded = static_cast<C>(l - args.levels.size[d] / 2);
        const C value = (rounded + static_cast<C>(grid.centre)) / static_cast<C>(grid.width);
        store_one(table.data + starts.of[d] + l, static_cast<C>(args.scale) * value);
      }
    }
    decode_rows(args.rows, args.levels, args.first_highest, args.indices, static_cast<T*>(args.out),
                [&](int d, int64_t digit) { return table.data[starts.of[d] + digit]; });
  });
}

}  // namespace
}  // namespace isthmus::ISTHMUS_LEVEL
