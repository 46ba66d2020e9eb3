// Residual finite scalar quantization on CUDA devices; what is computed stands in residual.inl. A thread takes a row
// number by number, each through all of its stages in registers; only indices are added to in memory.
#pragma once

#include "scalar/rows.cuh"

namespace isthmus::cuda {
namespace {

template <class C>
__device__ __forceinline__ C clamped(C x, C most) {
  return x > most ? most : (x < -most ? -most : x);
}

// L / (L - 1)
template <class C>
__device__ __forceinline__ C bound_of(int64_t levels) {
  return static_cast<C>(1 + 1 / (static_cast<double>(levels) - 1));
}

template <class T>
__global__ void __launch_bounds__(rows_per_block) residual_fsq_kernel(ResidualFsqQuantize args) {
  using C = Compute<T>;
  const int64_t row = own_row(), first = row * args.levels.dims;
  if (row >= args.rows) return;
  const int64_t kept = args.kept == nullptr ? args.stages : args.kept[row];
  if (kept < 0 || kept > args.stages) {
    printf("isthmus: stages holds %lld; expected 0 to %lld\n", static_cast<long long>(kept),
           static_cast<long long>(args.stages));
    __trap();
  }
  int64_t* indices = args.indices + row * args.stages;
  for (int64_t q = 0; q < args.stages; ++q) indices[q] = q < kept ? 0 : -1;
  int64_t stride = 1;
  for (int d = 0; d < args.levels.dims; ++d) {
    const int64_t levels = args.levels.size[d];
    const C centre = levels % 2 == 0 ? C(0.5) : C(0), width = static_cast<C>(levels - 1) / 2, step = C(1) / width;
    const C low = static_cast<C>(-(levels / 2)), high = low + static_cast<C>(levels - 1);
    const C size = static_cast<C>(levels), narrower = C(1) / size, bound = bound_of<C>(levels);
    const C x = to_compute(static_cast<const T*>(args.x)[first + d]);
    C left = args.hard_clamp ? clamped(x, bound) : bound * tanh(x / bound);
    C total = 0, scale = 1;
    for (int64_t q = 0; q < kept; ++q) {
      C rounded = rint(width * left - centre);
      rounded = rounded > high ? high : (rounded < low ? low : rounded);
      const C value = (rounded + centre) * step;
      total += value * scale;
      if (rounded == rounded) indices[q] += stride * static_cast<int64_t>(rounded - low);
      left = (left - value) * size;
      scale *= narrower;
    }
    static_cast<T*>(args.quantized)[first + d] = from_compute<T>(total);
    stride *= levels;
  }
}

template <class T>
__global__ void __launch_bounds__(rows_per_block) residual_fsq_backward_kernel(ResidualFsqBackward args) {
  using C = Compute<T>;
  const int64_t row = own_row(), first = row * args.levels.dims;
  if (row >= args.rows) return;
  const bool out = args.kept != nullptr && args.kept[row] == 0;
  for (int d = 0; d < args.levels.dims; ++d) {
    const C bound = bound_of<C>(args.levels.size[d]), x = to_compute(static_cast<const T*>(args.x)[first + d]);
    const C s = tanh(x / bound), slope = args.hard_clamp ? C(x >= -bound && x <= bound) : C(1) - s * s;
    const C grad = to_compute(static_cast<const T*>(args.grad)[first + d]);
    static_cast<T*>(args.grad_x)[first + d] = from_compute<T>(out ? C(0) : slope * grad);
  }
}

}  // namespace
}  // namespace isthmus::cuda
