// The code of each row, and how far it is: from the difference, not from the score, which cancels. A warp takes a row.
#pragma once

#include "codebook/kernels.h"
#include "codebook/warps.cuh"
#include "core/sort.cuh"

namespace isthmus::cuda {
namespace {

template <class T>
__device__ __forceinline__ void gather_row(const CodeSearch& args, int64_t head, int64_t row, int64_t index) {
  using C = Compute<T>;
  const int64_t at = head * args.rows + row;
  const T* x = static_cast<const T*>(args.x) + head * args.head_stride + row * args.row_stride;
  const T* code = static_cast<const T*>(args.codebook) + (head * args.codes + index) * args.dim;
  T* quantized = static_cast<T*>(args.quantized) + at * args.dim;
  C sum = 0;
  for (int64_t k = warp_lane(); k < args.dim; k += warp_size) {
    T value = from_compute<T>(0);
    if (index >= 0) {
      value = code[k];
      const C difference = to_compute(x[k]) - to_compute(value);
      sum += difference * difference;
    }
    quantized[k] = value;
  }
  sum = warp_total(sum);
  if (warp_lane() == 0) static_cast<C*>(args.squared_error)[at] = sum;
}

template <class T>
__global__ void __launch_bounds__(block_threads) gather_kernel(CodeSearch args) {
  const int64_t row = warp_number();
  if (row >= args.heads * args.rows) return;
  const int64_t index = args.indices[row];
  check_index(index, -1, args.codes);
  gather_row<T>(args, row / args.rows, row % args.rows, index);
}

}  // namespace
}  // namespace isthmus::cuda
