// Standard Gumbel noise of a key, generated in vectors: element i depends on (key, i) alone, as in core/noise.h.
//
//     v = min(uniform(word), 1 - 2^-24)         noise = -log(-log(1 - v)) = -log(-log1p(-v))
//
// float32 element i takes word i % 4 of block i / 4, float64 element i words 2 (i % 2) and 2 (i % 2) + 1 of block i / 2
// (and 1 - 2^-53). v is never 0 and never 1, so noise is always finite. Written with 1 - v because the upper tail,
// which decides who wins a maximum, then has the full resolution of floats near zero: it reaches 22.9 in float32.
#pragma once

#include "core/noise.h"

namespace isthmus {
namespace {

constexpr float below_one = 0x1.fffffep-1f;
constexpr double below_one_64 = 0x1.fffffffffffffp-1;

ISTHMUS_INLINE f32v gumbel(u32v word) {
  const f32v v = at_most(uniform(word), below_one);
  return -log_positive(-log1p_finite(-v));
}

inline double gumbel(uint32_t a, uint32_t b) {
  const double v = uniform(a, b);
  return -__builtin_log(-__builtin_log1p(v < below_one_64 ? -v : -below_one_64));
}

// Values [first, first + count) of the key.
inline void fill_gumbel(const Key& key, int64_t first, int64_t count, float* out) {
  const auto to_gumbel = [](const u32v(&word)[4], f32v(&n)[4]) __attribute__((always_inline)) {
    for (int i = 0; i < 4; ++i) n[i] = gumbel(word[i]);
  };
  fill_stream(key, first, count, to_gumbel, out);
}

// float64 serves gradient checks and oracles: plain scalar code.
inline void fill_gumbel(const Key& key, int64_t first, int64_t count, double* out) {
  for (int64_t i = first; i < first + count; ++i) {
    const Words words = philox(key.seed, key.offset + static_cast<uint64_t>(i / 2));
    out[i - first] = i % 2 == 0 ? gumbel(words.w[0], words.w[1]) : gumbel(words.w[2], words.w[3]);
  }
}

}  // namespace
}  // namespace isthmus
