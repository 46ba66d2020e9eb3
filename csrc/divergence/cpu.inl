// Divergences between Gaussians on the CPU.
//
//     kl[row] = weight · Σ_cols KL(N(mean, s²) ‖ prior)
//
// One pass: forward reads each input once and writes the sums; backward reads them again and writes every gradient.
// Bound by arithmetic in cache and by memory beyond it.
//
// Narrow rows share a tile of 1024 elements: the divergence is computed over the tile as if it were one row, at full
// vector width, and the rows are summed from L1. Very wide rows are split between threads (core/tiles.h).

#include "core/dispatch.h"
#include "core/normal.h"
#include "core/parallel.h"
#include "core/tiles.h"
#include "divergence/kernels.h"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

template <class C>
struct alignas(64) Tile {
  C values[tile_elements + lanes<C>];  // the tail lets a last vector be stored whole
};

enum class Prior { standard, shared, elementwise };

// Calls f<T, S, P>() for the dtype, the scale type and the prior of `args`.
template <class Args, class F>
void dispatch(const Args& args, F&& f) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    dispatch_scale(args.scale_type, [&]<ScaleType S>() {
      if (args.prior_mean == nullptr) return f.template operator()<T, S, Prior::standard>();
      if (args.shared_prior) return f.template operator()<T, S, Prior::shared>();
      f.template operator()<T, S, Prior::elementwise>();
    });
  });
}

// What both directions read: vectors of the elements [i, i + left), or of as many as fit.
template <class T, Prior P>
struct Operands {
  using V = Vec<Compute<T>>;

  const T *mean, *scale, *prior_mean, *prior_scale;
  V shared_mean = {}, shared_scale = {};

  template <class Args>
  explicit Operands(const Args& args)
      : mean(static_cast<const T*>(args.mean)),
        scale(static_cast<const T*>(args.scale)),
        prior_mean(static_cast<const T*>(args.prior_mean)),
        prior_scale(static_cast<const T*>(args.prior_scale)) {
    if constexpr (P == Prior::shared) {
      shared_mean = splat(load_one(prior_mean));
      shared_scale = splat(load_one(prior_scale));
    }
  }

  V mean_at(int64_t i, int64_t left) const { return load_first(mean + i, left); }
  V scale_at(int64_t i, int64_t left) const { return load_first(scale + i, left); }
  V prior_mean_at(int64_t i, int64_t left) const {
    return P == Prior::shared ? shared_mean : load_first(prior_mean + i, left);
  }
  V prior_scale_at(int64_t i, int64_t left) const {
    return P == Prior::shared ? shared_scale : load_first(prior_scale + i, left);
  }
};

// ---- forward -------------------------------------------------------------------------------------------------------

template <class T, ScaleType S, Prior P>
struct Forward {
  using C = Compute<T>;
  using V = Vec<C>;

  Operands<T, P> in;
  int64_t cols;
  C weight;

  // Lanes past the end hold rubbish.
  ISTHMUS_INLINE V kl(int64_t i, int64_t left) const {
    if constexpr (P == Prior::standard) {
      V std;
      return kl_to_standard<S>(in.mean_at(i, left), in.scale_at(i, left), std);
    } else {
      return kl_to_prior<S>(in.mean_at(i, left), in.scale_at(i, left), in.prior_mean_at(i, left),
                            in.prior_scale_at(i, left));
    }
  }

  C sum_range(int64_t first, int64_t count) const {
    V sum = {};
    for (int64_t j = 0; j < count; j += lanes<C>) {
      const V element = kl(first + j, count - j);
      sum += count - j >= lanes<C> ? element : (first_lanes<C>(count - j) ? element : V{});
    }
    return weight * sum_lanes<C>(sum);
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
      store_first(elements + j, weight * kl(first + j, count - j), count - j);
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

void gaussian_kl(const GaussianKl& args) {
  dispatch(args, [&]<class T, ScaleType S, Prior P>() {
    using C = Compute<T>;
    const RowTiles tiles(args.rows, args.cols);
    const RowSums<C> sums(tiles, args.kl);
    const Forward<T, S, P> forward{Operands<T, P>(args), args.cols, static_cast<C>(args.weight)};
    parallel_for(tiles.items, tiles.grain(),
                 [&](int64_t begin, int64_t end) { forward.run(tiles, begin, end, sums.partial); });
    sums.finish();
  });
}

// ---- backward ------------------------------------------------------------------------------------------------------

template <class T, ScaleType S, Prior P>
struct Backward {
  using C = Compute<T>;
  using V = Vec<C>;

  Operands<T, P> in;
  const GaussianKlBackward& args;
  C weight = static_cast<C>(args.weight);
  const C* grad = static_cast<const C*>(args.grad);
  T* grad_mean = static_cast<T*>(args.grad_mean);
  T* grad_scale = static_cast<T*>(args.grad_scale);
  T* grad_prior_mean = static_cast<T*>(args.grad_prior_mean);
  T* grad_prior_scale = static_cast<T*>(args.grad_prior_scale);

  // The incoming gradient of each element of a tile that begins with `rows` rows, or holds a part of one.
  void spread_grad(int64_t row, int64_t rows, int64_t cols, C* tile) const {
    if (cols == 1) {
      for (int64_t r = 0; r < rows; ++r) tile[r] = weight * grad[row + r];
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const C value = weight * grad[row + r];
      for (int64_t c = 0; c < cols; ++c) tile[r * cols + c] = value;
    }
  }

  void write_gradients(int64_t first, int64_t count, const C* tile) const {
    for (int64_t j = 0; j < count; j += lanes<C>) {
      const int64_t i = first + j, left = count - j;
      const V g = load(tile + j), m = in.mean_at(i, left), sc = in.scale_at(i, left);
      KlGradient<V> kl;
      if constexpr (P == Prior::standard) {
        kl = kl_to_standard_gradient<S>(m, sc);
      } else {
        kl = kl_to_prior_gradient<S>(m, sc, in.prior_mean_at(i, left), in.prior_scale_at(i, left));
        store_first(grad_prior_mean + i, g * kl.prior_mean, left);
        store_first(grad_prior_scale + i, g * kl.prior_scale, left);
      }
      store_first(grad_mean + i, g * kl.mean, left);
      store_first(grad_scale + i, g * kl.scale, left);
    }
  }

  void run(const RowTiles& tiles, int64_t begin, int64_t end) const {
    Tile<C> tile = {};
    for (int64_t index = begin; index < end; ++index) {
      const RowTiles::Item item = tiles.item(index);
      spread_grad(item.row, item.rows, item.cols < tile_elements ? item.cols : tile_elements, tile.values);
      const int64_t first = item.row * args.cols + item.col, last = first + item.rows * item.cols;
      for (int64_t i = first; i < last; i += tile_elements) {
        write_gradients(i, last - i < tile_elements ? last - i : tile_elements, tile.values);
      }
    }
  }
};

void gaussian_kl_backward(const GaussianKlBackward& args) {
  dispatch(args, [&]<class T, ScaleType S, Prior P>() {
    const RowTiles tiles(args.rows, args.cols);
    const Backward<T, S, P> backward{Operands<T, P>(args), args};
    parallel_for(tiles.items, tiles.grain(), [&](int64_t begin, int64_t end) { backward.run(tiles, begin, end); });
  });
}

}  // namespace

extern const DivergenceKernels divergence_table;
const DivergenceKernels divergence_table = {gaussian_kl, gaussian_kl_backward};

}  // namespace isthmus::ISTHMUS_LEVEL
