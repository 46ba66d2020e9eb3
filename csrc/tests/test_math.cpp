// core/math.h against the C library in double precision: the largest error in units of the last place of each function
// stays below the bound that docs/numerics.md promises, and special values are exact.
#include <cmath>

#include "check.h"
#include "core/math.h"
#include "core/special.h"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

constexpr float inf = __builtin_inff();
constexpr float nan = __builtin_nanf("");
constexpr float largest = 0x1.fffffep127f;

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}

// Distance in units of the last place of `want` as a float (of a subnormal: of the smallest one).
double ulp_error(float got, double want) {
  constexpr double wrong = 1e30;
  if (std::isnan(want) || std::isnan(got)) return std::isnan(want) && std::isnan(got) ? 0 : wrong;
  const float nearest = static_cast<float>(want);
  if (std::isinf(nearest) || std::isinf(got)) {
    // An overflow one ulp early or late is still within a bound of one or more.
    if (got == nearest) return 0;
    return std::fabs(want) > 0x1.fffffcp127 && std::fabs(got) > 0x1.fffffcp127f && got * want > 0 ? 1 : wrong;
  }
  int exponent = -125;
  if (want != 0) std::frexp(want, &exponent);
  if (exponent < -125) exponent = -125;
  return std::fabs(got - want) * std::ldexp(1.0, 24 - exponent);
}

// The worst error of one function so far.
struct Worst {
  double ulp = 0;
  float at = 0;

  template <class F, class Reference>
  void measure(F function, Reference reference, f32v x) {
    const f32v got = function(x);
    for (int i = 0; i < lanes<float>; ++i) {
      const double error = ulp_error(got[i], reference(static_cast<double>(x[i])));
      if (error > ulp) *this = {error, x[i]};
    }
  }
};

// Consecutive floats of [low, high], one in `stride`, by their place in the order of all floats.
int32_t place(float x) {
  const int32_t bits = static_cast<int32_t>(to_bits(x));
  return bits < 0 ? INT32_MIN - bits : bits;
}
float at_place(int64_t place) { return from_bits(static_cast<uint32_t>(place < 0 ? INT32_MIN - place : place)); }

struct Domain {
  float low, high;
  // Where a formula changes or cancels; the floats around are tried one by one.
  float breakpoints[8];
  float period;  // breakpoints also at multiples of this, if not 0
};

template <class F, class Reference>
void check_function(const char* name, double bound, Domain domain, F function, Reference reference) {
  constexpr int64_t samples = 1 << 22, near = 64;
  Worst worst;
  const int64_t first = place(domain.low), last = place(domain.high);
  const auto range = [&](int64_t begin, int64_t end, int64_t stride) {
    begin = begin < first ? first : begin;
    end = end > last ? last : end;
    for (int64_t p = begin; p <= end; p += stride * lanes<float>) {
      f32v x;
      for (int i = 0; i < lanes<float>; ++i) {
        const int64_t q = p + i * stride;
        x[i] = at_place(q < end ? q : end);
      }
      worst.measure(function, reference, x);
    }
  };
  const int64_t stride = (last - first) / samples + 1;
  range(first, last, stride | 1);
  const float edges[] = {domain.low, domain.high, 0.0f, 0x1p-126f, -0x1p-126f, 1.0f, -1.0f};
  for (float edge : edges) range(place(edge) - near, place(edge) + near, 1);
  for (float point : domain.breakpoints) range(place(point) - near, place(point) + near, 1);
  if (domain.period > 0) {
    for (int k = -12000; k <= 12000; ++k) {
      const int64_t centre = place(static_cast<float>(static_cast<double>(domain.period) * k));
      range(centre - 8, centre + 8, 1);
    }
  }
  std::printf("%-12s %6.3f ulp at %a\n", name, worst.ulp, static_cast<double>(worst.at));
  CHECK_THAT(worst.ulp <= bound, "%s: %g ulp at %a exceeds %g", name, worst.ulp, static_cast<double>(worst.at), bound);
}

// ---- references ----------------------------------------------------------------------------------------------------

double expm1mx_reference(double x) {
  if (std::fabs(x) > 0.5) return x > 700 ? std::exp(x) : std::expm1(x) - x;
  double sum = 0;
  for (int n = 20; n > 2; --n) sum = (sum + 1) * x / n;
  return 0.5 * x * x * (sum + 1);
}
double softplus_reference(double x) { return std::fmax(x, 0.0) + std::log1p(std::exp(-std::fabs(x))); }
double sigmoid_reference(double x) { return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x)); }

// ---- float32 -------------------------------------------------------------------------------------------------------

void test_accuracy() {
  constexpr float half_ln2 = 0x1.62e43p-2f, quarter_pi = 0x1.921fb6p-1f, two_pi = 0x1.921fb6p2f;
  constexpr float exp_overflow = 0x1.62e42ep6f;
  const auto sine = [](f32v x) {
    f32v s, c;
    sincos(x, s, c);
    return s;
  };
  const auto cosine = [](f32v x) {
    f32v s, c;
    sincos(x, s, c);
    return c;
  };
  const auto exp_of_both = [](f32v x) {
    f32v e, remainder;
    exp_and_expm1mx(x, e, remainder);
    return e;
  };
  const auto exp_with_expm1 = [](f32v x) {
    f32v e, less_one;
    exp_and_expm1(x, e, less_one);
    return e;
  };
  const auto expm1_with_exp = [](f32v x) {
    f32v e, less_one;
    exp_and_expm1(x, e, less_one);
    return less_one;
  };
  const auto exp_reference = [](double x) { return std::exp(x); };
  const auto log_reference = [](double x) { return std::log(x); };

  const Domain reals = {
      -inf, inf, {exp_overflow, -87.0f, -87.33655f, -103.972f, -104.0f, 89.0f, -17.3f, 16.6f}, half_ln2};
  check_function("exp", 1.0, reals, [](f32v x) { return exp(x); }, exp_reference);
  check_function("exp (both)", 1.0, reals, exp_of_both, exp_reference);
  check_function("exp (with expm1)", 1.0, reals, exp_with_expm1, exp_reference);
  check_function("expm1", 1.5, reals, [](f32v x) { return expm1(x); }, [](double x) { return std::expm1(x); });
  check_function("expm1 (with exp)", 3.5, reals, expm1_with_exp, [](double x) { return std::expm1(x); });
  const Domain with_switch = {
      -inf, inf, {exp_overflow, 30.0f, -30.0f, 0.5f, -0.5f, 0x1p-12f, -0x1p-12f, 1e-19f}, half_ln2};
  check_function("expm1mx", 2.5, with_switch, [](f32v x) { return expm1mx(x); }, expm1mx_reference);

  const Domain positive = {
      0.0f, inf, {0.5f, 2.0f / 3, 4.0f / 3, 2.0f, 0x1.555556p-126f, 0x1.555556p127f, 3e-39f, 0}, 0};
  check_function("log", 1.5, positive, [](f32v x) { return log(x); }, log_reference);
  const Domain normal = {0x1p-126f, largest, {0.5f, 2.0f / 3, 4.0f / 3, 2.0f, 0x1p-33f, 0x1.555556p127f, 1, 1}, 0};
  check_function("log_positive", 1.5, normal, [](f32v x) { return log_positive(x); }, log_reference);
  const Domain above = {-1.0f, inf, {-0.5f, -1.0f / 3, 1.0f / 3, 5.0f / 3, 0x1p24f, 0x1p25f, 0x1.555556p127f, 0}, 0};
  check_function("log1p", 2.0, above, [](f32v x) { return log1p(x); }, [](double x) { return std::log1p(x); });

  const Domain angles = {-8192.0f, 8192.0f, {}, quarter_pi};
  check_function("sin", 2.5, angles, sine, [](double x) { return std::sin(x); });
  check_function("cos", 2.5, angles, cosine, [](double x) { return std::cos(x); });
  // The angles of Box-Muller, four million of them: every other float of the upper half of the circle.
  const Domain circle = {0x1p-31f, two_pi, {}, quarter_pi};
  check_function("sin [0, 2pi]", 1.5, circle, sine, [](double x) { return std::sin(x); });
  check_function("cos [0, 2pi]", 1.5, circle, cosine, [](double x) { return std::cos(x); });

  const Domain symmetric = {-inf, inf, {0.85f, -0.85f, 3.8325f, 4.0f, -4.0f, 1e-20f, 30.0f, -103.9f}, half_ln2};
  check_function("erf", 1.5, symmetric, [](f32v x) { return erf(x); }, [](double x) { return std::erf(x); });
  check_function("softplus", 2.0, symmetric, [](f32v x) { return softplus(x); }, softplus_reference);
  check_function("sigmoid", 2.5, symmetric, [](f32v x) { return sigmoid(x); }, sigmoid_reference);
  // e^(x²) erfc(x), by its asymptotic series where the product would lose digits.
  const auto erfcx_reference = [](double x) {
    double sum = 1;
    for (int n = 40; n > 0; --n) sum = 1 - (2 * n - 1) / (2 * x * x) * sum;
    return x < 8 ? std::exp(x * x) * std::erfc(x) : sum / (x * std::sqrt(std::acos(-1.0)));
  };
  check_function("erfcx", 6.0, Domain{0.0f, 1e30f, {}, half_ln2}, [](f32v x) { return erfcx(x); }, erfcx_reference);
  check_function("tanh", 3.0, symmetric, [](f32v x) { return tanh(x); }, [](double x) { return std::tanh(x); });
}

template <class F>
void check_value(const char* name, F function, float x, float want) {
  const f32v got = function(splat(x));
  for (int i = 0; i < lanes<float>; ++i) {
    const bool same = std::isnan(want) ? std::isnan(got[i]) : got[i] == want;
    CHECK_THAT(same, "%s(%g) = %g, expected %g", name, static_cast<double>(x), static_cast<double>(got[i]),
               static_cast<double>(want));
  }
}

#define CHECK_VALUE(function, x, want) check_value(#function, [](f32v v) { return function(v); }, x, want)

void test_special_values() {
  CHECK_VALUE(exp, 0.0f, 1.0f);
  CHECK_VALUE(exp, -0.0f, 1.0f);
  CHECK_VALUE(exp, inf, inf);
  CHECK_VALUE(exp, -inf, 0.0f);
  CHECK_VALUE(exp, largest, inf);
  CHECK_VALUE(exp, -largest, 0.0f);
  CHECK_VALUE(exp, nan, nan);
  CHECK_VALUE(expm1, 0.0f, 0.0f);
  CHECK_VALUE(expm1, inf, inf);
  CHECK_VALUE(expm1, -inf, -1.0f);
  CHECK_VALUE(expm1, -largest, -1.0f);
  CHECK_VALUE(expm1, 0x1p-149f, 0x1p-149f);
  CHECK_VALUE(expm1, nan, nan);
  CHECK_VALUE(expm1mx, 0.0f, 0.0f);
  CHECK_VALUE(expm1mx, inf, inf);
  CHECK_VALUE(expm1mx, -inf, inf);
  CHECK_VALUE(expm1mx, -largest, largest);
  CHECK_VALUE(expm1mx, nan, nan);
  CHECK_VALUE(log, 0.0f, -inf);
  CHECK_VALUE(log, -0.0f, -inf);
  CHECK_VALUE(log, 1.0f, 0.0f);
  CHECK_VALUE(log, inf, inf);
  CHECK_VALUE(log, -0x1p-149f, nan);
  CHECK_VALUE(log, -1.0f, nan);
  CHECK_VALUE(log, -inf, nan);
  CHECK_VALUE(log, nan, nan);
  CHECK_VALUE(log_positive, 1.0f, 0.0f);
  CHECK_VALUE(log1p, 0.0f, 0.0f);
  CHECK_VALUE(log1p, -1.0f, -inf);
  CHECK_VALUE(log1p, -0x1.000002p0f, nan);
  CHECK_VALUE(log1p, inf, inf);
  CHECK_VALUE(log1p, -inf, nan);
  CHECK_VALUE(log1p, nan, nan);
  CHECK_VALUE(erf, 0.0f, 0.0f);
  CHECK_VALUE(erf, inf, 1.0f);
  CHECK_VALUE(erf, -inf, -1.0f);
  CHECK_VALUE(erf, nan, nan);
  CHECK_VALUE(softplus, inf, inf);
  CHECK_VALUE(softplus, -inf, 0.0f);
  CHECK_VALUE(softplus, largest, largest);
  CHECK_VALUE(softplus, nan, nan);
  CHECK_VALUE(sigmoid, 0.0f, 0.5f);
  CHECK_VALUE(sigmoid, inf, 1.0f);
  CHECK_VALUE(sigmoid, -inf, 0.0f);
  CHECK_VALUE(sigmoid, nan, nan);
  CHECK_VALUE(tanh, inf, 1.0f);
  CHECK_VALUE(tanh, -inf, -1.0f);
  CHECK_VALUE(tanh, nan, nan);
  for (float x : {inf, -inf, nan}) {
    f32v s, c;
    sincos(splat(x), s, c);
    CHECK(std::isnan(s[0]) && std::isnan(c[0]));
  }
  f32v s, c;
  sincos(f32v{}, s, c);
  CHECK(s[0] == 0.0f && c[0] == 1.0f);
}

// Every NaN, quiet or signalling, of either sign, stays one: bit tricks must not turn it into a number.
void test_nan_payloads() {
  for (uint32_t payload = 1; payload < 0x00800000u; payload += 4099) {
    for (uint32_t sign : {0u, 0x80000000u}) {
      const f32v x = splat(from_bits(sign | 0x7f800000u | payload));
      f32v s, c;
      sincos(x, s, c);
      const f32v all[] = {exp(x), expm1(x), expm1mx(x), log(x), log1p(x), erf(x), softplus(x), sigmoid(x), s, c};
      for (const f32v& y : all) CHECK_THAT(std::isnan(y[0]), "NaN with payload %x became a number", payload);
    }
  }
}

// A lane's result depends on that lane alone.
void test_lanes_are_independent() {
  f32v mixed;
  for (int i = 0; i < lanes<float>; ++i) mixed[i] = i % 4 == 0 ? inf : i % 4 == 1 ? nan : i % 4 == 2 ? -1000.0f : 0.25f;
  const f32v alone = exp(splat(0.25f)), among = exp(mixed);
  for (int i = 3; i < lanes<float>; i += 4) CHECK(among[i] == alone[i]);
}

// ---- float64 -------------------------------------------------------------------------------------------------------

double relative_error(double got, long double want) {
  if (std::isnan(got) || std::isnan(want)) return std::isnan(got) && std::isnan(want) ? 0 : 1;
  if (got == want) return 0;
  return static_cast<double>(std::fabs((got - want) / want));
}

template <class F, class Reference>
void check_double(const char* name, F function, Reference reference, double low) {
  constexpr double bound = 8 * 0x1p-53;
  for (double x = low; x < 40; x += x < 1 && x > -1 ? 0x1.3p-9 : 0.317) {
    const double got = function(splat(x))[lanes<double> - 1], error = relative_error(got, reference(x));
    CHECK_THAT(error <= bound, "%s(%.17g) = %.17g in float64: relative error %g", name, x, got, error);
  }
}

long double expm1mx_long(long double x) {
  if (std::fabs(x) > 1) return std::expm1(x) - x;
  long double sum = 0;
  for (int n = 30; n > 2; --n) sum = (sum + 1) * x / n;
  return x * x / 2 * (sum + 1);
}

void test_float64() {
  using L = long double;
  check_double("exp", [](f64v x) { return exp(x); }, [](L x) { return std::exp(x); }, -40);
  check_double("expm1", [](f64v x) { return expm1(x); }, [](L x) { return std::expm1(x); }, -40);
  check_double("expm1mx", [](f64v x) { return expm1mx(x); }, expm1mx_long, -40);
  check_double("log", [](f64v x) { return log(x); }, [](L x) { return std::log(x); }, 0);
  check_double("log1p", [](f64v x) { return log1p(x); }, [](L x) { return std::log1p(x); }, -1);
  check_double("erf", [](f64v x) { return erf(x); }, [](L x) { return std::erf(x); }, -40);
  const auto softplus_long = [](L x) { return std::fmax(x, L(0)) + std::log1p(std::exp(-std::fabs(x))); };
  check_double("softplus", [](f64v x) { return softplus(x); }, softplus_long, -40);
  check_double("sigmoid", [](f64v x) { return sigmoid(x); }, [](L x) { return 1 / (1 + std::exp(-x)); }, -40);
  const auto sine = [](f64v x) {
    f64v s, c;
    sincos(x, s, c);
    return s;
  };
  const auto cosine = [](f64v x) {
    f64v s, c;
    sincos(x, s, c);
    return c;
  };
  check_double("sin", sine, [](L x) { return std::sin(x); }, -40);
  check_double("cos", cosine, [](L x) { return std::cos(x); }, -40);
  const double dinf = __builtin_inf();
  CHECK(expm1mx(splat(dinf))[0] == dinf && expm1mx(splat(-dinf))[0] == dinf);
  CHECK(expm1mx(splat(1e-200))[0] == 0 && expm1mx(splat(1e-100))[0] > 0);
  CHECK(softplus(splat(dinf))[0] == dinf && softplus(splat(-dinf))[0] == 0 && softplus(splat(1000.0))[0] == 1000);
  CHECK(sigmoid(splat(-dinf))[0] == 0 && sigmoid(splat(dinf))[0] == 1 && sigmoid(splat(-740.0))[0] > 0);
}

void run() {
  test_accuracy();
  test_special_values();
  test_nan_payloads();
  test_lanes_are_independent();
  test_float64();
}

}  // namespace
}  // namespace isthmus::ISTHMUS_LEVEL

ISTHMUS_LEVEL_TESTS(run)
