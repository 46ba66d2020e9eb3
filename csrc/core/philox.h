// Philox4x32-10, a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011),
// and the map from its words to normals. Scalar, for host and device; core/noise.h holds the vector form.
//
// Contract, identical on every device and thread count (docs/numerics.md): key = (seed, offset); block b of a tensor
// is the 128-bit counter (offset + b, 0). A block gives four float32 normals (element i = block i / 4, lane i % 4) or
// two float64 normals. Half types round the float32 stream.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define ISTHMUS_HD __host__ __device__ __forceinline__
#else
#define ISTHMUS_HD inline __attribute__((always_inline))
#endif

namespace isthmus {
namespace {

struct Words {
  uint32_t w[4];
};

constexpr uint32_t philox_multiplier_0 = 0xD2511F53u;
constexpr uint32_t philox_multiplier_1 = 0xCD9E8D57u;
constexpr uint32_t philox_weyl_0 = 0x9E3779B9u;
constexpr uint32_t philox_weyl_1 = 0xBB67AE85u;
constexpr int philox_rounds = 10;

ISTHMUS_HD Words philox(uint64_t seed, uint64_t counter) {
  uint32_t x0 = static_cast<uint32_t>(counter), x1 = static_cast<uint32_t>(counter >> 32), x2 = 0, x3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < philox_rounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(philox_multiplier_0) * x0;
    const uint64_t p1 = static_cast<uint64_t>(philox_multiplier_1) * x2;
    x0 = static_cast<uint32_t>(p1 >> 32) ^ x1 ^ k0;
    x1 = static_cast<uint32_t>(p1);
    x2 = static_cast<uint32_t>(p0 >> 32) ^ x3 ^ k1;
    x3 = static_cast<uint32_t>(p0);
    k0 += philox_weyl_0;
    k1 += philox_weyl_1;
  }
  return {{x0, x1, x2, x3}};
}

// ---- Box–Muller ----------------------------------------------------------------------------------------------------

constexpr float two_pi_f = 6.2831855f;
constexpr double two_pi = 6.283185307179586;

// (w + 1/2) / 2^32 in float: in (0, 1]. The product is exact, so it makes no difference whether it is fused.
ISTHMUS_HD float uniform(uint32_t w) { return static_cast<float>(w) * 0x1p-32f + 0x1p-33f; }

// (a 2^32 + b + 1/2) / 2^64 in double: in (0, 1], rounded once.
ISTHMUS_HD double uniform(uint32_t a, uint32_t b) { return a * 0x1p-32 + (b * 0x1p-64 + 0x1p-65); }

struct NormalPair {
  double first, second;
};

ISTHMUS_HD NormalPair normal_pair(Words words) {
  const double radius = std::sqrt(-2.0 * std::log(uniform(words.w[0], words.w[1])));
  const double angle = two_pi * uniform(words.w[2], words.w[3]);
  return {radius * std::cos(angle), radius * std::sin(angle)};
}

#if defined(__CUDACC__)
// The angle is the rounded product: fused into the range reduction it would be another number.
__device__ __forceinline__ void normal_pair(uint32_t radius_word, uint32_t angle_word, float* out) {
  const float radius = sqrtf(-2.0f * logf(uniform(radius_word)));
  float sine, cosine;
  sincosf(__fmul_rn(two_pi_f, uniform(angle_word)), &sine, &cosine);
  out[0] = radius * cosine;
  out[1] = radius * sine;
}

__device__ __forceinline__ void normal_block(uint64_t seed, uint64_t counter, float (&out)[4]) {
  const Words words = philox(seed, counter);
  normal_pair(words.w[0], words.w[1], out);
  normal_pair(words.w[2], words.w[3], out + 2);
}

__device__ __forceinline__ void normal_block(uint64_t seed, uint64_t counter, double (&out)[2]) {
  const NormalPair pair = normal_pair(philox(seed, counter));
  out[0] = pair.first;
  out[1] = pair.second;
}
#endif

}  // namespace
}  // namespace isthmus
