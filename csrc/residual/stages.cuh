// Stages of a residual quantizer, and where the codes of each row stand in the tables.
#pragma once

#include "codebook/warps.cuh"
#include "core/sort.cuh"
#include "residual/kernels.h"

namespace isthmus::cuda {
namespace {

// Its codebook stands in the rows start … start + size - 1 of a table.
struct Stage {
  int64_t number, start, size;
};

template <class F>
void for_each_stage(const ResidualCodes& codes, F&& f) {
  int64_t start = 0;
  for (int64_t q = 0; q < codes.stages; ++q) {
    f(Stage{q, start, codes.sizes[q]});
    start += codes.sizes[q];
  }
}

// One stage of: from an index within its codebook to a row of all tables; -1 stays.
__global__ void __launch_bounds__(block_threads)
    places_kernel(ResidualCodes codes, const int64_t* indices, Stage stage, int64_t* places) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  if (row >= codes.groups * codes.rows) return;
  const int64_t at = row * codes.stages + stage.number, index = indices[at];
  check_index(index, -1, stage.size);
  places[at] = index < 0 ? -1 : row / codes.rows * codes.codes + stage.start + index;
}

inline void find_places(const ResidualCodes& codes, const int64_t* indices, int64_t* places, void* stream) {
  for_each_stage(codes, [&](const Stage& stage) {
    launch("places", places_kernel, divide_up(codes.groups * codes.rows, block_threads), block_threads, 0, stream,
           codes, indices, stage, places);
  });
}

template <class T>
__global__ void __launch_bounds__(block_threads) widen_all_kernel(const T* from, int64_t count, Compute<T>* to) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  if (i < count) to[i] = to_compute(from[i]);
}

template <class T>
void widen_all(const void* from, int64_t count, Compute<T>* to, void* stream) {
  launch("widen_all", widen_all_kernel<T>, divide_up(count, block_threads), block_threads, 0, stream,
         static_cast<const T*>(from), count, to);
}

}  // namespace
}  // namespace isthmus::cuda
