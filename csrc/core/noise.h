// Standard normals of a key, generated in vectors: element i depends on (key, i) alone (core/philox.h), so any range
// can be produced anywhere, again and again. This is why no op stores its noise.
//
// Cost at AVX-512 for 64 float32 normals: about 130 instructions of Philox, 120 of Box–Muller, 8 shuffles.
#pragma once

#include "core/math.h"
#include "core/philox.h"
#include "core/simd.h"

namespace isthmus {
namespace {

struct Key {
  uint64_t seed, offset;
  explicit Key(const int64_t* words) : seed(static_cast<uint64_t>(words[0])), offset(static_cast<uint64_t>(words[1])) {}
};

// Philox on 64-bit lanes: a word sits in the low half of its lane, where the multiplier reads it, and the high half
// may hold rubbish. A product delivers both halves of a round in place, so a round needs no blends.
struct WideWords {
  u64v w[4];
};

ISTHMUS_INLINE WideWords philox(uint64_t seed, u64v counter) {
  const u64v m0 = u64v{} + philox_multiplier_0, m1 = u64v{} + philox_multiplier_1;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  // First round: counter words 2 and 3 are zero, and so is one of its two products.
  u64v p0 = multiply_low_halves(counter, m0);
  u64v x0 = (counter >> 32) ^ k0, x1 = {}, x2 = (p0 >> 32) ^ k1, x3 = p0;
#pragma GCC unroll 16
  for (int round = 1; round < philox_rounds; ++round) {
    k0 += philox_weyl_0;
    k1 += philox_weyl_1;
    p0 = multiply_low_halves(x0, m0);
    const u64v p1 = multiply_low_halves(x2, m1);
    x0 = (p1 >> 32) ^ x1 ^ uint64_t(k0);
    x1 = p1;
    x2 = (p0 >> 32) ^ x3 ^ uint64_t(k1);
    x3 = p0;
  }
  return {{x0, x1, x2, x3}};
}

// Which counter, relative to the first, each of the 32-bit lanes works on. Chosen so that transposing four words
// within 128-bit groups yields the normals in memory order: lane 4j + r takes counter (lanes / 4) r + j.
ISTHMUS_INLINE void lane_counters(u64v& even, u64v& odd) {
  constexpr int groups = lanes<float> / 4;
  for (int lane = 0; lane < lanes<float>; lane += 2) {
    even[lane / 2] = static_cast<uint64_t>(groups * (lane % 4) + lane / 4);
    odd[lane / 2] = static_cast<uint64_t>(groups * (lane % 4 + 1) + lane / 4);
  }
}

ISTHMUS_INLINE u32v join_halves(u64v even, u64v odd) { return (u32v)((even & 0xffffffffu) | (odd << 32)); }

ISTHMUS_INLINE f32v uniform(u32v w) { return __builtin_convertvector(w, f32v) * 0x1p-32f + 0x1p-33f; }

ISTHMUS_INLINE void normal_pair(u32v radius_word, u32v angle_word, f32v& first, f32v& second) {
  const f32v radius = sqrt(-2.0f * log(uniform(radius_word)));
  f32v sine, cosine;
  sincos(rounded(two_pi_f * uniform(angle_word)), sine, cosine);
  first = radius * cosine;
  second = radius * sine;
}

// Interleave pairs of 32-bit lanes within each 128-bit group, as the unpack instructions do.
template <int Half>
ISTHMUS_INLINE f32v unpack(f32v a, f32v b) {
  i32v index;
  for (int i = 0; i < lanes<float>; ++i) {
    const int group = i / 4 * 4, within = i % 4;
    index[i] = group + 2 * Half + within / 2 + (within % 2) * lanes<float>;
  }
  return __builtin_shuffle(a, b, index);
}
template <int Half>
ISTHMUS_INLINE f32v unpack_pairs(f32v a, f32v b) {
  i64v index;
  for (int i = 0; i < lanes<double>; ++i) index[i] = i / 2 * 2 + Half + (i % 2) * lanes<double>;
  return (f32v)__builtin_shuffle((f64v)a, (f64v)b, index);
}

constexpr int normals_per_step = 4 * lanes<float>;

// normals_per_step normals, from block `block` on, in memory order.
ISTHMUS_INLINE void normal_step(const Key& key, uint64_t block, f32v (&out)[4]) {
  u64v even, odd;
  lane_counters(even, odd);
  const uint64_t first = key.offset + block;
  const WideWords a = philox(key.seed, even + first), b = philox(key.seed, odd + first);
  f32v n0, n1, n2, n3;
  normal_pair(join_halves(a.w[0], b.w[0]), join_halves(a.w[1], b.w[1]), n0, n1);
  normal_pair(join_halves(a.w[2], b.w[2]), join_halves(a.w[3], b.w[3]), n2, n3);
  const f32v low01 = unpack<0>(n0, n1), high01 = unpack<1>(n0, n1);
  const f32v low23 = unpack<0>(n2, n3), high23 = unpack<1>(n2, n3);
  out[0] = unpack_pairs<0>(low01, low23);
  out[1] = unpack_pairs<1>(low01, low23);
  out[2] = unpack_pairs<0>(high01, high23);
  out[3] = unpack_pairs<1>(high01, high23);
}

// Normals [first, first + count) of the key.
inline void fill_normal(const Key& key, int64_t first, int64_t count, float* out) {
  const int64_t end = first + count;
  for (int64_t start = first / 4 * 4; start < end; start += normals_per_step) {
    f32v step[4];
    normal_step(key, static_cast<uint64_t>(start / 4), step);
    if (start >= first && start + normals_per_step <= end) {
      for (int j = 0; j < 4; ++j) store(out + (start - first) + j * lanes<float>, step[j]);
    } else {
      float whole[normals_per_step];
      for (int j = 0; j < 4; ++j) store(whole + j * lanes<float>, step[j]);
      const int64_t from = start < first ? first : start;
      const int64_t to = start + normals_per_step < end ? start + normals_per_step : end;
      std::memcpy(out + (from - first), whole + (from - start), static_cast<size_t>(to - from) * sizeof(float));
    }
  }
}

// float64 serves gradient checks and oracles: plain scalar code.
inline void fill_normal(const Key& key, int64_t first, int64_t count, double* out) {
  for (int64_t i = first; i < first + count; ++i) {
    const NormalPair pair = normal_pair(philox(key.seed, key.offset + static_cast<uint64_t>(i / 2)));
    out[i - first] = i % 2 == 0 ? pair.first : pair.second;
  }
}

}  // namespace
}  // namespace isthmus
