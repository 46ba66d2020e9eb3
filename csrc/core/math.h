// Elementary functions of vectors, for kernel bodies.
//
// float32: branch-free, every lane takes the same path. The argument is reduced by exact or nearly exact steps, a
// minimax polynomial does the rest. Coefficients are ours: weighted minimax fits, rounded to float one by one, lowest
// first, the rest refitted each time; interval, weight and error stand beside each table. Largest errors, measured on
// every instruction set, are in docs/numerics.md and asserted by csrc/tests/test_math.cpp.
//
// Rewriting a * b + c as a fused operation only ever makes these formulas more accurate: no step relies on a product
// being rounded, and a product that must be exact has a factor with enough trailing zeros.
//
// float64 exists for gradient checks and calls the C library lane by lane.
//
// NaN propagates. The sign of a zero result is not specified.
#pragma once

#include "core/simd.h"

namespace isthmus {
namespace {

constexpr float infinity = __builtin_inff();
constexpr float not_a_number = __builtin_nanf("");

// Horner's rule, coefficients from the constant term up.
template <int n>
ISTHMUS_INLINE f32v polynomial(f32v x, const float (&coefficient)[n]) {
  f32v sum = splat(coefficient[n - 1]);
  for (int i = n - 2; i >= 0; --i) sum = sum * x + coefficient[i];
  return sum;
}

// Clamps that let NaN through: the machine instruction returns its second operand if either is NaN.
ISTHMUS_INLINE f32v at_least(f32v x, float low) {
#if defined(__AVX512F__)
  return (f32v)_mm512_max_ps((__m512)splat(low), (__m512)x);
#elif defined(__AVX2__)
  return (f32v)_mm256_max_ps((__m256)splat(low), (__m256)x);
#elif defined(__SSE2__)
  return (f32v)_mm_max_ps((__m128)splat(low), (__m128)x);
#else
  return x < low ? splat(low) : x;
#endif
}
ISTHMUS_INLINE f32v at_most(f32v x, float high) {
#if defined(__AVX512F__)
  return (f32v)_mm512_min_ps((__m512)splat(high), (__m512)x);
#elif defined(__AVX2__)
  return (f32v)_mm256_min_ps((__m256)splat(high), (__m256)x);
#elif defined(__SSE2__)
  return (f32v)_mm_min_ps((__m128)splat(high), (__m128)x);
#else
  return x > high ? splat(high) : x;
#endif
}

// -|x|
ISTHMUS_INLINE f32v negative_magnitude(f32v x) { return (f32v)((u32v)x | 0x80000000u); }

// x, negated where the top bit of `sign` is set.
ISTHMUS_INLINE f32v flip_sign(f32v x, u32v sign) { return (f32v)((u32v)x ^ (sign & 0x80000000u)); }

// ---- exp -----------------------------------------------------------------------------------------------------------

// An integer held twice: as a float, and in the low 22 bits of `bits`. Valid up to 2^21 in magnitude.
struct Rounded {
  f32v value;
  u32v bits;
};

// Adding 1.5 * 2^23 leaves no bit behind the binary point, so the adder itself rounds to nearest.
ISTHMUS_INLINE Rounded round_to_integer(f32v x) {
  constexpr float magic = 0x1.8p23f;
  const f32v shifted = x + magic;
  return {shifted - magic, (u32v)shifted};
}

// 2^(k + shift), which must be a normal number.
ISTHMUS_INLINE f32v power_of_two(Rounded k, int shift = 0) {
  return (f32v)((k.bits << 23) + (uint32_t(127 + shift) << 23));
}

// x * 2^k, rounded once even where the result is subnormal, for |k| <= 250.
ISTHMUS_INLINE f32v ldexp(f32v x, Rounded k) {
#if defined(__AVX512F__)
  return (f32v)_mm512_scalef_ps((__m512)x, (__m512)k.value);
#else
  // 2^k itself may be out of range: multiply by two halves of it.
  const u32v first = (k.bits << 22) & 0xff800000u;
  const u32v second = (k.bits << 23) - first;
  return x * (f32v)(first + 0x3f800000u) * (f32v)(second + 0x3f800000u);
#endif
}

// x = k ln 2 + high - low with |high - low| <= ln(2)/2, high exact.
struct ExpArgument {
  Rounded k;
  f32v high, low;
};

ISTHMUS_INLINE ExpArgument reduce_exp(f32v x) {
  constexpr float log2_e = 0x1.715476p0f;
  constexpr float ln2_high = 0x1.62e4p-1f;  // 15 bits: k * ln2_high is exact
  constexpr float ln2_low = 0x1.7f7d1cp-20f;
  const Rounded k = round_to_integer(x * log2_e);
  return {k, x - k.value * ln2_high, k.value * ln2_low};
}

// Beyond these, exp is 0 or infinite.
constexpr float exp_lowest = -104.0f, exp_highest = 89.0f;

ISTHMUS_INLINE f32v exp_in_range(f32v x) {
  // (e^r - 1 - r) / r^2 on |r| <= 0.34665, weight r^2 / e^r: error 2^-28.0.
  constexpr float q[] = {0x1p-1f, 0x1.5554a4p-3f, 0x1.55568ap-5f, 0x1.122f22p-7f, 0x1.6b6be2p-10f};
  const ExpArgument a = reduce_exp(x);
  const f32v r = a.high - a.low;
  return ldexp(r * r * polynomial(r, q) + r + 1.0f, a.k);
}

ISTHMUS_INLINE f32v exp(f32v x) { return exp_in_range(at_most(at_least(x, exp_lowest), exp_highest)); }
ISTHMUS_INLINE f32v exp_of_negative(f32v x) { return exp_in_range(at_least(x, exp_lowest)); }

// (e^r - 1 - r) / r^2 on |r| <= 0.34665, relative error 2^-27.9.
ISTHMUS_INLINE f32v expm1mx_quotient(f32v r) {
  constexpr float q[] = {0x1p-1f, 0x1.555556p-3f, 0x1.55550cp-5f, 0x1.111054p-7f, 0x1.6d2238p-10f, 0x1.a1847cp-13f};
  return polynomial(r, q);
}

// e^x - 1
ISTHMUS_INLINE f32v expm1(f32v x) {
  constexpr float lowest = -87.0f;  // -1 long before, and 2^k still a normal number
  const ExpArgument a = reduce_exp(at_most(at_least(x, lowest), exp_highest));
  const f32v r = a.high - a.low;
  const f32v m = r * r * expm1mx_quotient(r);
  // 2^k (1 + r + m) - 1, halved because 2^128 is not a float; the large terms first, while they are exact.
  const f32v t = power_of_two(a.k, -1);
  const f32v half = t * m + (t * a.high + (t - 0.5f) - t * a.low);
  return a.k.value == 0.0f ? r + m : half + half;
}

// e^x and e^x - 1 from one reduction. The second keeps its relative accuracy near 0, where k is 0.
ISTHMUS_INLINE void exp_and_expm1(f32v x, f32v& exp_x, f32v& expm1_x) {
  const ExpArgument a = reduce_exp(at_most(at_least(x, exp_lowest), exp_highest));
  const f32v r = a.high - a.low;
  const f32v e = r * r * expm1mx_quotient(r) + r;
  exp_x = ldexp(e + 1.0f, a.k);
  expm1_x = a.k.value == 0.0f ? e : exp_x - 1.0f;
}

// e^x and e^x - 1 - x from one reduction. The second keeps full relative accuracy near 0, where it is x^2/2.
ISTHMUS_INLINE void exp_and_expm1mx(f32v x, f32v& exp_x, f32v& expm1mx_x) {
  const ExpArgument a = reduce_exp(at_most(at_least(x, exp_lowest), exp_highest));
  const f32v r = a.high - a.low;
  const f32v m = r * r * expm1mx_quotient(r);
  exp_x = ldexp(r + m + 1.0f, a.k);
  // With x = k ln2 + r: 2^k (1 + r + m) - 1 - x = 2^k m + (2^k - 1) r + (2^k - 1 - k ln2).
  constexpr float ln2_high = 0x1.62e4p-1f;
  const f32v t = power_of_two(a.k);
  const f32v large = (t - 1.0f) * a.high + ((t - 1.0f) - a.k.value * ln2_high);
  const f32v near = t * m + (large - t * a.low);
  // Further out one term is all that counts (and 2^k may not be a float).
  constexpr float far = 30.0f;
  expm1mx_x = x > far ? exp_x : (x < -far ? -1.0f - x : near);
}

ISTHMUS_INLINE f32v expm1mx(f32v x) {
  f32v exp_x, expm1mx_x;
  exp_and_expm1mx(x, exp_x, expm1mx_x);
  return expm1mx_x;
}

// ---- log -----------------------------------------------------------------------------------------------------------

// The power of two e with u * 2^-e in [2/3, 4/3), as e << 23: subtracting it from the bits of a float divides by 2^e.
ISTHMUS_INLINE u32v nearest_exponent(f32v u) {
  constexpr uint32_t two_thirds = 0x3f2aaaab;
  return ((u32v)u - two_thirds) & 0xff800000u;
}

// log(2^e (1 + f)), given e << 23.
ISTHMUS_INLINE f32v log_reduced(f32v f, u32v exponent) {
  // (log(1 + f) - f) / f^2 on |f| <= 1/3, weight f^2 / |log(1 + f)|: error 2^-27.7.
  constexpr float q[] = {-0x1p-1f,       0x1.555506p-2f, -0x1.fffefap-3f, 0x1.99d054p-3f, -0x1.559c54p-3f,
                         0x1.1ed508p-3f, -0x1.f335dp-4f, 0x1.1e6eb6p-3f,  -0x1.07bc3cp-3f};
  // ln 2 is a float to within 2^-28 of itself: no second part is needed.
  constexpr float ln2 = 0x1.62e43p-1f * 0x1p-23f;
  return __builtin_convertvector((i32v)exponent, f32v) * ln2 + (f * f * polynomial(f, q) + f);
}

// log of positive, normal, finite numbers: log without its special cases.
ISTHMUS_INLINE f32v log_positive(f32v x) {
  const u32v exponent = nearest_exponent(x);
  return log_reduced((f32v)((u32v)x - exponent) - 1.0f, exponent);
}

ISTHMUS_INLINE f32v log(f32v x) {
  const i32v subnormal = x < 0x1p-126f;
  const f32v normal = subnormal ? x * 0x1p23f : x;
  const u32v exponent = nearest_exponent(normal);
  const f32v f = (f32v)((u32v)normal - exponent) - 1.0f;
  const f32v finite = log_reduced(f, exponent - ((u32v)subnormal & (23u << 23)));
  const f32v outside = x == 0.0f ? splat(-infinity) : splat(not_a_number);
  return x > 0.0f ? (x < infinity ? finite : x) : outside;
}

// log(1 + x) for finite x > -1.
ISTHMUS_INLINE f32v log1p_finite(f32v x) {
  const u32v exponent = nearest_exponent(1.0f + x);
  // f = (1 + x) 2^-e - 1 without the rounding of 1 + x. 2^(1-e) is a float even for e = 128.
  const f32v scaled_x = (f32v)((u32v)x - exponent);
  const f32v scaled_two = (f32v)(0x40000000u - exponent);
  return log_reduced(scaled_x + (scaled_two * 0.5f - 1.0f), exponent);
}

// log(1 + x)
ISTHMUS_INLINE f32v log1p(f32v x) {
  const f32v outside = x == -1.0f ? splat(-infinity) : splat(not_a_number);
  return x > -1.0f ? (x < infinity ? log1p_finite(x) : x) : outside;
}

// ---- sin and cos ---------------------------------------------------------------------------------------------------

// For |x| <= 8192. Beyond, the error grows with |x|; from 2^21 on nothing is left.
ISTHMUS_INLINE void sincos(f32v x, f32v& sin_x, f32v& cos_x) {
  constexpr float two_over_pi = 0x1.45f306p-1f;
  const Rounded k = round_to_integer(x * two_over_pi);
  // r = x - k pi/2. The parts of pi/2 have 11 bits, so that their products with k < 2^13 are exact, fused or not; the
  // last two differences are rounded to the precision of r.
  constexpr float half_pi[] = {0x1.92p0f, 0x1.fb4p-12f, 0x1.444p-24f, 0x1.68c234p-39f};
  const f32v r = x - k.value * half_pi[0] - k.value * half_pi[1] - k.value * half_pi[2] - k.value * half_pi[3];
  // (sin r - r) / r^3 and (cos r - 1) / r^2 in r^2 on |r| <= pi/4, relative to sin and cos: errors 2^-27.9, 2^-33.0.
  constexpr float s[] = {-0x1.555546p-3f, 0x1.110778p-7f, -0x1.9954p-13f};
  constexpr float c[] = {1.0f, -0x1p-1f, 0x1.55554ap-5f, -0x1.6c0c28p-10f, 0x1.99e80cp-16f};
  const f32v z = r * r;
  const f32v sin_r = r * (z * polynomial(z, s)) + r;
  const f32v cos_r = polynomial(z, c);
  // Quadrant k mod 4, its two bits moved to the sign: an odd one swaps, 2 and 3 negate the sine, 1 and 2 the cosine.
  const u32v odd = k.bits << 31, upper = k.bits << 30;
  const i32v swap = (i32v)odd < 0;
  sin_x = flip_sign(swap ? cos_r : sin_r, upper);
  cos_x = flip_sign(swap ? sin_r : cos_r, upper ^ odd);
}

// ---- compositions --------------------------------------------------------------------------------------------------

// log(1 + e^x), without overflow and with no threshold: max(x, 0) + log1p(e^-|x|).
ISTHMUS_INLINE f32v softplus(f32v x) {
  return log1p_finite(exp_of_negative(negative_magnitude(x))) + at_least(x, 0.0f);
}

// 1 / (1 + e^-x)
ISTHMUS_INLINE f32v sigmoid(f32v x) {
  const f32v e = exp_of_negative(negative_magnitude(x));
  return (x < 0.0f ? e : splat(1.0f)) / (1.0f + e);
}

// (e^-2|x| - 1) / (e^-2|x| + 1), the numerator by expm1 where it would cancel and by exp where its error would count.
ISTHMUS_INLINE f32v tanh(f32v x) {
  const f32v n = 2.0f * negative_magnitude(x), e = expm1(n), p = exp_of_negative(n);
  const i32v near = n > -0.6f;
  return flip_sign((near ? e : p - 1.0f) / (near ? e + 2.0f : p + 1.0f), ~(u32v)x);
}

ISTHMUS_INLINE f32v erf(f32v x) {
  // (erf(x) - x) / x in x^2 on |x| <= 0.85, relative to erf: error 2^-27.1.
  constexpr float p[] = {0x1.06eba8p-3f,  -0x1.812726p-2f, 0x1.ce256ap-4f,
                         -0x1.b735eap-6f, 0x1.4b763p-8f,   -0x1.4cd86p-11f};
  // -log(1 - erf(x)) / x on 0.85 <= x <= 4, weight x (1 - erf(x)) / erf(x): error 2^-28.2.
  constexpr float g[] = {0x1.20e75p0f,    0x1.45761p-1f,  0x1.af6f8ep-4f,
                         -0x1.77c334p-6f, 0x1.a73c64p-9f, -0x1.c45e34p-13f};
  constexpr float one_beyond = 4.0f;
  const f32v n = at_least(negative_magnitude(x), -one_beyond);
  const f32v inner = n * polynomial(n * n, p) + n;
  const f32v outer = exp_in_range(n * polynomial(-n, g)) - 1.0f;
  return flip_sign(n > -0.85f ? inner : outer, ~(u32v)x);
}

// ---- float64 -------------------------------------------------------------------------------------------------------

ISTHMUS_INLINE f64v exp(f64v x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}
ISTHMUS_INLINE f64v exp_of_negative(f64v x) { return exp(x); }
ISTHMUS_INLINE f64v expm1(f64v x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = __builtin_expm1(x[i]);
  return x;
}
ISTHMUS_INLINE f64v log(f64v x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = __builtin_log(x[i]);
  return x;
}
ISTHMUS_INLINE f64v log1p(f64v x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = __builtin_log1p(x[i]);
  return x;
}
ISTHMUS_INLINE f64v erf(f64v x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = __builtin_erf(x[i]);
  return x;
}
ISTHMUS_INLINE void sincos(f64v x, f64v& sin_x, f64v& cos_x) {
  for (int i = 0; i < lanes<double>; ++i) {
    sin_x[i] = __builtin_sin(x[i]);
    cos_x[i] = __builtin_cos(x[i]);
  }
}

// e^x - 1 - x: the Taylor series where the difference would cancel.
ISTHMUS_INLINE f64v expm1mx(f64v x) {
  f64v series = splat(1.0);
  for (int n = 20; n > 2; --n) series = series * x / n + 1.0;
  const f64v difference = x > 709.0 ? exp(x) : expm1(x) - x;
  return (x > -1.0) & (x < 1.0) ? 0.5 * x * x * series : difference;
}
ISTHMUS_INLINE void exp_and_expm1(f64v x, f64v& exp_x, f64v& expm1_x) {
  exp_x = exp(x);
  expm1_x = expm1(x);
}
ISTHMUS_INLINE void exp_and_expm1mx(f64v x, f64v& exp_x, f64v& expm1mx_x) {
  exp_x = exp(x);
  expm1mx_x = expm1mx(x);
}

ISTHMUS_INLINE f64v softplus(f64v x) { return log1p(exp(x < 0.0 ? x : -x)) + (x < 0.0 ? f64v{} : x); }
ISTHMUS_INLINE f64v tanh(f64v x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}
ISTHMUS_INLINE f64v sigmoid(f64v x) {
  const f64v e = exp(x < 0.0 ? x : -x);
  return (x < 0.0 ? e : splat(1.0)) / (1.0 + e);
}

}  // namespace
}  // namespace isthmus
