// The noise contract: known answers, vector code equal to scalar code, every range a window of one stream, normals
// within a stated distance of their definition.
#include <cmath>

#include "check.h"
#include "core/noise.h"
#include "noise_reference.h"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

struct Stream {
  int64_t seed, offset;
};

// Counters that carry from the low word to the high one, and wrap around, are among these.
constexpr Stream streams[] = {
    {0, 0}, {42, 7}, {-1, 0}, {int64_t(0x9e3779b97f4a7c15u), 0xfffffff0}, {1, -5}, {INT64_MIN, INT64_MAX}};

Key key_of(const Stream& stream) {
  const int64_t words[2] = {stream.seed, stream.offset};
  return Key(words);
}

constexpr int64_t window = 6 * group_size + 5;  // more than two turns of the widest loop

// ---- words ---------------------------------------------------------------------------------------------------------

void check_words(uint64_t seed, uint64_t counter, Words want) {
  const Words got = philox(seed, counter);
  for (int i = 0; i < 4; ++i)
    CHECK_THAT(got.w[i] == want.w[i], "word %d is %08x, expected %08x", i, got.w[i], want.w[i]);
}

void test_known_words() {
  check_words(0, 0, {{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}});
  check_words(0, 1, {{0xf8e4cca4u, 0x5cb200dbu, 0xb1a574ebu, 0x097eff67u}});
}

template <int N>
void test_vector_words() {
  for (const Stream& stream : streams) {
    const Key key = key_of(stream);
    u64v counters[N], wide[4][N];
    for (int n = 0; n < N; ++n) {
      for (int i = 0; i < lanes<double>; ++i) {
        counters[n][i] = key.offset + static_cast<uint64_t>(i * i + 1000 * n) + (uint64_t(n) << 32);
      }
    }
    philox(key, counters, wide);
    for (int n = 0; n < N; ++n) {
      for (int i = 0; i < lanes<double>; ++i) {
        const Words words = philox(key.seed, counters[n][i]);
        for (int j = 0; j < 4; ++j) CHECK(static_cast<uint32_t>(wide[j][n][i]) == words.w[j]);
      }
    }
  }
}

// The numbers a map makes of four words stand side by side, each where its word has its place in the stream.
void test_stream_is_in_order() {
  const auto bits = [](const u32v(&word)[4], f32v(&n)[4]) __attribute__((always_inline)) {
    for (int j = 0; j < 4; ++j) n[j] = __builtin_convertvector(word[j] >> 8, f32v);  // exact
  };
  for (const Stream& stream : streams) {
    const Key key = key_of(stream);
    for (int64_t first : {0, 1, 6, 8}) {
      float got[window];
      fill_stream(key, first, window, bits, got);
      for (int64_t i = 0; i < window; ++i) {
        const int64_t element = first + i;
        const uint32_t word = philox(key.seed, key.offset + static_cast<uint64_t>(element / 4)).w[element % 4];
        CHECK_THAT(got[i] == static_cast<float>(word >> 8), "element %ld from %ld on is not its word",
                   static_cast<long>(element), static_cast<long>(first));
      }
    }
  }
}

// ---- uniforms ------------------------------------------------------------------------------------------------------

void test_uniforms_lie_in_half_open_interval() {
  CHECK(uniform(0u) == 0x1p-33f && uniform(0xffffffffu) == 1.0f && uniform(0x80000000u) == 0.5f);
  CHECK(uniform(0u, 0u) == 0x1p-65 && uniform(0xffffffffu, 0xffffffffu) == 1.0);
  for (uint64_t w = 0; w < (1ull << 32); w += 65521) {
    const uint32_t word = static_cast<uint32_t>(w);
    // float conversion rounds to nearest even, on every level
    const float want = static_cast<float>(word) * 0x1p-32f + 0x1p-33f;
    CHECK(uniform(u32v{} + word)[0] == want && uniform(word) == want);
    CHECK(want > 0 && want <= 1);
  }
}

// ---- normals -------------------------------------------------------------------------------------------------------

double ulps_between(float got, double want) {
  int exponent = -125;
  if (want != 0) std::frexp(want, &exponent);
  return std::fabs(got - want) * std::ldexp(1.0, 24 - exponent);
}

void test_normals_follow_the_definition() {
  constexpr double bound = 3.5;
  double worst = 0;
  for (const Stream& stream : streams) {
    const Key key = key_of(stream);
    const NoiseReference reference = {{stream.seed, stream.offset}};
    static float normals[1 << 18];
    fill_normal(key, 0, 1 << 18, normals);
    for (int64_t i = 0; i < (1 << 18); ++i) {
      const double want = reference(DType::f32, i), error = ulps_between(normals[i], want);
      if (error > worst) worst = error;
      CHECK_THAT(error <= bound, "normal %ld is %.9g, expected %.9g", static_cast<long>(i),
                 static_cast<double>(normals[i]), want);
    }
  }
  std::printf("normal        %6.3f ulp\n", worst);
}

void test_known_normals() {
  const float want[] = {0.99113774f,  -0.92466241f, -0.61760885f, -0.48206875f,
                        -0.15363818f, 0.18082580f,  0.83173507f,  0.19743970f};
  float got[8];
  fill_normal(key_of({0, 0}), 0, 8, got);
  for (int i = 0; i < 8; ++i)
    CHECK_THAT(ulps_between(got[i], want[i]) <= 4, "normal %d is %.9g", i, static_cast<double>(got[i]));

  const double want64[] = {-0.12151797595308224, -1.35003265985765508, -0.08187420991589159,
                           -0.22270905893902698, 1.77642433315204151,  2.17352073746283070};
  double got64[6];
  fill_normal(key_of({0, 0}), 0, 6, got64);
  for (int i = 0; i < 6; ++i)
    CHECK_THAT(std::fabs(got64[i] - want64[i]) < 1e-15, "float64 normal %d is %.17g", i, got64[i]);
}

template <class C>
void test_every_range_is_a_window() {
  for (const Stream& stream : streams) {
    const Key key = key_of(stream);
    C whole[window];
    fill_normal(key, 0, window, whole);
    for (int64_t first = 0; first < window; first += first < 9 ? 1 : 13) {
      for (int64_t count = 0; first + count <= window; count += count < 9 ? 1 : 29) {
        C part[window + 1];
        part[count] = C(123);
        fill_normal(key, first, count, part);
        bool same = part[count] == C(123);
        for (int64_t i = 0; i < count; ++i) same &= part[i] == whole[first + i];
        CHECK_THAT(same, "normals [%ld, +%ld) differ from those of the whole", static_cast<long>(first),
                   static_cast<long>(count));
      }
    }
  }
}

// Element i of (seed, offset + b) is element i + 4b of (seed, offset): the stream has no seams, even far out.
void test_offset_moves_the_window() {
  float near[64], far[64];
  const int64_t block = (int64_t(1) << 33) + 3;
  fill_normal(key_of({7, 11 + block}), 0, 64, near);
  fill_normal(key_of({7, 11}), 4 * block, 64, far);
  for (int i = 0; i < 64; ++i) CHECK(near[i] == far[i]);
}

void run() {
  test_known_words();
  test_vector_words<1>();
  test_vector_words<4>();
  test_stream_is_in_order();
  test_uniforms_lie_in_half_open_interval();
  test_known_normals();
  test_normals_follow_the_definition();
  test_every_range_is_a_window<float>();
  test_every_range_is_a_window<double>();
  test_offset_moves_the_window();
}

}  // namespace
}  // namespace isthmus::ISTHMUS_LEVEL

ISTHMUS_LEVEL_TESTS(run)
