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

// The sum over a warp, the same bits in all its lanes. All of them must call it.
template <class C>
__device__ __forceinline__ C warp_total(C value) {
#pragma unroll
  for (int offset = warp_size / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

inline int64_t blocks_of_warps(int64_t warps) { return divide_up(warps * warp_size, block_threads); }

}  // namespace
}  // namespace isthmus::cuda
