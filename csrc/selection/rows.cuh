// Numbers of rows, by one block: running sums over all rows of a batch.
#pragma once

#include "topk/candidates.cuh"

namespace isthmus::cuda {
namespace {

constexpr int scan_threads = 1024;

// Calls put(row, sum of count_of over the rows before it) for every row, and returns the sum over all. Every thread of
// the block, the only one, calls it; what `put` has written, all threads may read afterwards.
template <class CountOf, class Put>
__device__ int64_t scan_rows(int64_t rows, const CountOf& count_of, const Put& put) {
  __shared__ int64_t warps[scan_threads / warp_size];
  int64_t before = 0;
  for (int64_t base = 0; base < rows; base += scan_threads) {
    const int64_t row = base + threadIdx.x, count = row < rows ? count_of(row) : 0;
    int64_t total;
    const int64_t in_warp = warp_prefix(count, total);
    if (walk_lane() == 0) warps[threadIdx.x / warp_size] = total;
    __syncthreads();
    int64_t of_block = 0, place = before + in_warp;
    for (int w = 0; w < scan_threads / warp_size; ++w) {
      if (w < static_cast<int>(threadIdx.x) / warp_size) place += warps[w];
      of_block += warps[w];
    }
    if (row < rows) put(row, place);
    before += of_block;
    __syncthreads();
  }
  return before;
}

// All rows at once: their operands take as much memory as x does in half types.
constexpr int64_t all_rows = int64_t{1} << 40;

// A bit of a row's mask that turned out not to count.
__device__ __forceinline__ void clear_bit(uint32_t* mask, int32_t slot) {
  atomicAnd(mask + slot / slots_per_word, ~(1u << slot % slots_per_word));
}

}  // namespace
}  // namespace isthmus::cuda
