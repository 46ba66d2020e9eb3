// One step of Adam on CUDA devices, for matrices whose rows are directions; the formula stands in kernels.h.
//
// Memory bounds it: weight, gradient and both moments are read, weight and moments written, 7 streams. Where a row
// matters as a whole a block takes it. What needs the row twice, its product with the gradient and its new length,
// reads it again while it is in cache: the new weights are computed anew from the new moments rather than kept, so rows
// may be of any length and weights are rounded once. A row that is skipped costs the reading of its gradient.

#include "adam/kernels.h"
#include "core/packs.cuh"

namespace isthmus::cuda {
namespace {

constexpr int block_threads = 256;

// Sum over the block, in all its threads.
template <class C>
__device__ __forceinline__ C block_total(C value) {
  __shared__ C total;
  value = block_sum(value);
  if (threadIdx.x == 0) total = value;
  __syncthreads();
  return total;
}

template <class T, int N>
struct AdamStep {
  using C = Compute<T>;

  const T* grad;
  T* weight;
  C *exp_avg, *exp_avg_sq;
  C follow1, follow2, beta2, epsilon, keep, rate, spread;

  explicit AdamStep(const AdamRows& args)
      : grad(static_cast<const T*>(args.grad)),
        weight(static_cast<T*>(args.weight)),
        exp_avg(static_cast<C*>(args.exp_avg)),
        exp_avg_sq(static_cast<C*>(args.exp_avg_sq)),
        follow1(static_cast<C>(1 - args.beta1)),
        follow2(static_cast<C>(1 - args.beta2)),
        beta2(static_cast<C>(args.beta2)),
        epsilon(static_cast<C>(args.epsilon)),
        keep(static_cast<C>(args.keep)),
        rate(static_cast<C>(args.rate)),
        spread(static_cast<C>(args.spread)) {}

  __device__ __forceinline__ C moved(C w, C m, C v) const { return keep * w - rate * m / (spread * sqrt(v) + epsilon); }

  // Moves the moments of a pack with gradient g, and says where they take its weights.
  __device__ __forceinline__ void advance(int64_t at, const C (&g)[N], C (&w)[N]) const {
    C m[N], v[N];
    load(exp_avg + at, m);
    load(exp_avg_sq + at, v);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      m[j] += follow1 * (g[j] - m[j]);
      v[j] = beta2 * v[j] + follow2 * (g[j] * g[j]);
      w[j] = moved(w[j], m[j], v[j]);
    }
    store(exp_avg + at, m);
    store(exp_avg_sq + at, v);
  }
};

// Every element for itself.
template <class T, int N>
__global__ void __launch_bounds__(block_threads) elements_kernel(AdamStep<T, N> step, int64_t count, bool skip_zeros) {
  using C = Compute<T>;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x) * N;
  if (at >= count) return;
  C g[N], w[N];
  load(step.grad + at, g);
  if (skip_zeros && g[0] == 0) return;  // N is 1 then
  load(step.weight + at, w);
  step.advance(at, g, w);
  store(step.weight + at, w);
}

// A block takes a row.
template <class T, int N>
struct RowStep {
  using C = Compute<T>;
  const AdamStep<T, N>& step;
  const int64_t first, cols;

  // Calls f(place) for this thread's packs of the row.
  template <class F>
  __device__ __forceinline__ void each_pack(F&& f) const {
    for (int64_t col = threadIdx.x * N; col < cols; col += static_cast<int64_t>(blockDim.x) * N) f(first + col);
  }

  __device__ __forceinline__ bool has_gradient() const {
    bool found = false;
    each_pack([&](int64_t at) {
      C g[N];
      load(step.grad + at, g);
#pragma unroll
      for (int j = 0; j < N; ++j) found |= g[j] != 0;
    });
    return __syncthreads_or(found);
  }

  // How much of the row is in its gradient.
  __device__ __forceinline__ C part_along() const {
    C products = 0, squares = 0;
    each_pack([&](int64_t at) {
      C g[N], w[N];
      load(step.grad + at, g);
      load(step.weight + at, w);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        products += g[j] * w[j];
        squares += w[j] * w[j];
      }
    });
    products = block_total(products);
    squares = block_total(squares);
    return squares > 0 ? products / squares : C(0);
  }

  __device__ __forceinline__ void move() const {
    each_pack([&](int64_t at) {
      C g[N], w[N];
      load(step.grad + at, g);
      load(step.weight + at, w);
      step.advance(at, g, w);
      store(step.weight + at, w);
    });
  }

  // A thread reads the moments that it wrote itself, and the old weights until their new length is known.
  __device__ __forceinline__ void move_on_sphere() const {
    const C along = part_along();
    C squares = 0;
    each_pack([&](int64_t at) {
      C g[N], w[N];
      load(step.grad + at, g);
      load(step.weight + at, w);
#pragma unroll
      for (int j = 0; j < N; ++j) g[j] -= along * w[j];
      step.advance(at, g, w);
#pragma unroll
      for (int j = 0; j < N; ++j) squares += w[j] * w[j];
    });
    squares = block_total(squares);
    const C scale = squares > 0 ? 1 / sqrt(squares) : C(1);
    each_pack([&](int64_t at) {
      C w[N], m[N], v[N];
      load(step.weight + at, w);
      load(step.exp_avg + at, m);
      load(step.exp_avg_sq + at, v);
#pragma unroll
      for (int j = 0; j < N; ++j) w[j] = scale * step.moved(w[j], m[j], v[j]);
      store(step.weight + at, w);
    });
  }
};

template <class T, int N>
__global__ void __launch_bounds__(block_threads)
    rows_kernel(AdamStep<T, N> step, int64_t cols, bool unit_norm, bool skip_zeros) {
  const RowStep<T, N> row{step, blockIdx.x * cols, cols};
  if (skip_zeros && !row.has_gradient()) return;
  if (unit_norm) {
    row.move_on_sphere();
  } else {
    row.move();
  }
}

}  // namespace

void adam_rows(const AdamRows& args, void* stream) {
  const bool by_rows = args.unit_norm || (args.skip_zero_rows && args.cols > 1);
  dispatch_dtype(args.dtype, [&]<class T>() {
    const int64_t count = args.rows * args.cols;
    dispatch_pack<T>(
        by_rows || args.skip_zero_rows ? args.cols : count,
        [&]<int N>() {
          const AdamStep<T, N> step(args);
          if (by_rows) {
            launch("adam_rows", rows_kernel<T, N>, args.rows, threads_for(args.cols / N, block_threads), 0, stream,
                   step, args.cols, args.unit_norm, args.skip_zero_rows);
          } else {
            launch("adam_rows", elements_kernel<T, N>, divide_up(count / N, block_threads), block_threads, 0, stream,
                   step, count, args.skip_zero_rows);
          }
        },
        args.grad, args.weight, args.exp_avg, args.exp_avg_sq);
  });
}

}  // namespace isthmus::cuda
