// The engine of engine.inl on CUDA: a block of 256 threads holds a tile of logits in registers, 128 rows by 128 codes
// (64 by 64 in float64), from the product of core/product.cuh. Vectors become points once, in the compute type.
#pragma once

#include "assignment/kernels.h"
#include "core/gumbel.cuh"
#include "core/launch.cuh"
#include "core/product.cuh"
#include "core/sort.cuh"

namespace isthmus::cuda {
namespace {

// How many parts of a size there are.
__host__ __device__ __forceinline__ int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Which rows are left out.
struct Hidden {
  const bool* mask;
  const int64_t* indices;
  __device__ __forceinline__ bool operator()(int64_t row) const {
    return (mask != nullptr && !mask[row]) || (indices != nullptr && indices[row] < 0);
  }
};

// ---- points --------------------------------------------------------------------------------------------------------

// Vectors as points whose products are scores: rows and codes are numbered over all heads.
template <class C>
struct Points {
  C* vectors;  // [heads · count, dim]
  C* norms;    // [heads · count]: vector = origin + norm · point
};

// What kernels know of a problem.
template <class C>
struct Problem {
  int64_t heads, rows, codes, dim;
  bool unit, euclidean;
  C slope, curvature;  // logit = slope · u·v + curvature |v|²
  C factor;            // of the noise
  const int64_t* key;
  Hidden hidden;
  Points<C> x, codebook;
  C* origin;   // [heads, dim]: the mean code where only differences count, else zeros
  C* offsets;  // [heads · codes]

  Problem(const Assignment& args, const int64_t* indices, const Gumbel& gumbel, Arena& arena)
      : heads(args.heads),
        rows(args.rows),
        codes(args.codes),
        dim(args.dim),
        unit(args.metric == Metric::cosine),
        euclidean(args.metric == Metric::euclidean),
        slope(static_cast<C>((euclidean ? 2 : 1) / (args.temperature * gumbel.relaxation))),
        curvature(euclidean ? static_cast<C>(-1 / (args.temperature * gumbel.relaxation)) : C(0)),
        factor(static_cast<C>(1 / gumbel.relaxation)),
        key(gumbel.key),
        hidden{args.mask, indices},
        x{arena.take<C>(heads * rows * dim), arena.take<C>(heads * rows)},
        codebook{arena.take<C>(heads * codes * dim), arena.take<C>(heads * codes)},
        origin(arena.take<C>(heads * dim)),
        offsets(arena.take<C>(heads * codes)) {}
};

constexpr Gumbel no_noise = {nullptr, 1};

constexpr int origin_columns = 32, origin_runs = block_threads / origin_columns;

// The mean code of each head: a block for 32 dimensions, in which each thread adds every eighth code.
template <class T, class C>
__global__ void __launch_bounds__(block_threads) origin_kernel(const T* codebook, Problem<C> problem) {
  __shared__ C sums[origin_runs][origin_columns];
  const int column = threadIdx.x % origin_columns, run = threadIdx.x / origin_columns;
  const int64_t blocks = parts_of(problem.dim, origin_columns), head = blockIdx.x / blocks;
  const int64_t d = blockIdx.x % blocks * origin_columns + column;
  C sum = 0;
  if (problem.euclidean && d < problem.dim) {
    for (int64_t k = run; k < problem.codes; k += origin_runs) {
      sum += to_compute(codebook[(head * problem.codes + k) * problem.dim + d]);
    }
  }
  sums[run][column] = sum;
  __syncthreads();
  if (run != 0 || d >= problem.dim) return;
  for (int i = 1; i < origin_runs; ++i) sum += sums[i][column];
  const C mean = sum / static_cast<C>(problem.codes);
  problem.origin[head * problem.dim + d] = mean - mean == 0 ? mean : C(0);  // one bad code must not spoil the others
}

enum class Side { rows, codes };

// A warp for each vector.
template <class T, Side S, class C>
__global__ void __launch_bounds__(block_threads) place_kernel(const T* vectors, Problem<C> problem) {
  const int64_t per_head = S == Side::rows ? problem.rows : problem.codes;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x) / warp_size;
  if (i >= problem.heads * per_head) return;
  if (S == Side::rows && problem.hidden.indices != nullptr) check_index(problem.hidden.indices[i], -1, problem.codes);
  const int64_t dim = problem.dim;
  const int lane = threadIdx.x % warp_size;
  const bool absent = S == Side::rows && problem.hidden(i);
  const Points<C>& points = S == Side::rows ? problem.x : problem.codebook;
  const C* origin = problem.origin + i / per_head * dim;
  C* point = points.vectors + i * dim;
  double square = 0;  // of floats: neither overflows nor vanishes
  for (int64_t d = lane; d < dim; d += warp_size) {
    const C value = absent ? C(0) : to_compute(vectors[i * dim + d]) - origin[d];
    square += static_cast<double>(value) * value;
    point[d] = value;
  }
  const double total = warp_total(square), norm = sqrt(total), divisor = norm == 0 ? 1 : norm;
  if (problem.unit) {
    for (int64_t d = lane; d < dim; d += warp_size) point[d] = static_cast<C>(point[d] / divisor);
  }
  if (lane != 0) return;
  points.norms[i] = problem.unit ? static_cast<C>(norm) : C(1);
  if (S == Side::codes) problem.offsets[i] = problem.euclidean ? problem.curvature * static_cast<C>(total) : C(0);
}

template <class T, class C>
void place(const Assignment& args, const Problem<C>& problem, void* stream) {
  const T *x = static_cast<const T*>(args.x), *codebook = static_cast<const T*>(args.codebook);
  const auto warps = [](int64_t count) { return parts_of(count * warp_size, block_threads); };
  launch("origin", origin_kernel<T, C>, args.heads * parts_of(args.dim, origin_columns), block_threads, 0, stream,
         codebook, problem);
  launch("place codes", place_kernel<T, Side::codes, C>, warps(args.heads * args.codes), block_threads, 0, stream,
         codebook, problem);
  launch("place rows", place_kernel<T, Side::rows, C>, warps(args.heads * args.rows), block_threads, 0, stream, x,
         problem);
}

// ---- noise ---------------------------------------------------------------------------------------------------------

// Elements first, … of the stream, as many as a Philox block gives; they may lie in two.
template <class C>
__device__ __forceinline__ void gumbel_run(const int64_t* key, int64_t first, C (&out)[vector_size<C>]) {
  constexpr int size = vector_size<C>;
  const uint64_t seed = static_cast<uint64_t>(key[0]);
  const uint64_t counter = static_cast<uint64_t>(key[1]) + static_cast<uint64_t>(first / size);
  gumbel_block(seed, counter, out);
  const int shift = static_cast<int>(first % size);
  if (shift == 0) return;
  C next[size];
  gumbel_block(seed, counter + 1, next);
#pragma unroll
  for (int step = 0; step < size - 1; ++step) {  // in registers, which cannot be indexed
    if (step >= shift) break;
#pragma unroll
    for (int j = 0; j < size - 1; ++j) out[j] = out[j + 1];
    out[size - 1] = next[step];
  }
}

// Adds noise to what a thread holds of one row; not to runs that would all stay below `floor`.
template <class C>
__device__ __forceinline__ void add_noise(const Problem<C>& problem, int64_t row, int64_t first_code, int x, C floor,
                                          C (&logits)[per_thread<C>]) {
  constexpr int size = vector_size<C>;
  constexpr C highest = sizeof(C) == 4 ? C(22.9) : C(45.1);
#pragma unroll
  for (int run = 0; run < per_thread<C>; run += size) {
    C peak = -infinity<C>();
#pragma unroll
    for (int j = 0; j < size; ++j) peak = logits[run + j] > peak ? logits[run + j] : peak;
    if (peak + problem.factor * highest < floor) continue;
    C noise[size];
    gumbel_run(problem.key, row * problem.codes + first_code + place<C>(x, run), noise);
#pragma unroll
    for (int j = 0; j < size; ++j) logits[run + j] += problem.factor * noise[j];
  }
}

// ---- logits --------------------------------------------------------------------------------------------------------

// Of the tile at (first_row, first_code) of a head, without noise; -inf where a row or a code does not exist. All
// threads of the block call it; the slices must be free on entry and are free on return.
template <class C>
__device__ __forceinline__ void logit_tile(const Problem<C>& problem, int64_t head, int64_t first_row,
                                           int64_t first_code, ProductSlices<C>& slices,
                                           C (&logits)[per_thread<C>][per_thread<C>]) {
  constexpr int n = per_thread<C>;
  const int x = threadIdx.x % block_side, y = threadIdx.x / block_side;
#pragma unroll
  for (int r = 0; r < n; ++r) {
#pragma unroll
    for (int c = 0; c < n; ++c) logits[r][c] = 0;
  }
  const C* codes = problem.codebook.vectors + head * problem.codes * problem.dim;
  multiply_tiles(
      MatrixRows<C>{problem.x.vectors + head * problem.rows * problem.dim, first_row, problem.rows, problem.dim},
      MatrixRows<C>{codes, first_code, problem.codes, problem.dim}, slices, logits);
#pragma unroll
  for (int c = 0; c < n; ++c) {
    const int64_t k = first_code + place<C>(x, c);
    const C offset = k < problem.codes ? problem.offsets[head * problem.codes + k] : C(0);
#pragma unroll
    for (int r = 0; r < n; ++r) {
      const bool exists = first_row + place<C>(y, r) < problem.rows && k < problem.codes;
      logits[r][c] = exists ? problem.slope * logits[r][c] + offset : -infinity<C>();
    }
  }
}

// Below this, exp is 0.
template <class C>
__device__ constexpr C exp_floor() {
  return sizeof(C) == 4 ? C(-104) : C(-746);
}

}  // namespace
}  // namespace isthmus::cuda
