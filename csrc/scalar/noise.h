// Uniform and logistic noise of a key, in vectors: the words and the u(w) of core/noise.h.
//
//     uniform: u(w) in (0, 1]           logistic: log v - log(1 - v), v = min(u, 1 - 2^-24) (float64: 1 - 2^-53)
#pragma once

#include "core/gumbel.h"

namespace isthmus {
namespace {

inline void fill_uniform(const Key& key, int64_t first, int64_t count, float* out) {
  const auto to_uniform = [](const u32v(&word)[4], f32v(&n)[4]) __attribute__((always_inline)) {
    for (int i = 0; i < 4; ++i) n[i] = uniform(word[i]);
  };
  fill_stream(key, first, count, to_uniform, out);
}

// float64 serves gradient checks and oracles: plain scalar code.
inline void fill_uniform(const Key& key, int64_t first, int64_t count, double* out) {
  for (int64_t i = first; i < first + count; ++i) {
    const Words words = philox(key.seed, key.offset + static_cast<uint64_t>(i / 2));
    out[i - first] = i % 2 == 0 ? uniform(words.w[0], words.w[1]) : uniform(words.w[2], words.w[3]);
  }
}

inline void fill_logistic(const Key& key, int64_t first, int64_t count, float* out) {
  const auto to_logistic = [](const u32v(&word)[4], f32v(&n)[4]) __attribute__((always_inline)) {
    for (int i = 0; i < 4; ++i) {
      const f32v v = at_most(uniform(word[i]), below_one);
      n[i] = log_positive(v) - log1p_finite(-v);
    }
  };
  fill_stream(key, first, count, to_logistic, out);
}

inline void fill_logistic(const Key& key, int64_t first, int64_t count, double* out) {
  fill_uniform(key, first, count, out);
  for (int64_t i = 0; i < count; ++i) {
    const double v = out[i] < below_one_64 ? out[i] : below_one_64;
    out[i] = __builtin_log(v) - __builtin_log1p(-v);
  }
}

}  // namespace
}  // namespace isthmus
