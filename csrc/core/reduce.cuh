// Sums of a tensor's elements as a Reduction asks for them, on the device, and kernels that write elements on the way.
//
// Neighbouring threads take neighbouring packs. A row sum belongs to a team of 1 to 32 lanes of a warp, few for narrow
// rows, so that short rows leave no lanes idle; wide rows are cut into segments of at least 2048 columns. A column sum
// belongs to the threads of a block that stand below each other; many rows are cut into parts. What several teams sum
// goes through partial sums that a second kernel adds. All orders are fixed by the shape: no atomics, results are
// bitwise repeatable.
#pragma once

#include "core/gaussian_packs.cuh"
#include "core/gaussians.h"
#include "core/launch.cuh"

namespace isthmus::cuda {
namespace {

constexpr int threads_per_block = 256;
constexpr int64_t segment_columns = 2048;
constexpr int64_t max_segments = 16 * 1024;  // of a row: one block adds their sums
constexpr int64_t min_rows_per_part = 64;
constexpr int64_t max_row_parts = 512;  // each keeps one partial sum for every column

// How the packs of a view are dealt out to threads, and into how many parts each sum falls.
struct Cut {
  enum class Kind { elements, rows, columns };  // what is summed: nothing, along rows, along columns

  Kind kind;
  int64_t rows, cols, parts;
  int64_t part_size;  // of a row in columns, of a column in rows
  int64_t blocks;
  int lanes;  // threads side by side along a row, a power of two: within a warp, or the whole block

  // whole: every sum is one part, and a team is given to each.
  Cut(const Reduction& view, int pack, bool whole) : rows(view.rows), cols(view.cols), parts(1) {
    if (!whole && !view.over_rows && cols == 1) {
      kind = Kind::elements;
      lanes = threads_per_block;
      blocks = divide_up(rows, threads_per_block * pack);
      return;
    }
    lanes = 1;
    while (lanes < warp_size && lanes * pack < cols) lanes *= 2;
    if (view.over_rows) {
      kind = Kind::columns;
      part_size = whole ? rows : at_least(min_rows_per_part, divide_up(rows, max_row_parts));
      parts = divide_up(rows, part_size);
      blocks = parts * divide_up(cols, lanes * pack);
    } else {
      kind = Kind::rows;
      part_size = whole ? cols : at_least(segment_columns, divide_up(divide_up(cols, max_segments), 64) * 64);
      parts = divide_up(cols, part_size);
      if (whole && cols > segment_columns) lanes = threads_per_block;
      blocks = divide_up(rows * parts * lanes, threads_per_block);
    }
  }

  int64_t partial_sums() const { return parts > 1 ? parts * (kind == Kind::columns ? cols : rows) : 0; }

 private:
  static int64_t at_least(int64_t low, int64_t value) { return value < low ? low : value; }
};

// The packs of one thread: at elements first, first + step, … below end.
struct Walk {
  int64_t first, end, step;
  int64_t sum;  // which of the (partial) sums: of the first element of the pack, for sums along columns
  bool leads;   // of its team, whose sum it writes

  __device__ __forceinline__ Walk(const Cut& cut, int pack) {
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * threads_per_block + threadIdx.x;
    const int lane = threadIdx.x % cut.lanes;
    if (cut.kind == Cut::Kind::elements) {
      sum = first = thread * pack;
      end = cut.rows;
      step = cut.rows;  // one pack, or none
      leads = first < end;
    } else if (cut.kind == Cut::Kind::rows) {
      const int64_t row = thread / cut.lanes / cut.parts;
      const int64_t col = thread / cut.lanes % cut.parts * cut.part_size, left = cut.cols - col;
      sum = thread / cut.lanes;
      step = static_cast<int64_t>(cut.lanes) * pack;
      first = row * cut.cols + col + lane * pack;
      end = row < cut.rows ? row * cut.cols + col + (left < cut.part_size ? left : cut.part_size) : first;
      leads = lane == 0 && row < cut.rows;
    } else {
      const int64_t part = blockIdx.x % cut.parts, tile = blockIdx.x / cut.parts;
      const int64_t col = (tile * cut.lanes + lane) * pack, left = cut.rows - part * cut.part_size;
      const int64_t begin_row = part * cut.part_size, walker = threadIdx.x / cut.lanes;
      sum = part * cut.cols + col;
      step = threads_per_block / cut.lanes * cut.cols;
      first = (begin_row + walker) * cut.cols + col;
      end = col < cut.cols ? (begin_row + (left < cut.part_size ? left : cut.part_size)) * cut.cols : first;
      leads = walker == 0 && col < cut.cols;
    }
  }
};

// Sum over the `lanes` threads of a team along a row, valid in its first. Every thread of the block must call it.
template <class C>
__device__ __forceinline__ C team_sum(C value, int lanes) {
  if (lanes > warp_size) return block_sum(value);
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, offset, lanes);
  }
  return value;
}

// Sums over the threads of a block that stand below each other, `lanes` in a row; valid in the topmost. Every thread
// of the block must call it.
template <class C, int N>
__device__ __forceinline__ void stack_sum(C (&values)[N], int lanes) {
  __shared__ C stacks[N][threads_per_block];
#pragma unroll
  for (int j = 0; j < N; ++j) stacks[j][threadIdx.x] = values[j];
  for (int half = threads_per_block / 2; half >= lanes; half /= 2) {
    __syncthreads();
    if (threadIdx.x >= half) continue;
#pragma unroll
    for (int j = 0; j < N; ++j) stacks[j][threadIdx.x] += stacks[j][threadIdx.x + half];
  }
  // What a thread reads here, it wrote itself.
#pragma unroll
  for (int j = 0; j < N; ++j) values[j] = stacks[j][threadIdx.x];
}

// elements(i, values) computes the pack from element i on, of which the (partial) sums are taken. No sums: null.
template <int N, class C, class Elements>
__global__ void __launch_bounds__(threads_per_block) sum_kernel(Elements elements, Cut cut, C weight, C* sums) {
  const Walk walk(cut, N);
  C total[N] = {};
  for (int64_t i = walk.first; i < walk.end; i += walk.step) {
    C values[N];
    elements(i, values);
#pragma unroll
    for (int j = 0; j < N; ++j) total[j] += values[j];
  }
  if (sums == nullptr) return;
  if (cut.kind == Cut::Kind::rows) {
    C sum = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) sum += total[j];
    sum = team_sum(sum, cut.lanes);
    if (walk.leads) sums[walk.sum] = weight * sum;
  } else {
    if (cut.kind == Cut::Kind::columns) stack_sum(total, cut.lanes);
#pragma unroll
    for (int j = 0; j < N; ++j) total[j] *= weight;
    if (walk.leads) store(sums + walk.sum, total);
  }
}

// Elements that are there already.
template <class C>
struct Stored {
  const C* values;
  __device__ __forceinline__ void operator()(int64_t i, C (&out)[1]) const { out[0] = values[i]; }
};

template <class C>
void write_zeros(const char* name, void* to, int64_t count, void* stream) {
  if (to == nullptr || count == 0) return;
  check(cudaMemsetAsync(to, 0, static_cast<size_t>(count) * sizeof(C), static_cast<cudaStream_t>(stream)), name);
}

// Sums without elements: 0, or NaN for the mean of nothing, whose weight is infinite. All bits set is a NaN.
template <class C>
void write_empty_sums(const char* name, const Reduction& view, void* sums, void* stream) {
  if (view.weight < INFINITY) return write_zeros<C>(name, sums, view.sums(), stream);
  if (sums == nullptr || view.sums() == 0) return;
  check(cudaMemsetAsync(sums, 0xff, static_cast<size_t>(view.sums()) * sizeof(C), static_cast<cudaStream_t>(stream)),
        name);
}

// Elements of the compute type that sum() needs for partial sums.
inline int64_t sum_workspace(const Reduction& view) {
  return view.rows * view.cols == 0 ? 0 : Cut(view, 1, false).partial_sums();
}

// Visits all packs of the view and writes the sums that it asks for, if they are wanted.
template <int N, class C, class Elements>
void sum(const char* name, const Elements& elements, const Reduction& view, void* sums, void* workspace, void* stream) {
  if (view.rows * view.cols == 0) return write_empty_sums<C>(name, view, sums, stream);
  const Cut cut(view, N, false);
  const bool partial = sums != nullptr && cut.parts > 1;
  launch(name, sum_kernel<N, C, Elements>, cut.blocks, threads_per_block, 0, stream, elements, cut,
         static_cast<C>(view.weight), static_cast<C*>(partial ? workspace : sums));
  if (!partial) return;
  const Reduction rest = {view.over_rows ? cut.parts : view.rows, view.over_rows ? view.cols : cut.parts,
                          view.over_rows, 1};
  const Cut whole(rest, 1, true);
  launch(name, sum_kernel<1, C, Stored<C>>, whole.blocks, threads_per_block, 0, stream,
         Stored<C>{static_cast<const C*>(workspace)}, whole, C(1), static_cast<C*>(sums));
}

// The other way: the gradients of the pack from element i on, given those of the sums.
template <class C, int N>
__device__ __forceinline__ void spread(const Reduction& view, const void* grads, int64_t i, C (&out)[N]) {
  const C weight = static_cast<C>(view.weight);
  const C* grad = static_cast<const C*>(grads);
  if (!view.over_rows && view.cols > 1) return fill(weight * grad[i / view.cols], out);
  const int64_t first = view.over_rows ? i % view.cols : i;
#pragma unroll
  for (int j = 0; j < N; ++j) out[j] = weight * grad[first + j];
}

// Every element for itself.
inline Reduction no_reduction(const Reduction& view) { return {view.rows * view.cols, 1, false, 1}; }

// Whether packs of N elements end with the rows of the view; without rows, with the elements.
template <int N>
bool packs_fit(const Reduction& view) {
  return (view.cols == 1 && !view.over_rows ? view.rows : view.cols) % N == 0;
}

}  // namespace
}  // namespace isthmus::cuda
