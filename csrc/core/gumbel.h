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

constexpr int gumbels_per_step = 4 * lanes<float>;

// gumbels_per_step values, from block `block` on, in memory order: the transpose of the four words, as normal_step does.
ISTHMUS_INLINE void gumbel_step(const Key& key, uint64_t block, f32v (&out)[4]) {
  u64v even, odd;
  lane_counters(even, odd);
  const uint64_t first = key.offset + block;
  const WideWords a = philox(key.seed, even + first), b = philox(key.seed, odd + first);
  f32v n[4];
  for (int j = 0; j < 4; ++j) n[j] = gumbel(join_halves(a.w[j], b.w[j]));
  const f32v low01 = unpack<0>(n[0], n[1]), high01 = unpack<1>(n[0], n[1]);
  const f32v low23 = unpack<0>(n[2], n[3]), high23 = unpack<1>(n[2], n[3]);
  out[0] = unpack_pairs<0>(low01, low23);
  out[1] = unpack_pairs<1>(low01, low23);
  out[2] = unpack_pairs<0>(high01, high23);
  out[3] = unpack_pairs<1>(high01, high23);
}

// Values [first, first + count) of the key.
inline void fill_gumbel(const Key& key, int64_t first, int64_t count, float* out) {
  const int64_t end = first + count;
  for (int64_t start = first / 4 * 4; start < end; start += gumbels_per_step) {
    f32v step[4];
    gumbel_step(key, static_cast<uint64_t>(start / 4), step);
    if (start >= first && start + gumbels_per_step <= end) {
      for (int j = 0; j < 4; ++j) store(out + (start - first) + j * lanes<float>, step[j]);
    } else {
      float whole[gumbels_per_step];
      for (int j = 0; j < 4; ++j) store(whole + j * lanes<float>, step[j]);
      const int64_t from = start < first ? first : start;
      const int64_t to = start + gumbels_per_step < end ? start + gumbels_per_step : end;
      std::memcpy(out + (from - first), whole + (from - start), static_cast<size_t>(to - from) * sizeof(float));
    }
  }
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
