// Standard normals of a key, generated in vectors: element i depends on (key, i) alone (core/philox.h), so any range
// can be produced anywhere, again and again. This is why no op stores its noise.
//
// Cost at AVX-512 for 64 float32 normals: some 280 instructions, half of them Philox.
#pragma once

#include "core/math.h"
#include "core/philox.h"
#include "core/simd.h"

namespace isthmus {
namespace {

// A key with its round keys, computed once: inside the rounds each is a broadcast from memory.
struct Key {
  uint64_t seed, offset;
  uint64_t round[philox_rounds][2];

  explicit Key(const int64_t* words) : seed(static_cast<uint64_t>(words[0])), offset(static_cast<uint64_t>(words[1])) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int r = 0; r < philox_rounds; ++r, k0 += philox_weyl_0, k1 += philox_weyl_1) {
      round[r][0] = k0;
      round[r][1] = k1;
    }
  }
};

// Philox on 64-bit lanes: a word sits in the low half of its lane, where the multiplier reads it, and the high half
// may hold rubbish. A product delivers both halves of a round in place, so a round needs no blends. Each round waits
// for the one before; N independent vectors of counters fill the gaps.
template <int N>
ISTHMUS_INLINE void philox(const Key& key, const u64v (&counter)[N], u64v (&w)[4][N]) {
  const u64v m0 = u64v{} + philox_multiplier_0, m1 = u64v{} + philox_multiplier_1;
  // First round: counter words 2 and 3 are zero, and so is one of its two products.
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    const u64v p0 = multiply_low_halves(counter[n], m0);
    w[0][n] = (counter[n] >> 32) ^ key.round[0][0];
    w[1][n] = u64v{};
    w[2][n] = (p0 >> 32) ^ key.round[0][1];
    w[3][n] = p0;
  }
#pragma GCC unroll 16
  for (int r = 1; r < philox_rounds; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const u64v p0 = multiply_low_halves(w[0][n], m0), p1 = multiply_low_halves(w[2][n], m1);
      w[0][n] = (p1 >> 32) ^ w[1][n] ^ key.round[r][0];
      w[2][n] = (p0 >> 32) ^ w[3][n] ^ key.round[r][1];
      w[1][n] = p1;
      w[3][n] = p0;
    }
  }
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

ISTHMUS_INLINE u32v join_halves(u64v even, u64v odd) {
#if defined(__AVX512F__)
  return (u32v)_mm512_mask_moveldup_ps((__m512)even, 0xaaaa, (__m512)odd);  // one instruction for three
#else
  return (u32v)((even & 0xffffffffu) | (odd << 32));
#endif
}

ISTHMUS_INLINE f32v uniform(u32v w) { return __builtin_convertvector(w, f32v) * 0x1p-32f + 0x1p-33f; }

ISTHMUS_INLINE void normal_pair(u32v radius_word, u32v angle_word, f32v& first, f32v& second) {
  const f32v radius = sqrt(-2.0f * log_positive(uniform(radius_word)));
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

// Numbers come in groups: those of one vector of counters for even and one for odd lanes.
constexpr int group_size = 4 * lanes<float>;

// Numbers made of the four words of each lane, into memory order.
ISTHMUS_INLINE void order(f32v (&n)[4]) {
  const f32v low01 = unpack<0>(n[0], n[1]), high01 = unpack<1>(n[0], n[1]);
  const f32v low23 = unpack<0>(n[2], n[3]), high23 = unpack<1>(n[2], n[3]);
  n[0] = unpack_pairs<0>(low01, low23);
  n[1] = unpack_pairs<1>(low01, low23);
  n[2] = unpack_pairs<0>(high01, high23);
  n[3] = unpack_pairs<1>(high01, high23);
}

// Groups * group_size numbers, from element `start` on, a multiple of 4.
template <int Groups, class Map>
ISTHMUS_INLINE void fill_groups(const Key& key, int64_t start, Map map, float* out) {
  u64v even, odd, counter[2 * Groups], w[4][2 * Groups];
  lane_counters(even, odd);
#pragma GCC unroll 4
  for (int g = 0; g < Groups; ++g) {
    const uint64_t first = key.offset + static_cast<uint64_t>(start / 4 + g * lanes<float>);
    counter[2 * g] = even + first;
    counter[2 * g + 1] = odd + first;
  }
  philox(key, counter, w);
#pragma GCC unroll 4
  for (int g = 0; g < Groups; ++g) {
    u32v words[4];
    f32v numbers[4];
    for (int i = 0; i < 4; ++i) words[i] = join_halves(w[i][2 * g], w[i][2 * g + 1]);
    map(words, numbers);
    order(numbers);
    for (int i = 0; i < 4; ++i) store(out + g * group_size + i * lanes<float>, numbers[i]);
  }
}

// What a generator may be asked to do on the side: nothing.
struct Nothing {
  ISTHMUS_INLINE void operator()(int64_t, int64_t) const {}
};

// Elements [first, first + count) of the stream in which map(words, numbers) makes four numbers of four words. The
// arithmetic leaves the memory idle: now and then meanwhile(i, n) may fetch what will be needed at places i to i + n.
template <class Map, class Meanwhile = Nothing>
ISTHMUS_INLINE void fill_stream(const Key& key, int64_t first, int64_t count, Map map, float* out,
                                Meanwhile&& meanwhile = {}) {
  constexpr int groups = 2;
  const int64_t end = first + count;
  int64_t start = first / 4 * 4;
  if (start == first) {
    for (; start + groups * group_size <= end; start += groups * group_size) {
      fill_groups<groups>(key, start, map, out + (start - first));
      meanwhile(start - first, groups * group_size);
    }
  }
  for (; start < end; start += group_size) {
    float group[group_size];
    fill_groups<1>(key, start, map, group);
    const int64_t from = start < first ? first : start;
    const int64_t to = start + group_size < end ? start + group_size : end;
    std::memcpy(out + (from - first), group + (from - start), static_cast<size_t>(to - from) * sizeof(float));
  }
}

template <class Meanwhile = Nothing>
inline void fill_normal(const Key& key, int64_t first, int64_t count, float* out, Meanwhile&& meanwhile = {}) {
  const auto box_muller = [](const u32v(&word)[4], f32v(&n)[4]) __attribute__((always_inline)) {
    normal_pair(word[0], word[1], n[0], n[1]);
    normal_pair(word[2], word[3], n[2], n[3]);
  };
  fill_stream(key, first, count, box_muller, out, meanwhile);
}

// float64 serves gradient checks and oracles: plain scalar code.
template <class Meanwhile = Nothing>
inline void fill_normal(const Key& key, int64_t first, int64_t count, double* out, Meanwhile&& = {}) {
  for (int64_t i = first; i < first + count; ++i) {
    const NormalPair pair = normal_pair(isthmus::philox(key.seed, key.offset + static_cast<uint64_t>(i / 2)));
    out[i - first] = i % 2 == 0 ? pair.first : pair.second;
  }
}

}  // namespace
}  // namespace isthmus
