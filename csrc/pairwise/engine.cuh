// The engine of engine.inl on CUDA: a block of 256 threads holds a tile of scores in registers, 128 rows by 128
// components (64 by 64 in float64), fed through shared memory as in core/product.cuh.
#pragma once

#include "core/launch.cuh"
#include "core/normal.cuh"
#include "core/product.cuh"
#include "core/sort.cuh"
#include "pairwise/kernels.h"

namespace isthmus::cuda {
namespace {

constexpr double half_log_two_pi = 0.91893853320467274178;

// ---- components ----------------------------------------------------------------------------------------------------

// 1/s, m/s and the log-density at the mean, for each component.
template <class C>
struct Components {
  int64_t count, dim;
  C *slope, *shift;  // [count, dim]
  C* density;        // [count, dim]: -log s - ½ log 2π, for the marginals; null if nobody wants it
  C* offset;         // [count]: the log-density at the mean, and the log-weight of the component

  Components(const GaussianPairs& pairs, bool marginals, Arena& arena)
      : count(pairs.components),
        dim(pairs.dim),
        slope(arena.take<C>(count * dim)),
        shift(arena.take<C>(count * dim)),
        density(marginals ? arena.take<C>(count * dim) : nullptr),
        offset(arena.take<C>(count)) {}
};

// A warp for each component.
template <class T, ScaleType S>
__global__ void __launch_bounds__(block_threads)
    components_kernel(const T* mean, const T* scale, const T* log_weight, Compute<T> uniform,
                      Components<Compute<T>> components) {
  using C = Compute<T>;
  const int64_t k = (static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x) / warp_size;
  if (k >= components.count) return;
  C log_std = 0;
  for (int64_t d = threadIdx.x % warp_size; d < components.dim; d += warp_size) {
    const int64_t i = k * components.dim + d;
    const C raw = to_compute(scale[i]), inverse = inverse_std<S>(raw), own = log_std_of<S>(raw);
    components.slope[i] = inverse;
    components.shift[i] = inverse * to_compute(mean[i]);
    if (components.density != nullptr) components.density[i] = -own - static_cast<C>(half_log_two_pi);
    log_std += own;
  }
  log_std = warp_sum(log_std);
  if (threadIdx.x % warp_size != 0) return;
  const C weight = log_weight == nullptr ? uniform : to_compute(log_weight[k]);
  components.offset[k] = weight - log_std - static_cast<C>(half_log_two_pi) * static_cast<C>(components.dim);
}

template <class T>
void fill_components(const GaussianPairs& pairs, const T* log_weight, Compute<T> uniform,
                     const Components<Compute<T>>& components, void* stream) {
  dispatch_scale(pairs.scale_type, [&]<ScaleType S>() {
    launch("components", components_kernel<T, S>, divide_up(pairs.components * warp_size, block_threads), block_threads,
           0, stream, static_cast<const T*>(pairs.mean), static_cast<const T*>(pairs.scale), log_weight, uniform,
           components);
  });
}

// ---- scores --------------------------------------------------------------------------------------------------------

// What is added to the scores of a row; see engine.inl.
template <class T>
struct RowWeights {
  using C = Compute<T>;
  C constant;
  const T* of_rows;
  int64_t cycle;
  C self, next;

  __device__ __forceinline__ C of_row(int64_t row) const {
    return of_rows == nullptr ? constant : to_compute(of_rows[row]);
  }
  // Of one pair, beside that of its row.
  __device__ __forceinline__ C of_pair(int64_t row, int64_t k) const {
    if (cycle == 0) return 0;
    return (k == row ? self : C(0)) + (k == (row + 1 == cycle ? 0 : row + 1) ? next : C(0));
  }
};

template <class T>
RowWeights<T> aggregate_weights(const AggregateWeights& weights, int64_t rows) {
  using C = Compute<T>;
  return {static_cast<C>(weights.log_other), nullptr, rows, static_cast<C>(weights.log_self - weights.log_other),
          static_cast<C>(weights.log_next - weights.log_other)};
}

template <class C>
struct ScoreSlices {
  Slice<C> z, slope, shift;
};

// sums[r][c] = Σ_d (z · slope - shift)² of row place(y, r) and component place(x, c); not `Scaled`: all slopes are 1.
// All threads of the block call it; the slices must be free on entry and are free on return.
template <bool Scaled, class C, class T, class U>
__device__ __forceinline__ void square_tiles(const MatrixRows<T>& z, const MatrixRows<C>& slope,
                                             const MatrixRows<U>& shift, ScoreSlices<C>& slices,
                                             C (&sums)[per_thread<C>][per_thread<C>]) {
  constexpr int n = per_thread<C>;
  const int x = threadIdx.x % block_side, y = threadIdx.x / block_side;
#pragma unroll
  for (int r = 0; r < n; ++r) {
#pragma unroll
    for (int c = 0; c < n; ++c) sums[r][c] = 0;
  }
  for (int64_t depth = 0; depth < z.depth; depth += depth_slice) {
    C next[n];
    Slice<C>::fetch(z, depth, y, x, next);
    slices.z.put(y, x, next);
    if constexpr (Scaled) {
      Slice<C>::fetch(slope, depth, y, x, next);
      slices.slope.put(y, x, next);
    }
    Slice<C>::fetch(shift, depth, y, x, next);
    slices.shift.put(y, x, next);
    __syncthreads();
#pragma unroll 4
    for (int k = 0; k < depth_slice; ++k) {
      C from_z[n], from_slope[n], from_shift[n];
      slices.z.read(k, y, from_z);
      if constexpr (Scaled) slices.slope.read(k, x, from_slope);
      slices.shift.read(k, x, from_shift);
#pragma unroll
      for (int r = 0; r < n; ++r) {
#pragma unroll
        for (int c = 0; c < n; ++c) {
          const C t = (Scaled ? from_z[r] * from_slope[c] : from_z[r]) - from_shift[c];
          sums[r][c] += t * t;
        }
      }
    }
    __syncthreads();
  }
}

// The scores of the tile at (first_row, first_component); -inf where a row or a component does not exist.
template <class T, class C>
__device__ __forceinline__ void score_tile(const T* z, int64_t rows, const Components<C>& components,
                                           const RowWeights<T>& weights, int64_t first_row, int64_t first_component,
                                           ScoreSlices<C>& slices, C (&scores)[per_thread<C>][per_thread<C>]) {
  constexpr int n = per_thread<C>;
  const int x = threadIdx.x % block_side, y = threadIdx.x / block_side;
  square_tiles<true>(MatrixRows<T>{z, first_row, rows, components.dim},
                     MatrixRows<C>{components.slope, first_component, components.count, components.dim},
                     MatrixRows<C>{components.shift, first_component, components.count, components.dim}, slices,
                     scores);
#pragma unroll
  for (int r = 0; r < n; ++r) {
    const int64_t row = first_row + place<C>(y, r);
    const C weight = row < rows ? weights.of_row(row) : C(0);
#pragma unroll
    for (int c = 0; c < n; ++c) {
      const int64_t k = first_component + place<C>(x, c);
      const bool exists = row < rows && k < components.count;
      scores[r][c] =
          exists ? components.offset[k] + weight + weights.of_pair(row, k) - scores[r][c] / 2 : -infinity<C>();
    }
  }
}

// log Σ exp of what was met so far; see engine.inl.
template <class C>
struct LogSum {
  C top = sizeof(C) == 4 ? C(-0x1.fffffep127) : C(-0x1.fffffffffffffp1023);
  C sum = 0;

  __device__ __forceinline__ void raise_to(C peak) {
    if (!(peak > top)) return;
    sum *= exp(top - peak);
    top = peak;
  }
  __device__ __forceinline__ void merge(const LogSum& other) {
    raise_to(other.top);
    sum += other.sum * exp(other.top - top);
  }
  // value(0), …, value(N - 1) with one rescaling at most.
  template <int N, class Value>
  __device__ __forceinline__ void meet(Value&& value) {
    C peak = top;
#pragma unroll
    for (int i = 0; i < N; ++i) peak = value(i) > peak ? value(i) : peak;
    raise_to(peak);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += exp(value(i) - top);
  }
  __device__ __forceinline__ C value() const { return top + log(sum); }
};

// r = grad · exp(score - log Σ exp); 0 where the sum was over nothing but -inf.
template <class C>
__device__ __forceinline__ C responsibility(C score, C peak, C log_sum, C grad) {
  return grad * exp(score - peak - (log_sum == -infinity<C>() ? C(0) : log_sum));
}

}  // namespace
}  // namespace isthmus::cuda
