// Work that is dealt out to warps.
#pragma once

#include "core/product.cuh"

namespace isthmus::cuda {
namespace {

// The number of this thread's warp in the grid, and its place in it.
__device__ __forceinline__ int64_t warp_number() {
  return (static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x) / warp_size;
}
__device__ __forceinline__ int warp_lane() { return threadIdx.x % warp_size; }

inline int64_t blocks_of_warps(int64_t warps) { return divide_up(warps * warp_size, block_threads); }

}  // namespace
}  // namespace isthmus::cuda
