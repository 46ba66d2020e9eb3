// How many rows each code received, and their sum: rows sorted by code (core/sort.cuh).
#pragma once

#include "codebook/kernels.h"
#include "core/product.cuh"
#include "core/sort.cuh"

namespace isthmus::cuda {
namespace {

template <class T>
struct CodeSums {
  using Number = Compute<T>;
  CodeStatistics args;

  __device__ __forceinline__ Number share(int64_t row, int64_t, int64_t k) const {
    return to_compute(static_cast<const T*>(args.x)[row * args.dim + k]);
  }
  __device__ __forceinline__ void write(int64_t code, int64_t k, Number sum) const {
    static_cast<Number*>(args.sums)[code * args.dim + k] = sum;
  }
};

template <class C>
__global__ void __launch_bounds__(block_threads) counts_kernel(CodeStatistics args, const int64_t* starts) {
  const int64_t code = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  if (code < args.codes) static_cast<C*>(args.counts)[code] = static_cast<C>(starts[code + 1] - starts[code]);
}

template <class T>
void statistics(const CodeStatistics& args, void* stream) {
  Arena arena(args.workspace);
  GroupSums<Compute<T>> sums(args.rows, args.codes, args.dim, arena);
  sums.run(args.indices, -1, CodeSums<T>{args}, stream);
  launch("counts", counts_kernel<Compute<T>>, divide_up(args.codes, block_threads), block_threads, 0, stream, args,
         static_cast<const int64_t*>(sums.groups.starts));
}

}  // namespace
}  // namespace isthmus::cuda
