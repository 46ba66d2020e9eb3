// core/simd.h: half types round as IEEE says, partial loads and stores leave their neighbours alone.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>

#include "check.h"
#include "core/simd.h"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

// ---- half types ----------------------------------------------------------------------------------------------------

// A format by its definition: significand bits (with the hidden one) and exponent range.
template <class T>
struct Format;
template <>
struct Format<BFloat16> {
  static constexpr int precision = 8, lowest = -126, highest = 127;
};
template <>
struct Format<Half> {
  static constexpr int precision = 11, lowest = -14, highest = 15;
};

template <class T>
double value_of(uint16_t bits) {
  constexpr int fraction_bits = Format<T>::precision - 1;
  const int field = (bits & 0x7fff) >> fraction_bits, fraction = bits & ((1 << fraction_bits) - 1);
  const double sign = (bits & 0x8000) != 0 ? -1 : 1;
  if (field == 2 * Format<T>::highest + 1) return fraction != 0 ? __builtin_nan("") : sign * __builtin_inf();
  const int hidden = field == 0 ? 0 : 1 << fraction_bits,
            exponent = field == 0 ? Format<T>::lowest : field + Format<T>::lowest - 1;
  return sign * std::ldexp(hidden + fraction, exponent - fraction_bits);
}

// To nearest, ties to even, by the arithmetic of doubles.
template <class T>
double nearest(double x) {
  if (x == 0 || !std::isfinite(x)) return x;
  const int exponent = std::ilogb(x) < Format<T>::lowest ? Format<T>::lowest : std::ilogb(x);
  const double unit = std::ldexp(1.0, exponent - Format<T>::precision + 1);
  const double rounded = std::nearbyint(x / unit) * unit;
  return std::fabs(rounded) >= std::ldexp(1.0, Format<T>::highest + 1) ? std::copysign(__builtin_inf(), x) : rounded;
}

bool same(double a, double b) { return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b); }

template <class T>
void test_widen_is_exact() {
  for (uint32_t bits = 0; bits < 0x10000; bits += lanes<float>) {
    T raw[2 * lanes<float>], back[lanes<float>];
    for (int i = 0; i < lanes<float>; ++i) {
      raw[i].bits = raw[2 * lanes<float> - 1 - i].bits = static_cast<uint16_t>(bits + static_cast<uint32_t>(i));
    }
    const f32v wide = load(raw), reversed = load(raw + lanes<float>);
    f32v pair[2];
    load_pair(raw, pair);
    CHECK(std::memcmp(&pair[0], &wide, sizeof wide) == 0 && std::memcmp(&pair[1], &reversed, sizeof wide) == 0);
    store(back, wide);
    for (int i = 0; i < lanes<float>; ++i) {
      const double want = value_of<T>(raw[i].bits);
      CHECK_THAT(same(wide[i], want), "widen(%#x) = %g, expected %g", raw[i].bits, static_cast<double>(wide[i]), want);
      const bool round_trip = std::isnan(want) ? std::isnan(value_of<T>(back[i].bits)) : back[i].bits == raw[i].bits;
      CHECK_THAT(round_trip, "%#x came back as %#x", raw[i].bits, back[i].bits);
    }
  }
}

template <class T>
void check_narrow(f32v x) {
  T narrowed[lanes<float>], negative[lanes<float>], pair[2 * lanes<float>];
  store(narrowed, x);
  store(negative, -x);
  store_pair(pair, {x, -x});
  CHECK(std::memcmp(pair, narrowed, sizeof narrowed) == 0);
  CHECK(std::memcmp(pair + lanes<float>, negative, sizeof negative) == 0);
  for (int i = 0; i < lanes<float>; ++i) {
    const double got = value_of<T>(narrowed[i].bits), want = nearest<T>(x[i]);
    CHECK_THAT(same(got, want), "narrow(%a) = %g, expected %g", static_cast<double>(x[i]), got, want);
  }
}

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

template <class T>
void test_narrow_rounds_to_even() {
  f32v x;
  for (uint64_t bits = 0; bits < (1ull << 32); bits += 1021 * lanes<float>) {
    for (int i = 0; i < lanes<float>; ++i)
      x[i] = from_bits(static_cast<uint32_t>(bits + 1021u * static_cast<unsigned>(i)));
    check_narrow<T>(x);
  }
  // Every number of the format, every midpoint between two, and the floats next to both.
  constexpr int lowest_bit = 24 - Format<T>::precision;
  for (uint64_t bits = 0; bits < (1ull << 32); bits += 1u << (lowest_bit - 1)) {
    for (int i = 0; i < lanes<float>; ++i)
      x[i] = from_bits(static_cast<uint32_t>(bits + static_cast<unsigned>(i % 4) - 1));
    check_narrow<T>(x);
  }
}

// Subnormal halves lie further apart than those bits: their midpoints by value.
void test_narrow_of_subnormal_halves() {
  for (int n = 0; n < 4096; ++n) {
    const float middle = std::ldexp(static_cast<float>(n), -25);
    check_narrow<Half>(splat(middle));
    check_narrow<Half>(splat(-middle));
    check_narrow<Half>(splat(std::nextafter(middle, 1.0f)));
    check_narrow<Half>(splat(std::nextafter(middle, 0.0f)));
  }
}

// ---- partial loads and stores --------------------------------------------------------------------------------------

// Memory that ends where the process may not read or write.
class GuardedPage {
 public:
  GuardedPage() : size_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    memory_ = static_cast<char*>(mmap(nullptr, 2 * size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(memory_ + size_, size_, PROT_NONE);
  }
  ~GuardedPage() { munmap(memory_, 2 * size_); }
  GuardedPage(const GuardedPage&) = delete;
  GuardedPage& operator=(const GuardedPage&) = delete;

  template <class T>
  T* last(int64_t count) const {
    return reinterpret_cast<T*>(memory_ + size_) - count;
  }

 private:
  size_t size_;
  char* memory_;
};

template <class T>
T make(int value) {
  if constexpr (sizeof(T) == sizeof(Compute<T>)) {
    return static_cast<T>(value);
  } else {
    T one;
    store_one(&one, static_cast<float>(value));
    return one;
  }
}

template <class T>
void test_first(const GuardedPage& page) {
  constexpr int width = lanes<Compute<T>>, guards = 64;
  for (int count = 0; count <= width + 2; ++count) {
    const int touched = count < width ? count : width;
    T* p = page.last<T>(touched);
    for (int i = 0; i < touched; ++i) p[i] = make<T>(i + 1);
    const Vec<Compute<T>> v = load_first(p, count);
    for (int i = 0; i < width; ++i) CHECK_THAT(v[i] == (i < touched ? i + 1 : 0), "lane %d of %d", i, count);

    char* before = reinterpret_cast<char*>(p) - guards;
    std::memset(before, 0x5a, guards);
    store_first(p, v + Compute<T>(1), count);
    for (int i = 0; i < touched; ++i) CHECK_THAT(load_one(p + i) == i + 2, "element %d of %d", i, count);
    for (int i = 0; i < guards; ++i) CHECK_THAT(before[i] == 0x5a, "store_first(%d) wrote in front", count);

    // Elements behind the stored ones keep their value.
    T row[2 * width + 2];
    for (T& element : row) element = make<T>(77);
    store_first(row, v, count);
    for (int i = touched; i < 2 * width + 2; ++i)
      CHECK_THAT(load_one(row + i) == 77, "store_first(%d) wrote behind", count);
  }
}

// ---- the rest ------------------------------------------------------------------------------------------------------

template <class C>
void test_lanes() {
  for (int i = 0; i < lanes<C>; ++i) CHECK(iota<C>()[i] == i && splat(C(3))[i] == C(3));
  for (int count = -1; count <= lanes<C> + 1; ++count) {
    const Mask<C> mask = first_lanes<C>(count);
    for (int i = 0; i < lanes<C>; ++i) CHECK((mask[i] != 0) == (i < count));
    CHECK(any(mask) == (count > 0));
  }
  for (int i = 0; i < lanes<C>; ++i) CHECK(any(iota<C>() == i));
  Vec<C> powers;
  C total = 0;
  for (int i = 0; i < lanes<C>; ++i) total += powers[i] = static_cast<C>(1 << i);
  CHECK(sum_lanes<C>(powers) == total);
}

template <class C>
void test_arithmetic() {
  for (C x : {C(0), C(1), C(2), C(0.1), C(1e-30), C(3e30)}) {
    CHECK(sqrt(splat(x))[lanes<C> - 1] == std::sqrt(x));
    CHECK(abs(splat(x))[0] == x && abs(splat(-x))[0] == x);
  }
  CHECK(std::isnan(sqrt(splat(C(-1)))[0]) && std::isnan(abs(splat(C(__builtin_nan(""))))[0]));
}

void test_integer_products() {
  const uint64_t values[] = {0, 1, 0xffffffffu, 0xd2511f53u, 0xcd9e8d57u, 0x123456789abcdefull, ~0ull};
  for (uint64_t a : values) {
    for (uint64_t b : values) {
      const u64v product = multiply_low_halves(u64v{} + a, u64v{} + b);
      for (int i = 0; i < lanes<double>; ++i) CHECK(product[i] == (a & 0xffffffffu) * (b & 0xffffffffu));
    }
  }
}

void test_rounded_is_not_fused() {
  volatile float a = 1.1f, product = a * 1.3f;
  CHECK(std::fma(a, 1.3f, -1.0f) != product - 1.0f);  // else the next line could not fail
  CHECK((rounded(splat<float>(a) * 1.3f) - 1.0f)[0] == product - 1.0f);
}

void run() {
  test_widen_is_exact<BFloat16>();
  test_widen_is_exact<Half>();
  test_narrow_rounds_to_even<BFloat16>();
  test_narrow_rounds_to_even<Half>();
  test_narrow_of_subnormal_halves();
  const GuardedPage page;
  test_first<float>(page);
  test_first<double>(page);
  test_first<BFloat16>(page);
  test_first<Half>(page);
  test_lanes<float>();
  test_lanes<double>();
  test_arithmetic<float>();
  test_arithmetic<double>();
  test_integer_products();
  test_rounded_is_not_fused();
}

}  // namespace
}  // namespace isthmus::ISTHMUS_LEVEL

ISTHMUS_LEVEL_TESTS(run)
