// A sparse code on the device: its rows, and the checks of what a caller passes.
#pragma once

#include "core/packs.cuh"
#include "core/sort.cuh"
#include "sparse/kernels.h"

namespace isthmus::cuda {
namespace {

constexpr int block_threads = 256;

// Where the entries of a row begin: those of the row before end here.
__device__ __forceinline__ int64_t first_entry(const CodeLayout& code, int64_t row) {
  return code.offsets != nullptr ? __ldg(code.offsets + row) : row * code.k;
}

// ---- checks --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void check_border(bool right, const char* what, int64_t place) {
  if (right) return;
  printf("isthmus: %s are not those of a sparse code (at %lld)\n", what, static_cast<long long>(place));
  __trap();
}

// Indices in [0, features) or -1; offsets ascending from 0 to the number of entries.
__global__ void __launch_bounds__(block_threads) check_code_kernel(CodeLayout code, int64_t features) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  if (i < code.entries) check_index(code.indices[i], -1, features);
  if (code.offsets == nullptr || i > code.rows) return;
  const int64_t offset = code.offsets[i];
  check_border(i == 0 ? offset == 0 : code.offsets[i - 1] <= offset, "offsets", i);
  if (i == code.rows) check_border(offset == code.entries, "offsets", i);
}

inline void check_code(const CodeLayout& code, int64_t features, void* stream) {
  const int64_t borders = code.offsets != nullptr ? code.rows + 1 : 0;
  launch("check_code", check_code_kernel, divide_up(code.entries > borders ? code.entries : borders, block_threads),
         block_threads, 0, stream, code, features);
}

// Every position in use must lie between the starts of the latent that its entry points to.
__global__ void __launch_bounds__(block_threads)
    check_order_kernel(LatentOrder order, CodeLayout code, int64_t features) {
  const int64_t p = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  const int64_t used = order.starts[features];
  if (p == 0) check_border(used >= 0 && used <= code.entries && order.starts[0] == 0, "starts", features);
  if (p < features) check_border(order.starts[p] <= order.starts[p + 1], "starts", p);
  if (p >= used || p >= code.entries) return;
  check_index(order.entries[p], 0, code.entries);
  check_index(order.rows[p], 0, code.rows);
  const int64_t latent = code.indices[order.entries[p]];
  check_index(latent, 0, features);
  check_border(order.starts[latent] <= p && p < order.starts[latent + 1], "starts", latent);
}

inline void check_order(const LatentOrder& order, const CodeLayout& code, int64_t features, void* stream) {
  const int64_t threads = (code.entries > features ? code.entries : features) + 1;
  launch("check_order", check_order_kernel, divide_up(threads, block_threads), block_threads, 0, stream, order, code,
         features);
}

}  // namespace
}  // namespace isthmus::cuda
