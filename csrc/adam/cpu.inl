// One step of Adam on the CPU, for matrices whose rows are directions.
//
// Reads weight, gradient and both moments and writes weight and moments, each once: 7 streams, the floor. What needs a
// row as a whole, its product with the gradient and its new length, is found while the row is in cache. A row that is
// skipped costs the reading of its gradient, which ends at the first number that is not zero.

#include "adam/kernels.h"
#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "core/tiles.h"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

template <class T>
struct AdamStep {
  using C = Compute<T>;
  using V = Vec<C>;

  const AdamRows& args;
  const T* grad = static_cast<const T*>(args.grad);
  T* weight = static_cast<T*>(args.weight);
  C* exp_avg = static_cast<C*>(args.exp_avg);
  C* exp_avg_sq = static_cast<C*>(args.exp_avg_sq);
  const C follow1 = static_cast<C>(1 - args.beta1), follow2 = static_cast<C>(1 - args.beta2);
  const C beta1 = static_cast<C>(args.beta1), beta2 = static_cast<C>(args.beta2);
  const C epsilon = static_cast<C>(args.epsilon);
  const C keep = static_cast<C>(args.keep), rate = static_cast<C>(args.rate), spread = static_cast<C>(args.spread);

  void run() const {
    if (args.unit_norm || (args.skip_zero_rows && args.cols > 1)) {
      return parallel_for(args.rows, grain_of(args.cols), [&](int64_t begin, int64_t end) { rows(begin, end); });
    }
    const int64_t count = args.rows * args.cols, tiles = (count + tile_elements - 1) / tile_elements;
    parallel_for(tiles, grain_of(tile_elements), [&](int64_t begin, int64_t end) {
      elements(begin * tile_elements, end < tiles ? end * tile_elements : count);
    });
  }

  void rows(int64_t begin, int64_t end) const {
    const Buffer<C> buffer(args.cols + lanes<C>);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = row * args.cols;
      if (args.skip_zero_rows && !has_gradient(first)) continue;
      args.unit_norm ? unit_row(first, buffer.data) : elements(first, first + args.cols);
    }
  }

  bool has_gradient(int64_t first) const {
    for (int64_t k = 0; k < args.cols; k += lanes<C>) {
      if (any(load_first(grad + first + k, args.cols - k) != 0)) return true;
    }
    return false;
  }

  void elements(int64_t begin, int64_t end) const {
    const bool rows_of_one = args.skip_zero_rows && args.cols == 1;
    for (int64_t i = begin; i < end; i += lanes<C>) {
      const V g = load_first(grad + i, end - i);
      store_first(weight + i, step(i, end - i, g, rows_of_one ? g == 0 : Mask<C>{}), end - i);
    }
  }

  // The new row stands in `longer`, unrounded, until its length is known.
  void unit_row(int64_t first, C* longer) const {
    const C along = part_along(first);
    V squares = {};
    for (int64_t k = 0; k < args.cols; k += lanes<C>) {
      const int64_t left = args.cols - k;
      const V g = load_first(grad + first + k, left) - along * load_first(weight + first + k, left);
      const V w = step(first + k, left, g, Mask<C>{});
      store(longer + k, w);
      squares += w * w;
    }
    const C sum = sum_lanes<C>(squares), scale = sum > 0 ? 1 / static_cast<C>(__builtin_sqrt(sum)) : C(1);
    for (int64_t k = 0; k < args.cols; k += lanes<C>) {
      store_first(weight + first + k, scale * load(longer + k), args.cols - k);
    }
  }

  // How much of the row is in its gradient.
  C part_along(int64_t first) const {
    V products = {}, squares = {};
    for (int64_t k = 0; k < args.cols; k += lanes<C>) {
      const V g = load_first(grad + first + k, args.cols - k), w = load_first(weight + first + k, args.cols - k);
      products += g * w;
      squares += w * w;
    }
    const C square = sum_lanes<C>(squares);
    return square > 0 ? sum_lanes<C>(products) / square : C(0);
  }

  // Moves the moments of up to a vector of elements, and returns where their weights go. What stays, stays.
  ISTHMUS_INLINE V step(int64_t at, int64_t left, V g, Mask<C> stays) const {
    const V w = load_first(weight + at, left), m = load_first(exp_avg + at, left);
    const V v = load_first(exp_avg_sq + at, left);
    const V new_m = beta1 * m + follow1 * g, new_v = beta2 * v + follow2 * (g * g);
    store_first(exp_avg + at, stays ? m : new_m, left);
    store_first(exp_avg_sq + at, stays ? v : new_v, left);
    return stays ? w : keep * w - rate * new_m / (spread * sqrt(new_v) + epsilon);
  }
};

void rows(const AdamRows& args) {
  dispatch_dtype(args.dtype, [&]<class T>() { AdamStep<T>{args}.run(); });
}

}  // namespace

extern const AdamKernels adam_table;
const AdamKernels adam_table = {rows};

}  // namespace isthmus::ISTHMUS_LEVEL
