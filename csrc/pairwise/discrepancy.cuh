// Maximum mean discrepancy on CUDA; what is computed stands in discrepancy.inl.
//
// A block keeps a tile of rows of one sample and walks over the tiles of the other. Sums of kernels go on in float64
// from the end of a tile, one number for each block, added in order by one block at the end.
#pragma once

#include "pairwise/mixture.cuh"

namespace isthmus::cuda {
namespace {

template <class T>
struct Points {
  const T* matrix;
  int64_t count;
};

// ---- kernels of the squared distance -------------------------------------------------------------------------------

template <class C>
__device__ __forceinline__ C kernel_value(const KernelSum& kernel, C square) {
  C sum = 0;
  for (int h = 0; h < kernel.count; ++h) {
    const C u = static_cast<C>(kernel.factors[h]) * square;
    sum += kernel.kernel == DistanceKernel::rbf ? exp(-u) : 1 / (1 + u);
  }
  return sum;
}

// The derivative of kernel_value.
template <class C>
__device__ __forceinline__ C kernel_slope(const KernelSum& kernel, C square) {
  C sum = 0;
  for (int h = 0; h < kernel.count; ++h) {
    const C factor = static_cast<C>(kernel.factors[h]), u = factor * square, inverse = 1 / (1 + u);
    sum -= factor * (kernel.kernel == DistanceKernel::rbf ? exp(-u) : inverse * inverse);
  }
  return sum;
}

// ---- forward -------------------------------------------------------------------------------------------------------

template <class C>
struct DiscrepancyPlan {
  int64_t x_tiles, y_tiles;
  double *above_x, *above_y, *across;  // [tiles of the rows]

  DiscrepancyPlan(const Discrepancy& args, Arena& arena)
      : x_tiles(divide_up(args.x_rows, tile_size<C>)),
        y_tiles(divide_up(args.y_rows, tile_size<C>)),
        above_x(arena.take<double>(x_tiles)),
        above_y(arena.take<double>(y_tiles)),
        across(arena.take<double>(x_tiles)) {}
};

enum class Pairs { all, above_diagonal };

template <class T, Pairs Which>
__global__ void __launch_bounds__(block_threads)
    sum_pairs_kernel(KernelSum kernel, Points<T> x, Points<T> points, int64_t dim, double* sums) {
  using C = Compute<T>;
  constexpr int n = per_thread<C>;
  __shared__ ScoreSlices<C> slices;
  const int tx = threadIdx.x % block_side, ty = threadIdx.x / block_side;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * tile_size<C>;
  double total = 0;
  for (int64_t first = Which == Pairs::all ? 0 : first_row; first < points.count; first += tile_size<C>) {
    C squares[n][n];
    square_tiles<false>(MatrixRows<T>{x.matrix, first_row, x.count, dim}, MatrixRows<C>{},
                        MatrixRows<T>{points.matrix, first, points.count, dim}, slices, squares);
    C sum = 0;
#pragma unroll
    for (int r = 0; r < n; ++r) {
      const int64_t row = first_row + place<C>(ty, r);
#pragma unroll
      for (int c = 0; c < n; ++c) {
        const int64_t column = first + place<C>(tx, c);
        const bool counts = row < x.count && column < points.count && (Which == Pairs::all || column > row);
        if (counts) sum += kernel_value(kernel, squares[r][c]);
      }
    }
    total += static_cast<double>(sum);
  }
  total = block_sum(total);
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

template <class T, Pairs Which>
void sum_pairs(const Discrepancy& args, const Points<T>& x, const Points<T>& points, double* sums, void* stream) {
  launch("discrepancy", sum_pairs_kernel<T, Which>, divide_up(x.count, tile_size<Compute<T>>), block_threads, 0, stream,
         args.kernel, x, points, args.dim, sums);
}

__device__ __forceinline__ double sum_in_order(const double* values, int64_t count) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += block_threads) sum += values[i];
  return block_sum(sum);
}

template <class C>
__global__ void __launch_bounds__(block_threads) combine_kernel(Discrepancy args, DiscrepancyPlan<C> plan) {
  const double above_x = sum_in_order(plan.above_x, plan.x_tiles), above_y = sum_in_order(plan.above_y, plan.y_tiles);
  const double across = sum_in_order(plan.across, plan.x_tiles);
  if (threadIdx.x != 0) return;
  const double sum = args.weight_x * above_x + args.weight_y * above_y - args.weight_xy * across;
  *static_cast<C*>(args.value) = static_cast<C>(2 * sum + args.diagonal);
}

// ---- backward ------------------------------------------------------------------------------------------------------

template <class C>
struct DiscrepancyBackwardPlan {
  C* sums;  // the gradient of one sample after the other

  DiscrepancyBackwardPlan(const DiscrepancyBackward& args, Arena& arena)
      : sums(arena.take<C>((args.of.x_rows > args.of.y_rows ? args.of.x_rows : args.of.y_rows) * args.of.dim)) {}
};

// sums[i] (+)= grad · weight · Σ_j k'(|x_i - p_j|²) (x_i - p_j)
template <class T>
__global__ void __launch_bounds__(block_threads)
    pull_points_kernel(KernelSum kernel, Points<T> x, Points<T> points, int64_t dim, const Compute<T>* grad,
                       Compute<T> weight, Compute<T>* sums) {
  using C = Compute<T>;
  constexpr int n = per_thread<C>;
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<BackwardShared<C>*>(memory);
  const int tx = threadIdx.x % block_side, ty = threadIdx.x / block_side;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * tile_size<C>;
  const C scale = *grad * weight;
  for (int64_t first = 0; first < points.count; first += tile_size<C>) {
    C squares[n][n];
    square_tiles<false>(MatrixRows<T>{x.matrix, first_row, x.count, dim}, MatrixRows<C>{},
                        MatrixRows<T>{points.matrix, first, points.count, dim}, shared.slices, squares);
#pragma unroll
    for (int r = 0; r < n; ++r) {
#pragma unroll
      for (int c = 0; c < n; ++c) {
        shared.weights[place<C>(ty, r) * weight_stride<C> + place<C>(tx, c)] =
            scale * kernel_slope(kernel, squares[r][c]);
      }
    }
    __syncthreads();
    const int64_t left = points.count - first;
    const int count = static_cast<int>(left < tile_size<C> ? left : tile_size<C>);
    // As in mixture.cuh, thread (ty, tx) owns the rows ty, ty + 16, … at the dimensions tx, tx + 16, ….
    for (int64_t d = tx; d < dim; d += block_side) {
      C own[n], sum[n] = {};
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const int64_t row = first_row + ty + i * block_side;
        own[i] = row < x.count ? to_compute(x.matrix[row * dim + d]) : C(0);
      }
      for (int j = 0; j < count; ++j) {
        const C point = to_compute(points.matrix[(first + j) * dim + d]);
#pragma unroll
        for (int i = 0; i < n; ++i) {
          sum[i] += shared.weights[(ty + i * block_side) * weight_stride<C> + j] * (own[i] - point);
        }
      }
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const int64_t row = first_row + ty + i * block_side;
        if (row < x.count) sums[row * dim + d] += sum[i];
      }
    }
    __syncthreads();
  }
}

// The first pull on a sample clears its sums.
template <class T, class C>
void pull_points(const Discrepancy& args, const Points<T>& x, const Points<T>& points, const C* grad, C weight,
                 bool first, C* sums, void* stream) {
  if (first) {
    const auto bytes = static_cast<size_t>(x.count * args.dim) * sizeof(C);
    check(cudaMemsetAsync(sums, 0, bytes, static_cast<cudaStream_t>(stream)), "discrepancy_backward");
  }
  launch("discrepancy_backward", pull_points_kernel<T>, divide_up(x.count, tile_size<C>), block_threads,
         sizeof(BackwardShared<C>), stream, args.kernel, x, points, args.dim, grad, weight, sums);
}

}  // namespace
}  // namespace isthmus::cuda
