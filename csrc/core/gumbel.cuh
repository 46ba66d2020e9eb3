// core/gumbel.h for one Philox block on the device: the same stream, CUDA's own logarithms.
#pragma once

#include "core/philox.h"

namespace isthmus::cuda {
namespace {

__device__ __forceinline__ float gumbel(uint32_t word) {
  const float v = fminf(uniform(word), 0x1.fffffep-1f);
  return -logf(-log1pf(-v));
}

__device__ __forceinline__ double gumbel(uint32_t a, uint32_t b) {
  const double v = fmin(uniform(a, b), 0x1.fffffffffffffp-1);
  return -log(-log1p(-v));
}

__device__ __forceinline__ void gumbel_block(uint64_t seed, uint64_t counter, float (&out)[4]) {
  const Words words = philox(seed, counter);
#pragma unroll
  for (int j = 0; j < 4; ++j) out[j] = gumbel(words.w[j]);
}

__device__ __forceinline__ void gumbel_block(uint64_t seed, uint64_t counter, double (&out)[2]) {
  const Words words = philox(seed, counter);
  out[0] = gumbel(words.w[0], words.w[1]);
  out[1] = gumbel(words.w[2], words.w[3]);
}

}  // namespace
}  // namespace isthmus::cuda
