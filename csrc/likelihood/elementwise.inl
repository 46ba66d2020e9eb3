// Row sums of a density that is evaluated element by element, and its gradients.
//
// One pass: forward reads each argument once and writes the sums; backward reads them again and writes every gradient
// that is asked for. An argument of one element stays one element: it sits in a register, and its gradient is summed
// per work item and then in item order.
//
// Narrow rows share a tile (core/tiles.h): the density is evaluated over the tile as if it were one row, at full
// vector width, and the rows are summed from L1. Very wide rows are split between threads (core/tiles.h).
//
// A Density has the number of its arguments and of those with gradients; whether its scale is shared, so that what
// depends on the scale alone leaves the loop; nll(in) and gradient(in, out), on arrays of vectors.

#include "core/access.h"
#include "core/buffer.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "core/tiles.h"
#include "likelihood/kernels.h"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

template <class T, class Density>
struct Arguments {
  using C = Compute<T>;
  using V = Vec<C>;
  static constexpr int count = Density::arguments;

  const T* elements[count];  // null: shared
  V shared[count];

  explicit Arguments(const Argument* in) {
    for (int k = 0; k < count; ++k) {
      const bool one = in[k].shared || in[k].data == nullptr;
      elements[k] = one ? nullptr : static_cast<const T*>(in[k].data);
      shared[k] = splat(one && in[k].data != nullptr ? *static_cast<const C*>(in[k].data) : C(1));
    }
  }

  // Vectors of the elements [i, i + left), or of as many as fit.
  ISTHMUS_INLINE void load_at(int64_t i, int64_t left, V (&in)[count]) const {
    for (int k = 0; k < count; ++k) {
      const bool one = k == scale_argument ? Density::shared_scale : elements[k] == nullptr;
      in[k] = one ? shared[k] : load_first(elements[k] + i, left);
    }
  }
};

// ---- forward -------------------------------------------------------------------------------------------------------

template <class T, class Density>
struct NllForward {
  using C = Compute<T>;
  using V = Vec<C>;

  Density density;
  Arguments<T, Density> arguments;
  int64_t cols;
  C weight;

  // Lanes past the end hold rubbish.
  ISTHMUS_INLINE V nll(int64_t i, int64_t left) const {
    V in[Density::arguments];
    arguments.load_at(i, left, in);
    return density.nll(in);
  }

  C sum_tile(int64_t first, int64_t count) const {
    V sum = {};
    int64_t j = 0;
    for (; j + lanes<C> <= count; j += lanes<C>) sum += nll(first + j, lanes<C>);
    if (j < count) sum += first_lanes<C>(count - j) ? nll(first + j, count - j) : V{};
    return sum_lanes<C>(sum);
  }

  // Tiles are added in float64: a long sum must not cost digits.
  C sum_range(int64_t first, int64_t count) const {
    double sum = 0;
    for (int64_t j = 0; j < count; j += tile_elements) {
      sum += sum_tile(first + j, count - j < tile_elements ? count - j : tile_elements);
    }
    return weight * static_cast<C>(sum);
  }

  C sum_tile_row(const C* elements) const {
    if (cols < lanes<C>) {
      C sum = 0;
      for (int64_t c = 0; c < cols; ++c) sum += elements[c];
      return sum;
    }
    V sum = {};
    for (int64_t c = 0; c < cols; c += lanes<C>) sum += load_first(elements + c, cols - c);
    return sum_lanes<C>(sum);
  }

  void sum_narrow_rows(int64_t row, int64_t rows, C* sums) const {
    Tile<C> tile;
    const int64_t first = row * cols, count = rows * cols;
    C* elements = cols == 1 ? sums + row : tile.values;
    for (int64_t j = 0; j < count; j += lanes<C>) {
      store_first(elements + j, weight * nll(first + j, count - j), count - j);
    }
    if (cols == 1) return;
    for (int64_t r = 0; r < rows; ++r) sums[row + r] = sum_tile_row(elements + r * cols);
  }

  // partial: [rows, chunks_per_row]
  void run(const RowTiles& tiles, int64_t begin, int64_t end, C* partial) const {
    for (int64_t index = begin; index < end; ++index) {
      const RowTiles::Item item = tiles.item(index);
      if (tiles.rows_per_item > 1) {
        sum_narrow_rows(item.row, item.rows, partial);
      } else {
        partial[index] = sum_range(item.row * cols + item.col, item.cols);
      }
    }
  }
};

// sums[i] = Σ_j partial[i, j], in order and in float64.
template <class C>
inline void sum_partial(const C* partial, int64_t count, int64_t parts, C* sums) {
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < parts; ++j) sum += partial[i * parts + j];
    sums[i] = static_cast<C>(sum);
  }
}

template <class T, class Density>
void sum_nll(const Nll& args, const Density& density) {
  using C = Compute<T>;
  const RowTiles tiles(args.rows, args.cols);
  const bool split = tiles.chunks_per_row > 1;
  const Buffer<C> parts(split ? tiles.items : 0);
  C* sums = static_cast<C*>(args.nll);
  C* partial = split ? parts.data : sums;
  const NllForward<T, Density> forward{density, Arguments<T, Density>(args.in), args.cols, static_cast<C>(args.weight)};
  parallel_for(tiles.items, tiles.grain(),
               [&](int64_t begin, int64_t end) { forward.run(tiles, begin, end, partial); });
  if (split) sum_partial(partial, tiles.rows, tiles.chunks_per_row, sums);
}

// ---- backward ------------------------------------------------------------------------------------------------------

template <class T, class Density>
struct NllGradients {
  using C = Compute<T>;
  using V = Vec<C>;
  static constexpr int count = Density::gradients;

  Density density;
  Arguments<T, Density> arguments;
  const NllBackward& args;
  C weight;
  const C* grad;
  T* elements[count];  // null: shared, or not wanted

  NllGradients(const Density& density_, const NllBackward& args_)
      : density(density_),
        arguments(args_.in),
        args(args_),
        weight(static_cast<C>(args.weight)),
        grad(static_cast<const C*>(args.grad)) {
    for (int k = 0; k < count; ++k) {
      elements[k] = arguments.elements[k] == nullptr ? nullptr : static_cast<T*>(args.out[k]);
    }
  }

  // The incoming gradient of each element of a tile that begins with `rows` rows, or holds a part of one.
  void spread_grad(int64_t row, int64_t rows, int64_t cols, C* tile) const {
    for (int64_t r = 0; r < rows; ++r) {
      const C value = weight * grad[row + r];
      for (int64_t c = 0; c < cols; ++c) tile[r * cols + c] = value;
    }
  }

  // A tile of gradients; those of shared arguments are added to `totals`.
  void write(int64_t first, int64_t elements_left, const C* tile, double (&totals)[count]) const {
    V sums[count] = {};
    for (int64_t j = 0; j < elements_left; j += lanes<C>) {
      const int64_t i = first + j, left = elements_left - j;
      const V g = load(tile + j);
      V in[Density::arguments], out[count];
      arguments.load_at(i, left, in);
      density.gradient(in, out);
      for (int k = 0; k < count; ++k) {
        const V slope = g * out[k];
        if (elements[k] != nullptr) store_first(elements[k] + i, slope, left);
        if (arguments.elements[k] == nullptr) {
          sums[k] += left >= lanes<C> ? slope : (first_lanes<C>(left) ? slope : V{});
        }
      }
    }
    for (int k = 0; k < count; ++k) totals[k] += sum_lanes<C>(sums[k]);
  }

  // shared_sums: [gradients, items]
  void run(const RowTiles& tiles, int64_t begin, int64_t end, C* shared_sums) const {
    Tile<C> tile = {};
    for (int64_t index = begin; index < end; ++index) {
      const RowTiles::Item item = tiles.item(index);
      spread_grad(item.row, item.rows, item.cols < tile_elements ? item.cols : tile_elements, tile.values);
      const int64_t first = item.row * args.cols + item.col, last = first + item.rows * item.cols;
      double totals[count] = {};
      for (int64_t i = first; i < last; i += tile_elements) {
        write(i, last - i < tile_elements ? last - i : tile_elements, tile.values, totals);
      }
      for (int k = 0; k < count; ++k) shared_sums[k * tiles.items + index] = static_cast<C>(totals[k]);
    }
  }
};

template <class T, class Density>
void write_nll_gradients(const NllBackward& args, const Density& density) {
  using C = Compute<T>;
  const RowTiles tiles(args.rows, args.cols);
  const NllGradients<T, Density> gradients(density, args);
  const Buffer<C> shared_sums(Density::gradients * tiles.items);
  parallel_for(tiles.items, tiles.grain(),
               [&](int64_t begin, int64_t end) { gradients.run(tiles, begin, end, shared_sums.data); });
  for (int k = 0; k < Density::gradients; ++k) {
    if (gradients.arguments.elements[k] != nullptr || args.out[k] == nullptr) continue;
    sum_partial(shared_sums.data + k * tiles.items, 1, tiles.items, static_cast<C*>(args.out[k]));
  }
}

}  // namespace
}  // namespace isthmus::ISTHMUS_LEVEL
