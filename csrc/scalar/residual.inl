// Residual finite scalar quantization: a number stays in a register through all of its stages, and each stage leaves
// nothing behind but a digit. Bound by the rounding of each stage; Q calls of fsq_quantize are bound by memory.

#pragma once

#include "scalar/fsq.inl"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

template <class T>
class ResidualFsqRows {
 public:
  using C = Compute<T>;
  using V = Vec<C>;

  ResidualFsqRows(const ResidualFsq& args, const RowGroups& groups)
      : x_(static_cast<const T*>(args.x)), hard_clamp_(args.hard_clamp), columns_(groups) {
    const int64_t* size = args.levels.size;
    columns_.set(bound, [&](int64_t c) { return 1 + 1 / (static_cast<double>(size[c]) - 1); });
    columns_.set(half, [&](int64_t c) { return (static_cast<double>(size[c]) - 1) / 2; });
    columns_.set(unit, [&](int64_t c) { return 2 / (static_cast<double>(size[c]) - 1); });
    columns_.set(offset, [&](int64_t c) { return size[c] % 2 == 0 ? 0.5 : 0; });
    columns_.set(lowest, [&](int64_t c) { return -(size[c] / 2); });
    columns_.set(highest, [&](int64_t c) { return size[c] - 1 - size[c] / 2; });
    columns_.set(levels, [&](int64_t c) { return size[c]; });
  }

  // Calls visit(stage, digit, value to add) for all stages of the elements from j on.
  template <class F>
  ISTHMUS_INLINE void each_stage(const Group& group, int64_t j, int64_t count, int64_t stages, F&& visit) const {
    const V low = columns_.at(lowest, j), high = columns_.at(highest, j), size = columns_.at(levels, j);
    const V centre = columns_.at(offset, j), width = columns_.at(half, j), step = columns_.at(unit, j);
    const V narrower = C(1) / size;
    V left = bounded(group, j, count), scale = splat(C(1));
    for (int64_t stage = 0; stage < stages; ++stage) {
      V rounded = round_even(width * left - centre);
      rounded = rounded > high ? high : (rounded < low ? low : rounded);
      // No division: each step of this chain waits for the one before it.
      const V value = (rounded + centre) * step, digit = rounded - low;
      visit(stage, digit == digit ? digit : V{}, value * scale);
      left = (left - value) * size;
      scale *= narrower;
    }
  }

  ISTHMUS_INLINE V slope(const Group& group, int64_t j, int64_t left) const {
    const V x = load_first(x_ + group.first() + j, left), most = columns_.at(bound, j);
    if (hard_clamp_) return (x >= -most) & (x <= most) ? splat(C(1)) : V{};
    const V s = tanh(x / most);
    return C(1) - s * s;
  }

 private:
  // b · s(x / b); a clamp hands on x itself, exactly.
  ISTHMUS_INLINE V bounded(const Group& group, int64_t j, int64_t left) const {
    const V x = load_first(x_ + group.first() + j, left), most = columns_.at(bound, j);
    if (hard_clamp_) return x > most ? most : (x < -most ? -most : x);
    return most * tanh(x / most);
  }

  enum { bound, half, unit, offset, lowest, highest, levels, count_ };

  const T* x_;
  bool hard_clamp_;
  Columns<C, count_> columns_;
};

void residual_fsq_quantize(const ResidualFsqQuantize& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    using C = Compute<T>;
    using V = Vec<C>;
    const RowGroups groups(args.rows, args.levels.dims);
    const ResidualFsqRows<T> rows(args, groups);
    T* quantized = static_cast<T*>(args.quantized);
    over_groups(groups, [&] {
      return [&, indices = RowIndices<C>(args.levels, groups, args.stages),
              kept = Scratch<C, 1>(args.kept == nullptr ? 0 : groups.rows_per_group),
              table = Scratch<C, 1>(args.kept == nullptr ? 0 : groups.elements())](const Group& group) mutable {
        PerRow<C> stages;
        stages.single = splat(static_cast<C>(args.stages));
        if (args.kept != nullptr) {
          for (int64_t r = 0; r < group.rows; ++r) kept[0][r] = static_cast<C>(args.kept[group.row + r]);
          stages = PerRow<C>(group, kept[0], table[0]);
        }
        for_vectors<C>(group.count(), [&](int64_t j, int64_t left) {
          V total = {};
          const V has = stages.at(j);
          rows.each_stage(group, j, left, args.stages, [&](int64_t stage, V digit, V value) {
            total += has > static_cast<C>(stage) ? value : V{};
            indices.put(j, digit, stage);
          });
          store_first(quantized + group.first() + j, total, left);
        });
        indices.write(group, args.indices);
        if (args.kept == nullptr) return;
        for (int64_t row = group.row; row < group.row + group.rows; ++row) {
          for (int64_t q = args.kept[row]; q < args.stages; ++q) args.indices[row * args.stages + q] = -1;
        }
      };
    });
  });
}

void residual_fsq_backward(const ResidualFsqBackward& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    using C = Compute<T>;
    const RowGroups groups(args.rows, args.levels.dims);
    const ResidualFsqRows<T> rows(args, groups);
    const T* grad = static_cast<const T*>(args.grad);
    T* grad_x = static_cast<T*>(args.grad_x);
    over_groups(groups, [&] {
      return [&](const Group& group) {
        const T* g = grad + group.first();
        for_vectors<C>(group.count(), [&](int64_t j, int64_t left) {
          store_first(grad_x + group.first() + j, rows.slope(group, j, left) * load_first(g + j, left), left);
        });
        for (int64_t r = group.row; args.kept != nullptr && r < group.row + group.rows; ++r) {
          for (int64_t c = 0; args.kept[r] == 0 && c < group.cols; ++c) grad_x[r * group.cols + c] = T{};
        }
      };
    });
  });
}

}  // namespace
}  // namespace isthmus::ISTHMUS_LEVEL
