// What the scalar quantizers share on CUDA devices: a thread has a row of at most 62 numbers. The rows of a warp are
// neighbours, so what one load leaves of a sector the next ones find in the first-level cache.
#pragma once

#include "core/launch.cuh"
#include "core/philox.h"
#include "scalar/kernels.h"

namespace isthmus::cuda {
namespace {

constexpr int rows_per_block = 128;

__device__ __forceinline__ int64_t own_row() { return static_cast<int64_t>(blockIdx.x) * rows_per_block + threadIdx.x; }

__device__ __forceinline__ bool excluded(const bool* mask, int64_t row) { return mask != nullptr && !mask[row]; }

template <class Kernel, class... Args>
void launch_rows(const char* name, Kernel kernel, int64_t rows, void* stream, Args... args) {
  launch(name, kernel, divide_up(rows, rows_per_block), rows_per_block, 0, stream, args...);
}

// An index that must lie in [lowest, codes); -1 is allowed where lowest says so.
__device__ __forceinline__ void check_index(int64_t index, int64_t lowest, uint64_t codes) {
  if (index < lowest || (index >= 0 && static_cast<uint64_t>(index) >= codes)) {
    printf("isthmus: indices holds %lld; expected %lld <= index < %llu\n", static_cast<long long>(index),
           static_cast<long long>(lowest), static_cast<unsigned long long>(codes));
    __trap();
  }
}

// visit(dimension, digit)
template <class F>
__device__ __forceinline__ void each_digit(const Levels& levels, bool first_highest, int64_t index, F&& visit) {
  uint64_t rest = static_cast<uint64_t>(index);
  for (int i = 0; i < levels.dims; ++i) {
    const int d = first_highest ? levels.dims - 1 - i : i;
    const uint64_t size = static_cast<uint64_t>(levels.size[d]), next = rest / size;
    visit(d, static_cast<int64_t>(rest - next * size));
    rest = next;
  }
}

inline uint64_t codes_of(const Levels& levels) {
  uint64_t codes = 1;
  for (int d = 0; d < levels.dims; ++d) codes *= static_cast<uint64_t>(levels.size[d]);
  return codes;
}

// ---- noise ---------------------------------------------------------------------------------------------------------

// Uniforms of neighbouring elements: a Philox block is computed when its first element is asked for.
template <class C>
class Uniforms {
 public:
  __device__ __forceinline__ explicit Uniforms(const int64_t* key)
      : seed_(static_cast<uint64_t>(key[0])), offset_(static_cast<uint64_t>(key[1])) {}

  __device__ __forceinline__ C at(int64_t i) {
    constexpr int size = sizeof(C) == 8 ? 2 : 4;
    if (i / size != block_) {
      block_ = i / size;
      words_ = philox(seed_, offset_ + static_cast<uint64_t>(block_));
    }
    const int lane = static_cast<int>(i % size);
    if constexpr (sizeof(C) == 8) {
      return lane == 0 ? uniform(words_.w[0], words_.w[1]) : uniform(words_.w[2], words_.w[3]);
    } else {
      const uint32_t low = lane == 0 ? words_.w[0] : words_.w[1], high = lane == 2 ? words_.w[2] : words_.w[3];
      return uniform(lane < 2 ? low : high);
    }
  }

  __device__ __forceinline__ C logistic(int64_t i) {
    constexpr C below_one = sizeof(C) == 8 ? C(0x1.fffffffffffffp-1) : C(0x1.fffffep-1f);
    const C u = at(i), v = u < below_one ? u : below_one;
    return log(v) - log1p(-v);
  }

 private:
  uint64_t seed_, offset_;
  int64_t block_ = -1;
  Words words_;
};

// ---- sums over rows ------------------------------------------------------------------------------------------------

// out[i] = Σ over blocks of partial[block, i]: one block a sum, always in the same order.
template <class T>
__global__ void __launch_bounds__(rows_per_block)
    sum_blocks(const double* partial, int64_t blocks, int64_t width, T* out) {
  double sum = 0;
  for (int64_t b = threadIdx.x; b < blocks; b += rows_per_block) sum += partial[b * width + blockIdx.x];
  sum = block_sum(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = from_compute<T>(static_cast<Compute<T>>(sum));
}

}  // namespace
}  // namespace isthmus::cuda
