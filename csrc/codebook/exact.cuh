// Sums in float64, in the operations of the CPU kernels: codes that only rounding tells apart fall the same way on
// both.
#pragma once

#include "core/launch.cuh"

namespace isthmus::cuda {
namespace {

template <class T>
__device__ __forceinline__ double widen(T value) {
  return static_cast<double>(to_compute(value));
}

// Σ_k term(k), even and odd k apart. The terms must not be products left to be fused with a sum: __dmul_rn.
template <class Term>
__device__ __forceinline__ double exact_sum(int64_t count, Term term) {
  double even = 0, odd = 0;
  int64_t k = 0;
#pragma unroll 4
  for (; k + 1 < count; k += 2) {
    even = __dadd_rn(even, term(k));
    odd = __dadd_rn(odd, term(k + 1));
  }
  if (k < count) even = __dadd_rn(even, term(k));
  return __dadd_rn(even, odd);
}

}  // namespace
}  // namespace isthmus::cuda
